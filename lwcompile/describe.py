"""What a transformers model is called with: task, example inputs, free dimensions and entry points.

All of it follows from the forward's signature, the configuration's fields and one run, never from the model's name.
Encoder-decoders are split in two entry points that are checked against the whole.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lwcompile.errors import BadInput
from lwcompile.sources import Dynamic, Part, Source, private_copy, run

BATCH, SEQUENCE, ENCODER_SEQUENCE = 2, 16, 18


def describe_model(model: Any, *, image_size: int | None = None, config: Mapping[str, Any] | None = None) -> Source:
    """The source of a loaded transformers model: task, example inputs, free dimensions, entry points."""
    described = dict(config) if config is not None else _configuration(model)
    model = private_copy(model)
    takes = inspect.signature(model.forward).parameters
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        example, dynamic, parts = _encoder_decoder(model, takes)
        task = "seq2seq"
    else:
        example, dynamic = _single(model, takes, image_size)
        parts = {"forward": Part(model, example, dynamic)}
        task = ""
    outputs = run(model, example)
    logits = "logits" in outputs
    if not task:
        task = _task(model, example, outputs)
    return Source(model, example, dynamic, task, "logits" if logits else "features", described, parts=parts)


def is_pretrained(model: nn.Module) -> bool:
    """Whether the module is a transformers model, without importing transformers for one that is not."""
    return hasattr(model, "config") and hasattr(model, "main_input_name") and hasattr(model.config, "to_json_string")


def _configuration(model: Any) -> dict[str, Any]:
    """config.json as the model would save it, without what tells how it was loaded."""
    made = json.loads(model.config.to_json_string())
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        made.pop(key, None)
    return made | {"architectures": made.get("architectures") or [type(model).__name__], "dtype": "float32"}


def _task(model: Any, example: Mapping[str, Tensor], outputs: Mapping[str, Any]) -> str:
    if "logits" not in outputs:
        return "similarity" if "input_ids" in example and "pixel_values" in example else "features"
    per_token = outputs["logits"].ndim == 3 and "input_ids" in example
    if not per_token:
        return "classification"
    return (
        "causal-lm" if model.can_generate() else "masked-lm" if _vocabulary(model) == outputs["logits"].shape[-1] else "tagging"
    )


def _single(model: Any, takes: Mapping[str, Any], image_size: int | None) -> tuple[dict[str, Tensor], Dynamic]:
    """Example inputs of a model with one entry point."""
    main = getattr(model, "main_input_name", "input_ids")
    wanted = {main} | {name for name in ("input_ids", "pixel_values") if name in takes and _required(model, name)}
    example: dict[str, Any] = {}
    dynamic: Dynamic = {}
    if "input_ids" in wanted:
        example["input_ids"] = _ids(model, BATCH, SEQUENCE)
        example["attention_mask"] = torch.ones_like(example["input_ids"])
        if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 0) > 1:
            example["token_type_ids"] = torch.zeros_like(example["input_ids"])
        if "position_ids" in takes and model.can_generate():
            example["position_ids"] = torch.arange(SEQUENCE).expand(BATCH, -1).contiguous()
        example = {name: tensor for name, tensor in example.items() if name in takes}
        dynamic = {name: {0: "batch", 1: "sequence"} for name in example}
    if "pixel_values" in wanted:
        example["pixel_values"] = _pixels(model, image_size)
        dynamic["pixel_values"] = {0: "batch"}
        if image_size is not None and "interpolate_pos_encoding" in takes:
            example["interpolate_pos_encoding"] = True
    if main in ("input_features", "input_values"):
        example[main] = _audio(model, main)
        dynamic[main] = {0: "batch"}
    if not example:
        raise BadInput(f"{type(model).__name__} takes {main!r}, for which no example is known: give example inputs")
    return example, dynamic


def _required(model: Any, name: str) -> bool:
    """A model of text and images takes both where its configuration has a part for each."""
    section = {"input_ids": "text_config", "pixel_values": "vision_config"}[name]
    return hasattr(model.config, "text_config") and hasattr(model.config, "vision_config") and hasattr(model.config, section)


def _encoder_decoder(model: Any, takes: Mapping[str, Any]) -> tuple[dict[str, Tensor], Dynamic, dict[str, Part]]:
    """The whole model's example, and its encoder and decoder as entry points, verified to compute the same logits."""
    main = model.main_input_name
    text = main == "input_ids"
    given = _ids(model, BATCH, ENCODER_SEQUENCE) if text else _audio(model, main) if "input" in main[:5] else _pixels(model, None)
    inputs: dict[str, Tensor] = {main: given}
    free: Dynamic = {main: {0: "batch", 1: "encoder_sequence"} if text else {0: "batch"}}
    if text:
        inputs["attention_mask"] = torch.ones_like(given)
        free["attention_mask"] = dict(free[main])
    target = {"decoder_input_ids": _ids(model, BATCH, SEQUENCE)}
    encoder = Encoder(model.get_encoder()).eval()
    hidden = run(encoder, inputs)["last_hidden_state"]
    stated: dict[str, Tensor] = {**target, "encoder_hidden_states": hidden}
    stated_free: Dynamic = {
        "decoder_input_ids": {0: "batch", 1: "sequence"},
        "encoder_hidden_states": {0: "batch", 1: "encoder_sequence"} if text else {0: "batch"},
    }
    if text:
        stated["encoder_attention_mask"] = inputs["attention_mask"]
        stated_free["encoder_attention_mask"] = {0: "batch", 1: "encoder_sequence"}
    decoder = Decoder(_without(model, model.get_encoder())).eval()
    ((name, split),) = run(decoder, stated).items()
    whole = run(model, inputs | target)[name]
    error = (whole - split).abs().max() / whole.abs().max().clamp_min(1e-30)
    if not error <= 1e-5:
        raise BadInput(
            f"{type(model).__name__} cannot be split into encoder and decoder: the parts differ from the whole by {error:.1e}"
        )
    parts = {"encoder": Part(encoder, inputs, free), "decoder": Part(decoder, stated, stated_free)}
    return inputs | target, free | {"decoder_input_ids": stated_free["decoder_input_ids"]}, parts


class Encoder(nn.Module):
    """Inputs -> {"last_hidden_state": [batch, encoder_sequence, d]}."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_features": input_features,
            "input_values": input_values,
            "pixel_values": pixel_values,
        }
        outputs = self.encoder(**{name: tensor for name, tensor in given.items() if tensor is not None})
        return {"last_hidden_state": outputs[0]}


class Decoder(nn.Module):
    """Tokens and the encoder's hidden states -> {"logits": [batch, sequence, vocabulary]}, by the whole model's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        masked = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        from transformers.modeling_outputs import BaseModelOutput

        encoded = BaseModelOutput(last_hidden_state=encoder_hidden_states)  # type: ignore[arg-type]
        outputs = self.model(encoder_outputs=encoded, decoder_input_ids=decoder_input_ids, use_cache=False, **masked)
        return {"logits": outputs["logits"]} if "logits" in outputs else {"last_hidden_state": outputs[0]}


def _without(model: nn.Module, child: nn.Module) -> nn.Module:
    """A copy of the model's modules that shares its tensors and lacks `child`: its weights are not the decoder's."""
    path = next(name for name, module in model.named_modules() if module is child)
    clone = private_copy(model)
    parent, _, name = path.rpartition(".")
    setattr(clone.get_submodule(parent), name, nn.Identity())
    return clone


def _ids(model: Any, *shape: int) -> Tensor:
    """Seeded random token ids without the configuration's special ones."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "image", "decoder_start")}
    flat = {i for value in special for i in (value if isinstance(value, list) else [value])}
    allowed = torch.tensor([i for i in range(_vocabulary(model)) if i not in flat])
    return allowed[torch.randint(len(allowed), shape, generator=torch.Generator().manual_seed(0))]


def _vocabulary(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "vocab_size", 0) or model.config.vocab_size)


def _pixels(model: Any, image_size: int | None) -> Tensor:
    """Normal noise of the size that the vision configuration states, float32 [2, channels, height, width]."""
    config = getattr(model.config, "vision_config", model.config)
    size = image_size or getattr(config, "image_size", None)
    if size is None:
        raise BadInput(f"{type(model).__name__}: config.json states no image_size: give one")
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    return torch.randn(BATCH, channels, height, width, generator=torch.Generator().manual_seed(0))


def _audio(model: Any, name: str) -> Tensor:
    """Normal noise: one second of samples, or as many mel frames as the encoder has positions for."""
    config = model.config
    shape: tuple[int, ...] = (BATCH, 16000)
    if name == "input_features":
        if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
            raise BadInput(f"{type(model).__name__}: the shape of input_features is not in config.json: give example inputs")
        shape = BATCH, config.num_mel_bins, 2 * config.max_source_positions
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
