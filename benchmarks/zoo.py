"""The zoo: many architectures, random and small, through everything from capture to an ONNX file that computes the same.

    python -m benchmarks.zoo --write docs/zoo.md        all of them, a process each
    python -m benchmarks.zoo --rows zoo-rows ...        resumed: a member that has a row in this folder is not run again
    python -m benchmarks.zoo Llama T5                   some of them

Each is captured and compared with the module at other sizes and with left padding; its structure is found; all its linears are
quantized (round-to-nearest, 4 and 8 bits in turn) and one attention and one mlp dropped; a decoder gets its decode graph; the
result is written as ONNX and run against the graph. Then every transform that is installed is asked at every site, and those that
apply are put into plans and files of their own (`zoo_transforms`). An architecture is right, or refused with a reason; it never
crashes, and neither does a transform at it.
Exit code 1 if a required one is not right, or fewer than 26 are.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.zoo_models import MEMBERS, Member
from benchmarks.zoo_transforms import Outcome, outcomes
from benchmarks.zoo_transforms import table as transforms_table
from lwcompile.apply import apply_plan
from lwcompile.context import Context
from lwcompile.decode import derive_decode
from lwcompile.errors import LwError, Refused, VerificationError
from lwcompile.graph import ModelGraph, inputs_of
from lwcompile.pipeline import capture
from lwcompile.program import Program
from lwcompile.registry import load, make, plugins
from lwcompile.site import SUBLAYER_KINDS, Site
from lwcompile.sources import Part, Source, open_source
from lwcompile.spec import Spec
from lwcompile.structure import Structure, find_structure

CAPTURE_TOLERANCE, PARITY_TOLERANCE = 1e-5, 1e-4
ENOUGH = 26
SECONDS = 300
"""A member that takes longer is stopped and counted as a crash."""

EVERY = """Sites that take a transform when it is asked, of the sites of its kinds. Each that is not refused stands in a plan with others,
which the verifier passed and whose ONNX file computes what its graph does; the parity is of the worst of these files."""

DROP = Spec("drop")
BITS = (Spec.parse("quantize{bits=4,group_size=16,solver=rtn}"), Spec.parse("quantize{bits=8,group_size=32,solver=rtn}"))


@dataclass(frozen=True)
class Row:
    """What became of one member; `reason` says why it is not right, `crashed` that it was no refusal."""

    name: str
    blocks: int = 0
    sublayers: str = ""
    sites: int = 0
    quantized: int = 0
    dropped: tuple[str, ...] = ()
    nodes: int = 0
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()
    traced: float = float("nan")
    decode: str = ""
    parity: float = float("nan")
    transforms: tuple[Outcome, ...] = ()
    reason: str = ""
    crashed: bool = False

    @property
    def right(self) -> bool:
        return not self.reason


# --- one member


def examine(member: Member, transforms: bool = True) -> Row:
    """Everything this file promises, for one member; `transforms`: every transform too. Failures of any kind end in the row."""
    row = Row(member.name)
    try:
        for reached in _steps(member, transforms):
            row = reached
    except LwError as error:
        return replace(row, reason=str(error))
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        return replace(row, reason=f"{type(error).__name__}: {lines[0]}", crashed=True)
    return row


def _steps(member: Member, transforms: bool) -> Iterator[Row]:
    """The row after each step."""
    started = time.perf_counter()
    source = open_source(member.build())
    program = capture(source)
    seconds, nodes = time.perf_counter() - started, sum(len(graph.nodes) for graph in program.entries.values())
    row = Row(member.name, seconds=seconds, nodes=nodes, remarks=program.remarks)
    yield row
    yield (row := replace(row, traced=check_capture(source, program)))
    structure = find_structure(program)
    kinds = Counter(site.kind for site in structure.of_kind(*SUBLAYER_KINDS))
    said = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    yield (row := replace(row, blocks=len(structure.of_kind("block")), sublayers=said, sites=len(structure.sites)))
    if not structure.streams:
        raise Refused("it has no residual stream")
    smaller, row = _compress(program, structure, row)
    yield row
    if source.task == "causal-lm":
        try:
            smaller = replace(smaller, entries={**smaller.entries, "decode": derive_decode(smaller.main)})
            row = replace(row, decode="yes")
        except Refused as refusal:
            row = replace(row, decode=refusal.reason)
        yield row
    yield (row := replace(row, parity=_lower(smaller)))
    if transforms:
        yield replace(row, transforms=tuple(outcomes(program, structure, _lower, source.task == "causal-lm")))


def check_capture(source: Source, program: Program) -> float:
    """The largest error of a captured graph relative to its module, at other sizes and with left padding."""
    return max(_traced_error(part, program.entries[name]) for name, part in source.parts.items())


def _traced_error(part: Part, graph: ModelGraph) -> float:
    feed = other_sizes(part, graph)
    with torch.no_grad():
        wanted = [leaf for leaf in tree_leaves(part.model(**feed)) if isinstance(leaf, Tensor)]
        got = graph.module()(*inputs_of(graph, feed))
    if len(wanted) != len(got):
        raise VerificationError(f"the captured graph has {len(got)} outputs and the module {len(wanted)}")
    mask = next((value.bool() for name, value in feed.items() if name == "attention_mask"), None)
    worst = 0.0
    for name, a, b in zip(graph.outputs, wanted, got):
        if mask is not None and a.shape[:2] == mask.shape:
            a, b = a[mask], b[mask]  # what a query makes of nothing but padding is nobody's business
        error = ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() if a.shape == b.shape else float("inf")
        if not error <= CAPTURE_TOLERANCE:
            raise VerificationError(f"the captured graph's {name} differs from the module's by {error:.1e}")
        worst = max(worst, error)
    return worst


def other_sizes(part: Part, graph: ModelGraph) -> dict[str, Tensor]:
    """The example at batch 3 and shorter sequences, its masks padded on the left. Sizes that the graph fixed are kept."""
    sizes, free = {"batch": 3, "sequence": 11, "encoder_sequence": 13}, {i.name: i.dynamic for i in graph.inputs}
    feed = {}
    for name, value in part.example_kwargs.items():
        for dim in free.get(name, {}):
            symbol = part.dynamic[name][dim]
            value = value.index_select(dim, torch.arange(sizes[symbol]) % value.shape[dim])
        if name.endswith("mask"):
            value = value.clone()
            value[0, :3] = 0
        feed[name] = value
    return feed


def _compress(program: Program, structure: Structure, row: Row) -> tuple[Program, Row]:
    dropped = _droppable(program, structure)
    linears = structure.of_kind("linear")
    ctx = Context(structure=structure, program=program)
    choices = {site.id: (BITS[i % 2],) for i, site in enumerate(linears)} | dict.fromkeys(dropped, (DROP,))
    smaller = apply_plan(program, choices, structure, ctx)
    refused = {remark.site for remark in ctx.remarks if remark.kind == "refused"}
    gone = [s for s in linears if any(s.id.startswith(f"{id}.") for id in dropped)]
    quantized = len([s for s in linears if s.id not in refused and s not in gone])
    row = replace(row, dropped=tuple(id for id in dropped if id not in refused), quantized=quantized)
    if not quantized or not row.dropped:
        what = "quantized" if not quantized else "dropped"
        raise Refused(
            f"nothing could be {what}: {next((r.text for r in ctx.remarks if r.kind == 'refused'), 'no site offers it')}"
        )
    return smaller, row


def _droppable(program: Program, structure: Structure) -> list[str]:
    """The last mixer and the first mlp or moe that may go; another sublayer where there are none of these."""
    sublayers = [site for site in structure.of_kind(*SUBLAYER_KINDS) if _may_drop(program, site)]
    mixers = [site.id for site in sublayers if site.kind == "attention"]
    others = [site.id for site in sublayers if site.kind in ("mlp", "moe")]
    return [*mixers[-1:], *others[:1]] or [site.id for site in sublayers[-1:]]


def _may_drop(program: Program, site: Site) -> bool:
    try:
        make("passes", DROP).check(program.entries[site.entry], site)
    except Refused:
        return False
    return True


def _lower(program: Program) -> float:
    """Parity of the ONNX file with the graph, at two sizes, with padding and from a cache: a real file, a real session."""
    backend = make("backends", "onnx")
    if reasons := backend.unsupported(program):
        raise Refused(reasons[0])
    with tempfile.TemporaryDirectory() as folder:
        worst = backend.lower(program, Path(folder) / "model.onnx", None).worst
    if not worst <= PARITY_TOLERANCE:
        raise VerificationError(f"the ONNX file differs from the graph by {worst:.1e}")
    return worst


# --- all of them


def examine_apart(member: Member, seconds: float = SECONDS) -> Row:
    """`examine` in a process of its own: what kills it, or never ends, is a row like the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, member))
    process.start()
    sender.close()
    row, late = None, not receiver.poll(seconds)
    if late:
        process.kill()
    else:
        with suppress(EOFError):  # it died
            row = receiver.recv()
    process.join()
    said = f"no end after {seconds:.0f} s" if late else f"the process died (exit code {process.exitcode})"
    return row or Row(member.name, reason=said, crashed=True)


def _send(sender: object, member: Member) -> None:
    sender.send(examine(member))  # type: ignore[attr-defined]


def _kept(member: Member, options: argparse.Namespace) -> Row:
    """The row that lies in the folder, or is put there."""
    folder: Path = options.rows
    path = folder / f"{member.name}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        lists = {key: tuple(found[key]) for key in ("dropped", "remarks")}
        return Row(**{**found, **lists, "transforms": tuple(Outcome(**o) for o in found["transforms"])})
    row = examine_apart(member, options.seconds)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(row), indent=1), encoding="utf-8")
    return row


def passed(rows: list[Row]) -> bool:
    """Whether all required members of `rows` are right; and enough of them, where all members are there."""
    by_name = {row.name: row for row in rows}
    required = all(by_name[m.name].right for m in MEMBERS if m.required and m.name in by_name)
    enough = len(rows) < len(MEMBERS) or sum(row.right for row in rows) >= ENOUGH
    return required and enough and not any(row.crashed for row in rows)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, what was not done and why below it."""
    head = ["Architecture", "Blocks", "Sublayers", "Sites", "Quantized", "Dropped", "Nodes", "Capture, s", "Capture error",
            "Decode graph", "ONNX parity", "Verdict"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        verdict = "right" if row.right else "crashed" if row.crashed else "refused"
        decode = row.decode if row.decode in ("", "yes") else "refused"
        cells = [row.name, row.blocks, row.sublayers, row.sites, row.quantized, ", ".join(row.dropped), row.nodes,
                 f"{row.seconds:.1f}", _number(row.traced), decode, _number(row.parity), verdict]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    lines += [
        "",
        "## Every transform",
        "",
        EVERY,
        "",
        *transforms_table({r.name: list(r.transforms) for r in rows if r.transforms}),
    ]
    lines += ["", *_reasons("Refused", {r.name: r.reason for r in rows if r.reason})]
    lines += _reasons("Without a decode graph", {r.name: r.decode for r in rows if r.decode not in ("", "yes")})
    lines += _reasons("Remarks of the trace", {r.name: "; ".join(r.remarks) for r in rows if r.remarks})
    return "\n".join(lines)


def _reasons(title: str, reasons: Mapping[str, str]) -> list[str]:
    return [f"## {title}", "", *(f"- {name}: {reason}." for name, reason in reasons.items()), ""] if reasons else []


def _number(value: float) -> str:
    return "" if value != value else f"{value:.0e}"


def document(rows: list[Row]) -> str:
    import onnxruntime
    import transformers

    right = sum(row.right for row in rows)
    return f"""# The zoo

<!-- generated by `python -m benchmarks.zoo --write docs/zoo.md` -->

Small random models of {len(rows)} architectures, {right} of them right: captured and equal to the module at other sizes and
with left padding (relative error at most {CAPTURE_TOLERANCE:.0e}), structure found, all linears quantized to 4 and 8 bits in
turn by round-to-nearest, one attention and one mlp dropped, a decode graph derived for language models, and written as an ONNX
file whose outputs are the graph's in onnxruntime (relative to the largest, within {PARITY_TOLERANCE:.0e}). The others are
refused, with the reason below. Every transform was tried at each, and applied and verified, or refused, below too.

torch {torch.__version__.split("+")[0]}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}.

{table(rows)}"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The zoo: many architectures from capture to ONNX.")
    parser.add_argument("names", nargs="*", help="architectures; all of them if none is named")
    parser.add_argument("--write", type=Path, help="the Markdown file to write the table into")
    parser.add_argument("--rows", type=Path, help="a folder for the members' rows; those that lie there are not run again")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that a member may take, on a machine that does nothing else"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {m.name for m in MEMBERS}
    if unknown:
        parser.error(f"no member is named {sorted(unknown)[0]!r}; there are {', '.join(m.name for m in MEMBERS)}")
    _quiet()
    rows = []
    for member in MEMBERS:
        if options.names and member.name not in options.names:
            continue
        rows.append(row := _kept(member, options) if options.rows else examine_apart(member, options.seconds))
        print(
            f"{row.name:12} {'right' if row.right else row.reason}  [{row.decode}] {row.parity:.0e}", file=sys.stderr, flush=True
        )
    if options.write:
        options.write.write_text(document(rows).rstrip() + "\n", encoding="utf-8")
    else:
        print(table(rows))
    return 0 if passed(rows) else 1


def _quiet() -> None:
    import torch._dynamo
    import transformers

    for plugin in plugins("passes"):  # what every member imports, once instead of in each of their processes
        load("passes", plugin.name)
    load("backends", "onnx")

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
