"""The real models that benchmarks run on, and their texts.

SmolLM2-135M-Instruct's linears lie on a Q4_1 grid, so a 4-bit figure on it is a re-quantization. Its off-grid twin computes the
same function (to 1e-6) from other weights: norms folded into the linears they feed, and the residual stream rotated by a random
orthogonal matrix, which unties the head: 162.8 M parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lwcompile.demo import demo_encoder, demo_model, demo_vision
from lwcompile.pipeline import capture
from lwcompile.program import Program
from lwcompile.sources import Source, open_source


def smollm2() -> Source:
    return open_source(demo_model())


def orthogonal(width: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, Haar-distributed, float64 [width, width]."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@torch.no_grad()
def off_grid_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """Rewrite a pre-RMSNorm decoder in place: the same function from rotated weights with unit norms and an untied head."""
    body = model.get_decoder()
    q = orthogonal(model.config.hidden_size, seed)

    def write(parameter: nn.Parameter, value: torch.Tensor) -> None:
        parameter.copy_(value.to(parameter.dtype))

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    final = body.norm.weight.double()
    head_weight = (embedding.weight.double() * final) @ q
    write(embedding.weight, embedding.weight.double() @ q)
    model.config.tie_word_embeddings = False
    head.weight = nn.Parameter(head_weight.to(embedding.weight.dtype), requires_grad=False)
    body.norm.weight.fill_(1.0)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in readers:
                write(linear.weight, (linear.weight.double() * norm.weight.double()) @ q)
            norm.weight.fill_(1.0)
        for linear in (attention.o_proj, mlp.down_proj):
            write(linear.weight, q.T @ linear.weight.double())
    return model


def program(name: str) -> Program:
    """`smollm2`, `twin`, `minilm` or `dinov2` (at 84 x 84), captured."""
    if name == "smollm2":
        return capture(demo_model())
    if name == "twin":
        source = smollm2()
        off_grid_twin(source.model)
        made = capture(Source(source.model, source.example_kwargs, source.dynamic, source.task, source.outputs, source.config,
                              name="SmolLM2-135M-Instruct, off-grid twin"))  # fmt: skip
        made.assets = capture(demo_model()).assets
        return made
    if name == "minilm":
        return capture(demo_encoder())
    return capture(open_source(demo_vision(), image_size=84))


def digits(folder: Path, size: int = 84) -> tuple[Path, Path]:
    """scikit-learn's handwritten digits, upsampled and normalised: calibration and evaluation files of pixel_values."""
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images - mean[:, None, None]) / std[:, None, None]).contiguous()
    paths = folder / "digits-calibration.safetensors", folder / "digits-evaluation.safetensors"
    for path, part in zip(paths, (pixels[:1200], pixels[1200:])):
        save_file({"pixel_values": part.contiguous()}, path)
    return paths
