"""The view of the residual stream: embedding, blocks with their sublayers and norms, final norm, head. Found from the graph.

    block            sublayers that share a numbered module path; without paths, mixers followed by what is not a mixer

No class names. Module paths only name and group what the graph has shown.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.residual import NORMS, WEIGHTED, Residuals, Sublayer, shape_of
from lwcompile.site import Site, SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Stream:
    """A residual stream of one entry point: its blocks, each a run of sublayers, in order."""

    entry: str
    prefix: str
    blocks: tuple[tuple[Sublayer, ...], ...]
    final_norm: fx.Node | None

    @property
    def start(self) -> fx.Node:
        return self.blocks[0][0].skip

    @property
    def end(self) -> fx.Node:
        return self.blocks[-1][-1].end


@dataclass
class Structure:
    """Streams and sites of a program. `fused` sites a runtime merges into one product; `tied` sites read one tensor."""

    streams: list[Stream]
    sites: dict[str, Site]
    fused: list[tuple[str, ...]] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)

    def children(self, id: str | None) -> list[Site]:
        return [site for site in self.sites.values() if site.parent == id]

    def of_kind(self, *kinds: SiteKind) -> list[Site]:
        return [site for site in self.sites.values() if site.kind in kinds]


def find_structure(program: Program) -> Structure:
    """Streams and sites of every entry point. A model without a residual stream has no streams, and still its weights' sites."""
    structure = Structure([], {})
    several = len(program.entries) > 1
    for entry, graph in program.entries.items():
        _Finder(entry, graph, f"{entry}." if several else "").fill(structure)
    by_weight: dict[str, list[str]] = defaultdict(list)
    for site in structure.sites.values():
        if site.weight is not None and site.kind in ("linear", "embedding"):
            by_weight[program.entries[site.entry].tensors[site.weight]].append(site.id)
    structure.tied = [tuple(ids) for ids in by_weight.values() if len(ids) > 1]
    return structure


class _Finder(Residuals):
    """The sites of one graph."""

    def __init__(self, entry: str, graph: ModelGraph, prefix: str) -> None:
        super().__init__(graph)
        self.entry, self.prefix = entry, prefix

    def fill(self, structure: Structure) -> None:
        spines = self.spines()
        claimed: set[fx.Node] = set()
        streams: list[Stream] = []
        for i, spine in enumerate(spines):
            sublayers = self.sublayers(spine)
            prefix = self.prefix + (f"{self._tower(spines, i)}." if len(spines) > 1 else "")
            norm = None if sublayers[-1].post_norm else self._norm_after(sublayers[-1].end)
            streams.append(Stream(self.entry, prefix, tuple(map(tuple, _blocks(sublayers))), norm))
        structure.streams += streams
        for stream in streams:
            for number, block in enumerate(stream.blocks):
                claimed |= self._block_sites(structure, stream, number, block)
            if stream.final_norm is not None:
                claimed.add(stream.final_norm)
                self._norm_site(structure, f"{stream.prefix}final_norm", None, stream.final_norm)
        self._loose_sites(structure, streams, claimed)

    def _tower(self, spines: Sequence[Sequence[tuple[fx.Node, ...]]], i: int) -> str:
        """The name of one of several streams: where their module paths part, else its number."""
        paths = [_common_path(n.meta.get("path", "") for add, _, _ in spine for n in [add]) for spine in spines]
        parts = [path.split(".") for path in paths]
        for level in range(min(map(len, parts))):
            names = [p[level] for p in parts]
            if len(set(names)) == len(names):
                return names[i]
        return f"stream{i}"

    def _block_sites(self, structure: Structure, stream: Stream, number: int, block: Sequence[Sublayer]) -> set[fx.Node]:
        id, claimed = f"{stream.prefix}block{number}", set()
        end = block[-1].end
        structure.sites[id] = Site(id, "block", None, self.entry, _path(block), end.name, block[0].skip.name, end.name)
        names = Counter[str]()
        for sublayer in block:
            base = f"cross_{sublayer.kind}" if sublayer.cross else str(sublayer.kind)
            names[base] += 1
            sub = f"{id}.{base}{'' if names[base] == 1 else names[base]}"
            claimed |= sublayer.nodes
            own_norm = {sublayer.end} if sublayer.post_norm and sublayer.end not in claimed else set()
            counted = self._parameters(sublayer.nodes | own_norm)
            structure.sites[sub] = Site(
                sub, sublayer.kind, id, self.entry, _path([sublayer]), sublayer.branch.name,
                sublayer.skip.name, sublayer.end.name, parameters=counted,
            )  # fmt: skip
            self._weight_sites(structure, sub, sorted(sublayer.nodes, key=self.index.__getitem__), sublayer.kind)
            if sublayer.post_norm and sublayer.end not in claimed:
                claimed.add(sublayer.end)
                self._norm_site(structure, f"{sub}.post_norm", sub, sublayer.end)
        total = self._parameters({n for s in block for n in s.nodes} | {s.end for s in block})
        structure.sites[id] = dataclasses.replace(structure.sites[id], parameters=total)
        return claimed

    def _weight_sites(self, structure: Structure, parent: str, nodes: Iterable[fx.Node], kind: str = "") -> None:
        by_input: dict[fx.Node, list[str]] = defaultdict(list)
        for node in nodes:
            if node.target in NORMS:
                self._norm_site(structure, self._unique(structure, f"{parent}.{_leaf(node, 'norm')}"), parent, node)
            elif node.target is aten.linear.default and (site := self._weight_site(structure, parent, node, "linear")):
                by_input[node.args[0]].append(site.id)  # type: ignore[index]
            elif node.target is aten.embedding.default:
                self._weight_site(structure, parent, node, "embedding")
        if kind in ("attention", "mlp"):
            structure.fused += [tuple(ids) for ids in by_input.values() if len(ids) > 1]

    def _weight_site(self, structure: Structure, parent: str | None, node: fx.Node, kind: SiteKind, id: str = "") -> Site | None:
        stored = node.args[1] if kind == "linear" else node.args[0]
        if not isinstance(stored, fx.Node) or stored.op != "get_attr" or len(shape_of(stored)) != 2:
            return None
        id = self._unique(structure, id or f"{parent}.{_leaf(node, kind)}")
        name, shape = str(stored.target), shape_of(stored)
        count = self._parameters({node})
        site = Site(id, kind, parent, self.entry, node.meta.get("path", ""), node.name, "", "", name, shape, count)
        structure.sites[id] = site
        return site

    def _norm_site(self, structure: Structure, id: str, parent: str | None, node: fx.Node) -> None:
        weight = node.args[2] if len(node.args) > 2 else None
        name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
        shape = shape_of(weight) if isinstance(weight, fx.Node) else ()
        path, count = node.meta.get("path", ""), self._parameters({node})
        structure.sites[id] = Site(id, "norm", parent, self.entry, path, node.name, "", "", name, shape, count)

    def _loose_sites(self, structure: Structure, streams: Sequence[Stream], claimed: set[fx.Node]) -> None:
        """Weights outside every block: embeddings, stems before a stream, heads after it."""
        rest = [n for n in self.nodes if n not in claimed]
        embeddings = [n for n in rest if n.target is aten.embedding.default]
        largest = max(embeddings, key=_reads_input_and_rows, default=None)
        for node in embeddings:
            alone = node is largest
            self._weight_site(
                structure, None, node, "embedding", self.prefix + ("embedding" if alone else _leaf(node, "embedding"))
            )
        linears = [n for n in rest if n.target is aten.linear.default]
        after = [n for n in linears if any(self.is_above(s.end, n) for s in streams)]
        for node in linears:
            where = "head" if node in after else "stem" if streams else "body"
            single = where == "head" and len(after) == 1
            self._weight_site(
                structure, None, node, "linear", self.prefix + (where if single else f"{where}.{_leaf(node, 'linear')}")
            )
        for node in rest:
            if node.target in NORMS:
                self._norm_site(structure, self._unique(structure, f"{self.prefix}{_leaf(node, 'norm')}"), None, node)

    def _unique(self, structure: Structure, id: str) -> str:
        if id not in structure.sites:
            return id
        return next(other for i in range(2, 1 << 20) if (other := f"{id}{i}") not in structure.sites)

    def _parameters(self, nodes: Iterable[fx.Node]) -> int:
        keys: set[str] = set()
        for node in nodes:
            keys |= {self.graph.tensors[str(s.target)] for s in node.all_input_nodes if s.op == "get_attr"}
        store = self.graph.store
        return sum(store.nbytes(k) // store.dtype(k).itemsize for k in keys if store.dtype(k).is_floating_point)


# --- names


_RESHAPING = (aten.reshape.default, aten._to_copy.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor)


def _reads_input_and_rows(embedding: fx.Node) -> tuple[bool, bool, int]:
    """The token embedding reads `input_ids` where an input is called that, else an input as it is; and has the most rows."""
    rows, ids = shape_of(embedding.args[0]), embedding.args[1]
    while isinstance(ids, fx.Node) and ids.target in _RESHAPING:
        ids = ids.args[0]
    given = isinstance(ids, fx.Node) and ids.op == "placeholder"
    return given and str(ids.target).endswith("input_ids"), given, rows[0] if rows else 0  # type: ignore[union-attr]


def _leaf(node: fx.Node, fallback: str) -> str:
    """A short name for a weight: the last word of the stored tensor's name, with the word before if it is a number.

    What stores nothing is called by the last word of its module's path, so that a norm whose gain was folded away keeps its name.
    """
    stored = next((s for s in node.all_input_nodes if s.op == "get_attr"), None)
    if stored is None:
        word = node.meta.get("path", "").rpartition(".")[2]
        return fallback if not word or word.isdigit() else word
    words = [w for w in str(stored.target).split(".") if w not in ("weight", "T", "folded", "bias")]
    if not words or words[-1].isdigit():
        return "_".join([fallback, *words[-1:]])
    return words[-1]


def _common_path(paths: Iterable[str]) -> str:
    split = [p.split(".") for p in paths if p]
    if not split:
        return ""
    common: list[str] = []
    for level in zip(*split):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _path(sublayers: Iterable[Sublayer]) -> str:
    return _common_path(n.meta.get("path", "") for s in sublayers for n in s.nodes if n.target in WEIGHTED)


def _numbered(path: str) -> str:
    """The path up to its last number: the module that repeats."""
    last = None
    for match in re.finditer(r"(?:^|\.)\d+(?=\.|$)", path):
        last = match.end()
    return path[:last] if last else ""


def _blocks(sublayers: Sequence[Sublayer]) -> list[list[Sublayer]]:
    """Group by the numbered module path if every sublayer has one and each group is one run; else by the order of kinds."""
    keys = [_numbered(_path([s])) for s in sublayers]
    runs: list[list[Sublayer]] = []
    for i, sublayer in enumerate(sublayers):
        if i and keys[i] == keys[i - 1]:
            runs[-1].append(sublayer)
        else:
            runs.append([sublayer])
    shared_weights = len(set(keys)) == 1
    if all(keys) and len(runs) == len(set(keys)) and not shared_weights and len(runs) < len(sublayers):
        return runs
    blocks: list[list[Sublayer]] = []
    branches = Counter(s.add for s in sublayers)
    for i, sublayer in enumerate(sublayers):
        parallel = i > 0 and sublayer.add is sublayers[i - 1].add
        mixer = sublayer.kind not in ("mlp", "moe")
        fresh = i == 0 or (mixer and sublayers[i - 1].kind in ("mlp", "moe") and not parallel)
        if not fresh and sublayer.kind in ("mlp", "moe") and not parallel:
            fresh = all(s.kind in ("mlp", "moe") for s in blocks[-1])
        if i and not parallel:  # an add of several branches is a block of its own
            fresh = fresh or branches[sublayer.add] > 1 or branches[sublayers[i - 1].add] > 1
        blocks.append([sublayer]) if fresh else blocks[-1].append(sublayer)
    return blocks
