"""The view of the residual stream: embedding, blocks with their sublayers and norms, final norm, head. Found from the graph.

    residual add     `a + b` of one shape where `a` is an ancestor of `b` and a weight lies between: b is a branch off the stream
    spine            the longest chain of residual adds, each one's skip reaching back to the one before; what is nested in a
                     branch hangs off it. Removed, the next longest chain is the next stream (a second tower).
    sublayer         one branch: attention (weighted mixing over positions), moe (routing), mlp, or just `sublayer`
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
from torch import Tensor, fx

from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.site import Site, SiteKind

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
WEIGHTED = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.convolution.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
ROUTING = (aten.topk.default, aten.histc.default, aten.scatter.value, aten.one_hot.default, aten.scatter_.value)


@dataclass(frozen=True)
class Sublayer:
    """One branch off the residual stream: `end = skip + branch`, or `end = norm(skip + branch)` when post-norm."""

    kind: SiteKind
    branch: fx.Node
    add: fx.Node
    skip: fx.Node
    end: fx.Node
    nodes: frozenset[fx.Node]
    cross: bool = False

    @property
    def post_norm(self) -> bool:
        return self.end is not self.add


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


class _Finder:
    """The search in one graph. Ancestor sets are bit masks over node positions: a thousand blocks fit."""

    def __init__(self, entry: str, graph: ModelGraph, prefix: str) -> None:
        self.entry, self.graph, self.prefix = entry, graph, prefix
        self.nodes = graph.nodes
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for node in self.nodes:
            mask = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                mask |= self.above[i] | (1 << i)
            self.above.append(mask)
        self.weights_mask = sum(1 << i for i, node in enumerate(self.nodes) if self._is_weighted(node))

    def _is_weighted(self, node: fx.Node) -> bool:
        """Whether a call multiplies by a stored tensor of two or more dimensions."""
        if node.op != "call_function" or node.target is aten.embedding.default:
            return False
        if node.target in WEIGHTED:
            return True
        name = str(node.target)
        if not any(word in name for word in ("mm", "matmul", "conv", "einsum", "linear")):
            return False
        return any(s.op == "get_attr" and len(_shape(s)) >= 2 for s in node.all_input_nodes)

    def is_above(self, a: fx.Node, b: fx.Node) -> bool:
        return bool(self.above[self.index[b]] >> self.index[a] & 1)

    def _weights_between(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether a weighted call lies on a path from a to b (b included)."""
        i, j = self.index[a], self.index[b]
        candidates = self.weights_mask & (self.above[j] | (1 << j))
        while candidates:
            low = (candidates & -candidates).bit_length() - 1
            if self.above[low] >> i & 1:
                return True
            candidates &= candidates - 1
        return False

    # --- residual adds and spines

    def residual_adds(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """add -> (skip, branch)."""
        found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in self.nodes:
            if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
                continue
            a, b = node.args[:2]
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or _shape(a) != _shape(b) or len(_shape(a)) < 2:
                continue
            for skip, branch in ((a, b), (b, a)):
                if self.is_above(skip, branch):
                    if self._weights_between(skip, branch):
                        found[node] = (skip, branch)
                elif skip in found and self.is_above(found[skip][0], branch) and self._weights_between(found[skip][0], branch):
                    found[node] = (skip, branch)
                if node in found:
                    break
        return found

    def spines(self) -> list[list[tuple[fx.Node, fx.Node, fx.Node]]]:
        """Chains of (add, skip, branch), the longest first, none nested in a branch of an earlier one."""
        adds = self.residual_adds()
        chains: list[list[tuple[fx.Node, fx.Node, fx.Node]]] = []
        while adds:
            before: dict[fx.Node, fx.Node | None] = {}
            length: dict[fx.Node, int] = {}
            for add, (skip, _) in adds.items():
                reach = self.above[self.index[skip]] | (1 << self.index[skip])
                before[add] = next((a for a in reversed(list(length)) if reach >> self.index[a] & 1), None)
                previous = before[add]
                length[add] = 1 + (length[previous] if previous is not None else 0)
            last = max(length, key=lambda a: (length[a], self.index[a]))
            if chains and length[last] < 2:
                break
            spine: list[tuple[fx.Node, fx.Node, fx.Node]] = []
            node: fx.Node | None = last
            while node is not None:
                spine.append((node, *adds[node]))
                node = before[node]
            spine.reverse()
            chains.append(spine)
            taken = {add for add, _, _ in spine}
            adds = {a: v for a, v in adds.items() if a not in taken and not self._nested(a, spine)}
        return chains

    def _nested(self, add: fx.Node, spine: Sequence[tuple[fx.Node, fx.Node, fx.Node]]) -> bool:
        within = any(add is branch or (self.is_above(skip, add) and self.is_above(add, branch)) for _, skip, branch in spine)
        return within or self.is_above(spine[0][0], add) or self._spans(add, spine)

    def _spans(self, add: fx.Node, spine: Sequence[tuple[fx.Node, fx.Node, fx.Node]]) -> bool:
        """A long skip around the spine is not a stream of its own."""
        return self.is_above(spine[-1][0], add)

    # --- sublayers

    def sublayers(self, spine: Sequence[tuple[fx.Node, fx.Node, fx.Node]]) -> list[Sublayer]:
        ends = [self._end(add, spine[i + 1][1] if i + 1 < len(spine) else None) for i, (add, _, _) in enumerate(spine)]
        if len(ends) > 1 and all(end is not add for end, (add, _, _) in zip(ends[:-1], spine)):
            ends[-1] = self._norm_after(spine[-1][0]) or ends[-1]
        found = []
        for (add, skip, branch), end in zip(spine, ends):
            for part in self._parts(skip, branch):
                nodes = self._branch_nodes(skip, part)
                kind = self._kind(nodes)
                found.append(Sublayer(kind, part, add, skip, end, nodes, kind == "attention" and self._is_cross(skip, nodes)))
        return found

    def _norm_after(self, add: fx.Node) -> fx.Node | None:
        users = [u for u in add.users if u.op == "call_function"]
        return users[0] if len(users) == 1 and users[0].target in NORMS and users[0].args[0] is add else None

    def _end(self, add: fx.Node, next_skip: fx.Node | None) -> fx.Node:
        """The stream after an add: its norm where that is what the next branch leaves from (post-norm), else the add."""
        norm = self._norm_after(add)
        return norm if norm is not None and norm is next_skip else add

    def _parts(self, skip: fx.Node, branch: fx.Node) -> list[fx.Node]:
        """Parallel branches arrive as one sum; each weighted term that does not read another is a branch."""
        if branch.target is not aten.add.Tensor:
            return [branch]
        a, b = branch.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or _shape(a) != _shape(b):
            return [branch]
        if self.is_above(a, b) or self.is_above(b, a):
            return [branch]
        if not self._weights_between(skip, a) or not self._weights_between(skip, b):
            return [branch]
        return [*self._parts(skip, a), *self._parts(skip, b)]

    def _branch_nodes(self, skip: fx.Node, branch: fx.Node) -> frozenset[fx.Node]:
        """What the branch computes: nodes between skip and branch, and nodes that nothing but the branch reads."""
        own: set[fx.Node] = {branch}
        start, stop = self.index[skip], self.index[branch]
        above = self.above[stop]
        for i in range(stop - 1, -1, -1):
            node = self.nodes[i]
            if node.op != "call_function" or not above >> i & 1:
                continue
            if self.above[i] >> start & 1 or (node.users and all(u in own for u in node.users)):
                own.add(node)
        return frozenset(own)

    def _kind(self, nodes: frozenset[fx.Node]) -> SiteKind:
        targets = {node.target for node in nodes}
        if aten.scaled_dot_product_attention.default in targets or self._mixes_by_softmax(nodes):
            return "attention"
        if targets & set(ROUTING) or any("grouped_mm" in str(t) for t in targets):
            return "moe"
        linears = sum(node.target is aten.linear.default for node in nodes)
        return "mlp" if linears >= 2 else "sublayer"

    def _mixes_by_softmax(self, nodes: frozenset[fx.Node]) -> bool:
        products = [n for n in nodes if n.target in PRODUCTS and not any(s.op == "get_attr" for s in n.all_input_nodes)]
        soft = [n for n in nodes if n.target in (aten.softmax.int, aten._softmax.default)]
        return any(self.is_above(s, p) for s in soft for p in products)

    def _is_cross(self, skip: fx.Node, nodes: frozenset[fx.Node]) -> bool:
        linears = [n for n in nodes if n.target is aten.linear.default]
        return any(not self.is_above(skip, n) for n in linears)

    # --- sites

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
        if not isinstance(stored, fx.Node) or stored.op != "get_attr" or len(_shape(stored)) != 2:
            return None
        id = self._unique(structure, id or f"{parent}.{_leaf(node, kind)}")
        name, shape = str(stored.target), _shape(stored)
        count = self._parameters({node})
        site = Site(id, kind, parent, self.entry, node.meta.get("path", ""), node.name, "", "", name, shape, count)
        structure.sites[id] = site
        return site

    def _norm_site(self, structure: Structure, id: str, parent: str | None, node: fx.Node) -> None:
        weight = node.args[2] if len(node.args) > 2 else None
        name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
        shape = _shape(weight) if isinstance(weight, fx.Node) else ()
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


def _shape(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


_RESHAPING = (aten.reshape.default, aten._to_copy.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor)


def _reads_input_and_rows(embedding: fx.Node) -> tuple[bool, bool, int]:
    """The token embedding reads `input_ids` where an input is called that, else an input as it is; and has the most rows."""
    rows, ids = _shape(embedding.args[0]), embedding.args[1]
    while isinstance(ids, fx.Node) and ids.target in _RESHAPING:
        ids = ids.args[0]
    given = isinstance(ids, fx.Node) and ids.op == "placeholder"
    return given and str(ids.target).endswith("input_ids"), given, rows[0] if rows else 0  # type: ignore[union-attr]


def _leaf(node: fx.Node, fallback: str) -> str:
    """A short name for a weight: the last word of the stored tensor's name, with the word before if it is a number."""
    stored = next((s for s in node.all_input_nodes if s.op == "get_attr"), None)
    if stored is None:
        return fallback
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
