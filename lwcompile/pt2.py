"""Loading a `.pt2` archive of torch.export without running anything that is in it.

torch 2.13's loader unpickles weights, constants and sample inputs that say so, and evaluates symbolic expressions. So
the archive is scanned first: pickled weights and objects, compiled code, and expressions that are more than arithmetic
are refused. Sample inputs are always pickled; they pass if torch's restricted unpickler, which knows only tensors and
containers, reads them.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lwcompile.errors import BadInput

HOW = 'save it again with torch.export.save(torch.export.export(model, args), "model.pt2") from a model of plain tensors'

_CODE = re.compile(r"(^|/)data/(aotinductor|mtia|executorch)/|\.(so|cubin|dll|py|pyc)$")
_LEGACY = re.compile(r"(^|/)data/(weights|constants)/[^/]*\.pt$|(^|/)(serialized_state_dict|serialized_constants)\.pt$")
_OBJECT = re.compile(r"(^|/)data/constants/(custom_obj|opaque_obj)_")
_ARITHMETIC = (
    ast.Expression, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Call, ast.Compare, ast.BoolOp,
    ast.keyword, ast.Load, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_FUNCTIONS = re.compile(
    r"s\d+|u\d+|zuf\d+|[sS]ymbol|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|CeilToInt|FloorToInt|RoundToInt|TruncToInt|IntTrueDiv"
    r"|FloatTrueDiv|ToFloat|ModularIndexing|PowByNatural|FloatPow|LShift|RShift|Where|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not"
    r"|Add|Mul|Pow|Integer|Float|Rational|Identity|IsNonOverlappingAndDenseIndicator|floor|ceiling|oo|int_oo|true|false|True|False"
)


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """The exported program in `path`; `BadInput` where the archive is damaged or would run code."""
    scan(path)
    try:
        return torch.export.load(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{path} cannot be loaded as an exported program ({reason}): {HOW}") from error


def scan(path: Path) -> None:
    """Refuse an archive whose loading would unpickle objects or run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            _scan(path, archive)
    except zipfile.BadZipFile:
        raise BadInput(f"{path} is no .pt2 archive, or is truncated: {HOW}") from None


def _scan(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if min((entry.header_offset for entry in archive.infolist()), default=1) != 0:
        raise BadInput(f"{path} is truncated or damaged: {HOW}")  # what zipfile found is an archive inside it
    if len(set(names)) != len(names):
        raise BadInput(f"{path} holds two entries of one name, so what is scanned may not be what is loaded: {HOW}")
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise BadInput(f"{path} is a pickle (torch.save), which is never loaded: {HOW}")
    if not any("/models/" in f"/{name}" and name.endswith(".json") for name in names):
        raise BadInput(f"{path} holds no exported program (models/*.json): {HOW}")
    for name in names:
        if _CODE.search(name):
            raise BadInput(f"{path} holds compiled code ({name}), which is never loaded: {HOW}")
        if _LEGACY.search(name) or _OBJECT.search(name):
            raise BadInput(f"{path} holds a pickled entry ({name}), which is never loaded: {HOW}")
        if name.endswith("_config.json"):
            _require_raw(path, name, _json(path, archive, name))
        elif "/models/" in f"/{name}" and name.endswith(".json"):
            _require_arithmetic(path, _json(path, archive, name))
        elif "/data/sample_inputs/" in f"/{name}":
            _require_tensors(path, name, archive.read(name))


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    try:
        return json.loads(archive.read(name))
    except ValueError as error:
        raise BadInput(f"{path}: the entry {name} is not JSON ({error}): {HOW}") from None


def _require_raw(path: Path, name: str, config: dict[str, Any]) -> None:
    pickled = [tensor for tensor, payload in config.get("config", {}).items() if payload.get("use_pickle")]
    if pickled:
        raise BadInput(f"{path} holds pickled tensors ({pickled[0]}, in {name}), which are never loaded: {HOW}")


def _require_tensors(path: Path, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        raise BadInput(
            f"{path}: its sample inputs ({name}) are pickled objects other than tensors, which are never loaded: set "
            "exported._example_inputs = None and save it again, or export it with tensors as inputs"
        ) from None


def _require_arithmetic(path: Path, model: Any) -> None:
    for expression in _expressions(model):
        try:
            nodes = list(ast.walk(ast.parse(expression, mode="eval")))
        except (SyntaxError, ValueError, RecursionError):
            raise BadInput(f"{path}: the size {expression[:60]!r} is not plain arithmetic: {HOW}") from None
        names = [node.id for node in nodes if isinstance(node, ast.Name)]
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        arithmetic = all(isinstance(node, _ARITHMETIC) for node in nodes)
        plain = all(isinstance(c, int | float) or (isinstance(c, str) and c.isidentifier()) for c in constants)
        if not (arithmetic and plain and all(map(_FUNCTIONS.fullmatch, names))):
            raise BadInput(f"{path}: the size {expression[:60]!r} is not plain arithmetic, and is not evaluated: {HOW}")


def _expressions(value: Any) -> Iterator[str]:
    """Every symbolic expression in the program's JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "expr_str" and isinstance(inner, str):
                yield inner
            else:
                yield from _expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _expressions(inner)
