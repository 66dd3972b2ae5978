"""A program as a Python package: its graphs as straight-line functions, the kernels they call, and its weights.

__init__.py          load()
model.py, ...        as they stand in `runtime/`
graph_<entry>.py     one function an entry point, written here
kernels/, tuning/    as they stand beside this file
model.json           inputs and outputs, the form of packed weights, which tensors follow the activations' dtype
weights.safetensors  dense tensors, and words, scales and zero points (`packing`), each once
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from lwcompile.attention import HYBRID, RELU, SDPA
from lwcompile.backends.triton.fusion import ABSORB, DEQUANTIZE, Group, find_groups
from lwcompile.backends.triton.packing import repack
from lwcompile.decode import PAST
from lwcompile.errors import Refused
from lwcompile.generate import Roles
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.program import Program
from lwcompile.residual import shape_of
from lwcompile.serialize import target_name

aten = torch.ops.aten
HERE = Path(__file__).parent
FOLLOWS = (aten.linear.default, aten.embedding.default, aten.rms_norm.default, aten.layer_norm.default)
NAMESPACES = "aten", "prims"
OWN = {HYBRID: "hybrid_attention", ABSORB: "absorb_keys", RELU: "relu_attention"}
"""Operators of this project but DEQUANTIZE, by the package's functions for them."""

_INFIX = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "pow": "**",
          "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}  # fmt: skip
_TAKEN = {"w", "aten", "torch", "math", "operator", "linear", "gated", "embedding", "normalize", "add_normalize", "rotary",
          "attention", "Norm", "dense_linear", "attend", "append", "places", "last", *OWN.values()}  # fmt: skip


@dataclass
class Stored:
    """What the package stores: tensors by name, each once; the form of packed ones; names of those that follow the dtype."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, dict[str, int]] = field(default_factory=dict)
    cast: set[str] = field(default_factory=set)
    _names: dict[tuple[str, ...], str] = field(default_factory=dict)

    def dense(self, graph: ModelGraph, node: fx.Node) -> str:
        """The name that a stored tensor is read under."""
        key = graph.tensors[str(node.target)]
        if (key,) not in self._names:
            self._names[key,] = str(node.target)
            self.tensors[str(node.target)] = graph.store[key]
        return self._names[key,]

    def joined(self, graph: ModelGraph, nodes: Sequence[fx.Node]) -> str:
        """Dense vectors one after the other."""
        key = tuple(graph.tensors[str(n.target)] for n in nodes)
        if key not in self._names:
            self._names[key] = " + ".join(str(n.target) for n in nodes)
            self.tensors[self._names[key]] = torch.cat([graph.store[k] for k in key])
        return self._names[key]

    def weight(self, graph: ModelGraph, calls: Sequence[fx.Node]) -> str:
        """The name of one packed weight, or of several, whose rows then follow each other."""
        reads = [[n for n in call.args[:3] if isinstance(n, fx.Node)] for call in calls]
        key = tuple(graph.tensors[str(n.target)] for parts in reads for n in parts)
        if key in self._names:
            return self._names[key]
        name = " + ".join(str(parts[0].target).removesuffix(".codes") for parts in reads)
        self._names[key] = name
        bits, group, in_features = calls[0].args[3:]
        made: dict[str, list[Tensor]] = {"words": [], "scale": [], "zero": []}
        for parts in reads:
            codes, scale, *zero = (graph.tensor(str(n.target)) for n in parts)
            words, unpacked = repack(codes, zero[0] if zero else None, bits, in_features, scale.shape[1])  # type: ignore[arg-type]
            for part, tensor in (("words", words), ("scale", scale), ("zero", unpacked)):
                made[part] += [] if tensor is None else [tensor]
        self.tensors |= {f"{name}.{part}": torch.cat(tensors).contiguous() for part, tensors in made.items() if tensors}
        self.packed[name] = {"bits": bits, "group": group, "in_features": in_features}  # type: ignore[dict-item]
        return name


@dataclass(frozen=True)
class _Statement:
    """A line of the function: what it makes, what it reads, and the call or the kernel that it is."""

    place: int
    path: str
    makes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    of: Group | fx.Node


class Function:
    """One graph as Python source.

    A decode graph's takes two arguments more. places: int64 [S], where new entries are written into caches that have room for them;
    they are joined anew if it is None, and always where `growing` says why. last: logits of the last position alone, where that saves
    the product of the others.
    """

    def __init__(self, graph: ModelGraph, stored: Stored) -> None:
        self.graph, self.stored = graph, stored
        self.decodes = any(name.startswith(PAST) for name in graph.input_nodes())
        self.appends: dict[fx.Node, fx.Node] = {}
        self.growing: str | None = None
        self.head: Group | None = None
        self.names = {n: n.name if n.name not in _TAKEN else f"{n.name}_" for n in graph.graph.nodes}

    def source(self, entry: str, model: str) -> str:
        groups = find_groups(self.graph)
        inside = {n for g in groups for n in g.nodes} | {r for g in groups for r in g.makes}
        order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        statements = [_Statement(order[g.at], _path(g.root), g.makes, self.reads(g), g) for g in groups]
        for node in self.graph.graph.nodes:
            if node.op == "call_function" and node not in inside and not self.is_inline(node):
                reads = tuple(n for n in node.all_input_nodes if not self.is_inline(n))
                statements.append(_Statement(order[node], _path(node), (node,), reads, node))
        outputs = list(self.graph.output_node.args[0])  # type: ignore[arg-type]
        kept = _needed(sorted(statements, key=lambda s: s.place), {n for n in outputs if isinstance(n, fx.Node)})
        self.appends = self.caches()
        self.growing = self.why_growing(kept)
        if self.growing is not None:
            self.appends = {}
        self.head = next((g for g in groups if self.decodes and g.root is outputs[0] and _is_head(g)), None)
        body = list(self.body(kept, {n for n in outputs if isinstance(n, fx.Node)}))
        arguments = [self.names[n] for n in self.graph.input_nodes().values()] + ["places=None", "last=False"] * self.decodes
        lines = [
            f'"""{model}: the entry point `{entry}`, one line a call; kernels where `kernels/` has one, torch elsewhere."""',
            "", "from __future__ import annotations", "",
            *(f"import {module}" for module in ("math", "operator") if any(f"{module}." in line for line in body)),
            "import torch", "",
            "from .dense import append, attend, dense_linear, relu_attention", "from .kernels.attention import attention",
            "from .kernels.embedding import embedding", "from .kernels.linear import gated, linear",
            "from .kernels.linear_attention import absorb_keys, hybrid_attention",
            "from .kernels.norm import Norm, add_normalize, normalize", "from .kernels.rotary import rotary", "",
            "aten = torch.ops.aten", "", "",
            f"def {entry}({', '.join(['w', *arguments])}):",
            f'    """{", ".join(self.graph.outputs)}"""',
            *body,
            f"    return ({', '.join(self.render(o) for o in outputs)},)", "",
        ]  # fmt: skip
        return "\n".join(lines)

    def body(self, statements: Sequence[_Statement], outputs: set[fx.Node]) -> Iterable[str]:
        """The lines, under a heading for each module; values are let go at the end of the module that reads them last."""
        last = {node: i for i, s in enumerate(statements) for node in (*s.reads, *s.makes)}
        dead: list[str] = []
        for i, s in enumerate(statements):
            if i == 0 or s.path != statements[i - 1].path:
                if dead:
                    yield f"    del {', '.join(dead)}"
                    dead = []
                yield f"    # --- {s.path or 'around the blocks'}"
            yield f"    {self.kernel(s.of) if isinstance(s.of, Group) else self.call(s.of)}"
            touched = dict.fromkeys((*s.makes, *s.reads))
            dead += [self.names[n] for n in touched if last[n] == i and n not in outputs and n.op == "call_function"]

    # --- caches

    def caches(self) -> dict[fx.Node, fx.Node]:
        """What appends new entries to a cache, with that cache: cat([past, new], 2)."""
        pasts = {node for name, node in self.graph.input_nodes().items() if name.startswith(PAST)}
        found = {}
        for node in iterate_calls(self.graph, aten.cat.default):
            pieces, *dim = node.args
            if len(pieces) == 2 and pieces[0] in pasts and pieces[1] not in pasts and dim == [2]:  # type: ignore[arg-type, index]
                found[node] = pieces[0]  # type: ignore[index]
        return found

    def why_growing(self, kept: Sequence[_Statement]) -> str | None:
        """Why `appends` cannot write in place: something else reads a cache, or how long it is, or not every cache is one."""
        inputs = self.graph.input_nodes()
        pasts = [node for name, node in inputs.items() if name.startswith(PAST)]
        if not pasts:
            return None
        for past, made in zip(pasts, list(self.graph.output_node.args[0])[len(self.graph.outputs) - len(pasts) :]):  # type: ignore[arg-type]
            if self.appends.get(made) is not past:  # type: ignore[arg-type]
                return f"{past.target} is more than appended to"
        long = {*pasts, *self.appends, *(inputs[i.name] for i in self.graph.inputs if i.dynamic.get(1) == "total")}
        for s in kept:
            attends = isinstance(s.of, Group) and s.of.kernel == "attention" and s.of.args["key"] in self.appends
            taken = long.difference(pasts) if attends else {self.appends.get(s.makes[0])}
            if others := [n.name for n in s.reads if n in long - taken]:
                return f"{s.makes[0].name} reads {others[0]}, which is as long as the sequence"
        return None

    # --- calls

    def reads(self, group: Group) -> tuple[fx.Node, ...]:
        found = [n for n in group.args.values() if isinstance(n, fx.Node)]
        return tuple(n for n in found if not self.is_inline(n) and n not in group.makes)

    def kernel(self, group: Group) -> str:
        a, target = group.args, self.names[group.root]
        v = {key: self.render(value) for key, value in a.items() if key not in ("norm", "weights", "biases", "weight", "up")}
        if group is self.head:
            v["x"] = f"{v['x']}[:, -1:] if last else {v['x']}"
        norm = self.norm(a["norm"]) if "norm" in a else ""
        optional = [f"norm={norm}"] if norm else []
        optional += [f"activation={a['activation']!r}"] if group.kernel == "linear" and a.get("activation") else []
        optional += [f"residual={v['residual']}"] if a.get("residual") is not None else []
        if group.kernel == "linear":
            bias = [self.read(a["bias"])] if a["bias"] is not None else []
            call = f"linear({', '.join([v['x'], self.weight(a['weight']), *bias, *optional])})"
        elif group.kernel == "linears":
            target = ", ".join(self.names[n] for n in group.nodes)
            biases = [self.joined(a["biases"])] if a["biases"][0] is not None else []
            weight = f"w[{self.stored.weight(self.graph, a['weights'])!r}]"
            rows = [n.meta["val"].shape[-1] for n in group.nodes]
            call = f"linear({', '.join([v['x'], weight, *biases, *optional])}).split({rows}, -1)"
        elif group.kernel == "gated":
            both = (self.weight(a["weight"]), self.weight(a["up"]))
            call = f"gated({', '.join([v['x'], *both, repr(a['activation']), *optional])})"
        elif group.kernel == "embedding":
            call = f"embedding({self.weight(a['weight'])}, {v['ids']}, w.dtype)"
        elif group.kernel == "norm" and "total" in a:
            target = f"{self.names[a['total']]}, {target}"
            call = f"add_normalize({v['x']}, {v['branch']}, {norm})"
        elif group.kernel == "norm":
            call = f"normalize({v['x']}, {norm})"
        elif group.kernel == "rotary":
            call = f"rotary({v['x']}, {v['cos']}, {v['sin']})"
        elif group.kernel in ("linear_attention", "absorb"):
            call = f"{OWN[group.root.target]}({', '.join(v.values())})"  # type: ignore[index]
        else:
            places = ["places"] if a["key"] in self.appends else []
            options = [f"{name}={v[name]}" for name in ("causal", "window", "sinks", "scale")]
            call = f"attention({', '.join([v['query'], v['key'], v['value'], v['padding'], *places, *options])})"
        return f"{target} = {call}"

    def call(self, node: fx.Node) -> str:
        return f"{self.names[node]} = {self.value(node)}"

    def value(self, node: fx.Node) -> str:
        """A call of torch, or arithmetic on sizes."""
        if node in self.appends:
            past, new = node.args[0]  # type: ignore[misc]
            return f"append({self.render(past)}, {self.render(new)}, places)"
        args = [self.render(a) for a in node.args]
        kwargs = {key: value for key, value in node.kwargs.items() if key != "pin_memory"}
        named = [f"{key}={'w.device' if key == 'device' else self.render(value)}" for key, value in kwargs.items()]
        if node.target in FOLLOWS:
            self.stored.cast |= {self.stored.dense(self.graph, n) for n in node.all_input_nodes if n.op == "get_attr"}
        if node.target is aten.linear.default:
            return f"dense_linear({', '.join(args + named)})"
        if node.target is SDPA:
            return f"attend({', '.join(args + named)})"
        if node.target in OWN:
            return f"{OWN[node.target]}({', '.join(args + named)})"  # type: ignore[index]
        name = target_name(node.target)
        module, _, function = name.partition(".")
        if module == "operator" and function in _INFIX:
            return f"{args[0]} {_INFIX[function]} {args[1]}"
        if module == "operator" and function == "getitem":
            return f"{args[0]}[{args[1]}]"
        if module == "builtins":
            name = function
        elif module not in ("aten", "math", "operator", "torch"):
            name = f"torch.ops.{name}"
        return f"{name}({', '.join(args + named)})"

    # --- values

    def is_inline(self, node: fx.Node) -> bool:
        """Stored tensors and packed weights are read where they are used."""
        return node.op == "get_attr" or node.target is DEQUANTIZE

    def weight(self, node: fx.Node) -> str:
        return f"w[{self.stored.weight(self.graph, [node])!r}]"

    def joined(self, vectors: Sequence[fx.Node]) -> str:
        name = self.stored.joined(self.graph, vectors)
        self.stored.cast.add(name)
        return f"w[{name!r}]"

    def norm(self, norm: Mapping[str, Any]) -> str:
        return f"Norm({norm['kind']!r}, {self.read(norm['gain'])}, {self.read(norm['shift'])}, {norm['eps']!r})"

    def read(self, node: fx.Node | None) -> str:
        """A stored tensor that follows the activations' dtype."""
        if node is None:
            return "None"
        if node.op != "get_attr":
            return self.render(node)
        name = self.stored.dense(self.graph, node)
        self.stored.cast.add(name)
        return f"w[{name!r}]"

    def render(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return f"w[{self.stored.dense(self.graph, value)!r}]"
            return f"{self.weight(value)}.dequantize()" if value.target is DEQUANTIZE else self.names[value]
        if isinstance(value, list | tuple):
            inner = ", ".join(self.render(v) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return f"float('{value}')"
        return str(value) if isinstance(value, torch.dtype | torch.layout | torch.memory_format) else repr(value)


def _path(node: fx.Node) -> str:
    """The module that a call belongs to, up to its last number: what repeats."""
    parts = node.meta.get("path", "").split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else ""


def _is_head(group: Group) -> bool:
    """A product of [B, S, K] alone, each of whose rows is made of one row."""
    return group.kernel == "linear" and group.args["residual"] is None and len(shape_of(group.root)) == 3


def _needed(statements: Sequence[_Statement], wanted: set[fx.Node]) -> list[_Statement]:
    kept = []
    for s in reversed(statements):
        if wanted.intersection(s.makes):
            wanted = wanted.union(s.reads)
            kept.append(s)
    return kept[::-1]


def reasons_against(graph: ModelGraph) -> list[str]:
    """Why a graph cannot be written; empty if it can."""
    reasons = []
    for node in (n for n in graph.graph.nodes if n.op == "call_function"):
        if node.target is DEQUANTIZE:
            if any(n.op != "get_attr" for n in node.all_input_nodes):
                reasons.append(f"{node.name} unpacks codes that are computed")
        elif (
            isinstance(node.target, torch._ops.OpOverload) and node.target not in OWN and node.target.namespace not in NAMESPACES
        ):
            reasons.append(f"{node.name} calls {node.target}, which is neither torch's own nor has a kernel here")
    return reasons


def write_package(program: Program, folder: Path) -> None:
    """Write the whole package into `folder`, which is made."""
    stored = write_source(program, folder)
    save_file({name: tensor.contiguous() for name, tensor in stored.tensors.items()}, folder / "weights.safetensors")


def write_source(program: Program, folder: Path) -> Stored:
    """Write all of the package but its weights, which are returned; where packed ones lie on the meta device, only their shapes."""
    stored, entries = Stored(), {}
    folder.mkdir(parents=True)
    for name, graph in program.entries.items():
        if not name.isidentifier():
            raise Refused(f"the entry point {name!r} is no name of a function")
        graph = graph.copy()
        graph.propagate()
        function = Function(graph, stored)
        (folder / f"graph_{name}.py").write_text(function.source(name, program.name), encoding="utf-8")
        entries[name] = _describe(graph, name) | ({"growing": function.growing} if name == "decode" else {})
    shutil.copytree(HERE / "tuning", folder / "tuning")
    (folder / "kernels").mkdir()
    for file in sorted((HERE / "kernels").glob("*.py")):
        (folder / "kernels" / file.name).write_text(_rooted(file, "."), encoding="utf-8")
    for file in (HERE / "runtime" / f"{name}.py" for name in ("model", "decoding", "dense")):
        (folder / file.name).write_text(_rooted(file, ".kernels."), encoding="utf-8")
    (folder / "__init__.py").write_text(_init(program.name), encoding="utf-8")
    described = {"entries": entries, "packed": stored.packed, "cast": sorted(stored.cast)}
    (folder / "model.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    return stored


def _rooted(file: Path, kernels: str) -> str:
    """A file's text with what it imports of this project taken from where the package has it."""
    text = file.read_text(encoding="utf-8").replace("from lwcompile.backends.triton.kernels.", f"from {kernels}")
    return text.replace("from lwcompile.backends.triton.runtime.", "from .")


def _describe(graph: ModelGraph, entry: str) -> dict[str, Any]:
    inputs = [
        {"name": i.name, "shape": list(i.shape), "dtype": str(i.dtype).removeprefix("torch."), "free": sorted(i.dynamic)}
        for i in graph.inputs
    ]
    described: dict[str, Any] = {"inputs": inputs, "outputs": graph.outputs}
    if entry == "decode":
        roles = Roles.of(graph)
        described["roles"] = {"tokens": roles.tokens, "padding": roles.padding, "positions": roles.positions}
    return described


def _init(name: str) -> str:
    return (
        f'"""{name}, with its packed weights and the Triton kernels that read them.\n\n'
        '    model = load("cuda", torch.bfloat16)\n'
        "    model.generate(input_ids)\n\n"
        "On a GPU, generation replays a CUDA graph; where it cannot, `model.why_growing` says why.\n"
        "Needs torch, triton and safetensors. Without a GPU it runs in Triton's interpreter, slowly and in float32:\n"
        'set TRITON_INTERPRET=1 before Python starts, and load("cpu").\n'
        '"""\n\nfrom .model import Model, load\n\n__all__ = ["Model", "load"]\n'
    )
