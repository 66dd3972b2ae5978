"""Writing models: whole or not at all, large weights beside the graph, every file checked before it gets its name."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from lwcompile.errors import BadInput, VerificationError

INLINE_LIMIT = 1_900_000_000
"""Bytes of weights past which they go into a file of their own: protobuf ends at 2 GiB."""


@dataclass
class Draft:
    """Models written into a hidden folder beside their place; `commit` moves them there, leaving the block removes them."""

    folder: Path
    names: list[str]

    def __init__(self, target: Path) -> None:
        self.target, self.names = target, []
        self.folder = target / f".lwcompile-{id(self):x}.partial"

    def __enter__(self) -> Draft:
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"cannot write into {self.target}: {error.strerror or error}; name another directory") from error
        return self

    def __exit__(self, *details: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, model: ir.Model, *, external: bool) -> Path:
        """Serialize one model, with its weights in `<name>.data` if they are many or `external` asks for it."""
        path = self.folder / name
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        try:
            if external or weights > INLINE_LIMIT:
                ir.save(model, path, external_data=f"{name}.data", size_threshold_bytes=1024)
                self.names.append(f"{name}.data")
            else:
                path.write_bytes(ir.to_proto(model).SerializeToString())
        except OSError as error:
            raise BadInput(f"cannot write {self.target / name}: {error.strerror or error}; free some space") from error
        self.names.append(name)
        return path

    def commit(self) -> None:
        """Move every file to its place: weights first, so that a model that is there has its weights."""
        for name in self.names:
            (self.folder / name).replace(self.target / name)


def check_model(path: Path) -> None:
    """onnx's own checker and strict shape inference, on the graph without its weights."""
    try:
        onnx.checker.check_model(str(path))
        onnx.shape_inference.infer_shapes(_graph_only(path), strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the model that was written breaks ONNX's rules: {error}") from error


def _graph_only(path: Path) -> onnx.ModelProto:
    """A model without the bytes of its large tensors, which inference of shapes does not read."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > 4096:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="none")
    return model


def with_attribute(path: Path, attribute: str, value: int) -> Path:
    """A copy of the graph beside `path` with an attribute changed wherever it stands; large weights are shared, not copied."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for a in node.attribute:
            if a.name == attribute:
                a.i = value
    other = path.with_name(f"{attribute}-{value}-{path.name}")
    other.write_bytes(model.SerializeToString())
    return other
