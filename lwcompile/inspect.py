"""A model as a tree: entry points, residual streams, blocks, sublayers, weights, with parameters and bytes.

view = look(program)              # plain data, JSON-able
rich.print(tree(view))            # for the terminal; equal blocks in a row are one line unless `full`
html.diagram.draw(view)           # the same as a drawing: the stream, and what branches off it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

from lwcompile.budget import format_size
from lwcompile.strip import format_count

if TYPE_CHECKING:
    from torch import fx

    from lwcompile.program import Program
    from lwcompile.residual import Sublayer
    from lwcompile.structure import Stream, Structure


@dataclass(frozen=True)
class Part:
    """One place of the model and what stands below it.

    Attributes:
        id: the site's id; of a stream, a description.
        kind: a site's kind, or `program`, `entry`, `stream`, `other`.
        shape: of its weight.
        parameters, bytes: at or below it, tensors that several places read counted once.
        note: what else is to be said: tied weights, cross attention, parallel branches.
        norm: of a sublayer: `pre-norm`, `post-norm`, `pre- and post-norm`, or nothing.
        children: in the order of the computation.
        repeat: how many equal blocks in a row this one stands for; `last` is the id of the last.
    """

    id: str
    kind: str
    parameters: int = 0
    bytes: int = 0
    shape: tuple[int, ...] = ()
    note: str = ""
    norm: str = ""
    children: tuple[Part, ...] = ()
    repeat: int = 1
    last: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look(program: Program, structure: Structure | None = None) -> Part:
    """The tree of a program, every block by itself. A model without a residual stream is said to have none."""
    from lwcompile.structure import find_structure

    return _Looker(program, structure or find_structure(program)).program_part()


class _Looker:
    def __init__(self, program: Program, structure: Structure) -> None:
        self.program, self.structure, self.store = program, structure, program.store
        self.tied = {id: [other for other in ids if other != id] for ids in structure.tied for id in ids}

    def count(self, keys: Iterable[str]) -> tuple[int, int]:
        """Parameters and bytes of stored tensors."""
        held = set(keys)
        floats = {key for key in held if self.store.dtype(key).is_floating_point}
        parameters = sum(self.store.nbytes(key) // self.store.dtype(key).itemsize for key in floats)
        return parameters, sum(self.store.nbytes(key) for key in held)

    def keys(self, entry: str, nodes: Iterable[Any]) -> set[str]:
        """The stored tensors that nodes read."""
        names = self.program.entries[entry].tensors
        return {names[str(s.target)] for node in nodes for s in node.all_input_nodes if s.op == "get_attr"}

    def program_part(self) -> Part:
        several = len(self.program.entries) > 1
        entries = tuple(self.entry_part(entry) for entry in self.program.entries)
        children = entries if several else entries[0].children
        return Part(
            self.program.name, "program", *self.count(self.program.keys()), note=self.program.task, children=children,
        )  # fmt: skip

    def entry_part(self, entry: str) -> Part:
        graph, sites = self.program.entries[entry], self.structure.sites
        top = [site for site in sites.values() if site.entry == entry and site.parent is None and site.kind != "block"]
        norms = {s.final_norm.name for s in self.structure.streams if s.entry == entry and s.final_norm is not None}
        before = [site.id for site in top if site.kind == "embedding" or site.id.split(".")[-2:-1] == ["stem"]]
        after = [site.id for site in top if site.id not in before and site.node not in norms]
        streams = [s for s in self.structure.streams if s.entry == entry]
        middle = [self.stream_part(stream) for stream in streams]
        shown = [self.weight_part(id) for id in before], [self.weight_part(id) for id in after]
        claimed = {key for stream in streams for key in self.stream_keys(stream)}
        claimed |= {key for site in top for key in self.keys(entry, [graph.node(site.node)])}
        rest = set(graph.tensors.values()) - claimed
        other = [Part(_tensors(len(rest)), "other", *self.count(rest), note="read outside of every site")] if rest else []
        none = (
            []
            if streams
            else [Part("no residual stream", "stream", note="nothing here is added back to what it was computed from")]
        )
        children = (*shown[0], *none, *middle, *shown[1], *other)
        return Part(entry, "entry", *self.count(graph.tensors.values()), children=children)

    def stream_keys(self, stream: Stream) -> set[str]:
        nodes = [node for block in stream.blocks for sub in block for node in (*sub.nodes, sub.end)]
        return self.keys(stream.entry, [*nodes, *([stream.final_norm] if stream.final_norm is not None else [])])

    def stream_part(self, stream: Stream) -> Part:
        blocks = tuple(self.block_part(stream, n, block) for n, block in enumerate(stream.blocks))
        final = []
        if stream.final_norm is not None:
            found = next(
                (s.id for s in self.structure.sites.values() if s.entry == stream.entry and s.node == stream.final_norm.name),
                None,
            )
            final = [self.weight_part(found)] if found else []
        kinds = dict.fromkeys(sub.norm for block in blocks for sub in block.children if sub.norm)
        words = list(kinds) or ["no norms"]
        if any("parallel" in sub.note for block in blocks for sub in block.children):
            words.append("parallel branches")
        name = f"{stream.prefix.rstrip('.')} residual stream".strip()
        return Part(name, "stream", *self.count(self.stream_keys(stream)), note=", ".join(words), children=(*blocks, *final))

    def block_part(self, stream: Stream, number: int, block: Sequence[Sublayer]) -> Part:
        id = f"{stream.prefix}block{number}"
        ids = [site.id for site in self.structure.children(id)]
        sources = _sources(block)
        parts: list[Part] = []
        for site, sub, source in zip(ids, block, sources):
            notes = ["reads another stream"] if sub.cross else []
            if sources.count(source) > 1:
                notes.append("parallel: reads the stream where its neighbour does")
            below = tuple(self.weight_part(child.id) for child in self.structure.children(site))
            count = self.count(self.keys(stream.entry, {*sub.nodes, sub.end}))
            parts.append(Part(site, sub.kind, *count, note="; ".join(notes), norm=_norm_of(sub, source), children=below))
        nodes = {node for sub in block for node in (*sub.nodes, sub.end)}
        return Part(id, "block", *self.count(self.keys(stream.entry, nodes)), children=tuple(parts))

    def weight_part(self, id: str) -> Part:
        site = self.structure.sites[id]
        node = self.program.entries[site.entry].node(site.node)
        note = f"tied to {', '.join(self.tied[id])}" if id in self.tied else ""
        return Part(id, site.kind, *self.count(self.keys(site.entry, [node])), shape=site.shape, note=note)


def _sources(block: Sequence[Sublayer]) -> list[fx.Node]:
    """Where each branch leaves the stream: before its own add, or, of parallel branches, before the first one's."""
    found: list[fx.Node] = []
    for sub in block:
        reads_skip = any(sub.skip in node.all_input_nodes for node in sub.nodes)
        found.append(sub.skip if reads_skip or not found else found[-1])
    return found


def _norm_of(sub: Sublayer, source: fx.Node) -> str:
    """Where the norms of a branch stand."""
    from lwcompile.residual import NORMS

    before = any(node.target in NORMS and node.args[0] is source for node in sub.nodes)
    after = sub.post_norm or sub.branch.target in NORMS
    return "pre- and post-norm" if before and after else "pre-norm" if before else "post-norm" if after else ""


def _tensors(n: int) -> str:
    return f"{n} other tensor{'s' if n > 1 else ''}"


# --- equal blocks


def collapse(parts: Sequence[Part]) -> list[Part]:
    """Runs of equal blocks as one, with `repeat` and `last`, and the parameters and bytes of all of them."""
    made: list[Part] = []
    for part in parts:
        before = made[-1] if made else None
        if before is not None and part.kind == "block" and _shape_of(before) == _shape_of(part):
            total = {"parameters": before.parameters + part.parameters, "bytes": before.bytes + part.bytes}
            made[-1] = replace(before, repeat=before.repeat + 1, last=part.id, **total)
        else:
            made.append(part)
    return made


def _shape_of(part: Part, root: str | None = None) -> tuple[Any, ...]:
    """Everything but the block's number, and but the totals that `collapse` adds up."""
    root = part.id if root is None else root
    name = part.id.removeprefix(root)
    own = () if part.kind == "block" else (part.parameters, part.bytes)
    return (name, part.kind, part.shape, part.note, part.norm, own, *(_shape_of(child, root) for child in part.children))


# --- the terminal


def tree(view: Part, full: bool = False) -> Tree:
    """The tree for the terminal; `full` shows every block."""
    root = Tree(_line(view, view.id, "bold"), guide_style="dim")
    _grow(root, view, full)
    return root


def _grow(branch: Tree, part: Part, full: bool) -> None:
    for child in part.children if full else collapse(part.children):
        name = child.id.removeprefix(part.id).removeprefix(".") if child.kind != "stream" else child.id
        if child.repeat > 1:
            name = f"{child.id} … {child.last} ({child.repeat} ×)"
        style = {"stream": "bold cyan", "entry": "bold", "block": "bold", "other": "dim"}.get(child.kind, "")
        _grow(branch.add(_line(child, name, style)), child, full)


def _line(part: Part, name: str, style: str) -> Text:
    text = Text(name, style=style)
    if part.shape:
        text.append(f"  {' × '.join(map(str, part.shape))}", style="cyan")
    if part.bytes:
        text.append(f"  {format_count(part.parameters)}  {format_size(part.bytes)}", style="dim")
    for note in (part.norm, part.note):
        if note:
            text.append(f"  {note}", style="yellow" if "tied" in note or note.startswith("nothing") else "green")
    return text
