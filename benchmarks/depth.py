"""Which sublayers of SmolLM2 go, by every order of removal; and which blocks share weights, by every choice of groups. No training.

    python -m benchmarks.texts texts && python -m benchmarks.depth --texts texts
    python -m benchmarks.depth --texts texts --rows groups       # 3 and 6 of 30 blocks compute with another's weights

Everything is chosen on the Debian Reference: cosines on `--cosine-tokens`, damages on `--tokens` (KL to the dense model). Printed is
the rise in log-perplexity on other texts, which no order has seen, with its 95 % interval over windows; the orders of the first command
are judged in one run. A list in the beam grows by the `--candidates` removals of least damage alone. One-shot similarity is LLM-Drop's
order; the ratio is each order's rise over that one's. Groups are runs of blocks that share with the one before them; their common
weights are the first's, the mean, or the member's with the least damage.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import texts as texts_of
from benchmarks.models import program
from lwcompile.budget import Budget, format_size
from lwcompile.contract import Score
from lwcompile.damage import Estimate, estimate, next_token_loss
from lwcompile.data import load_dataset
from lwcompile.executor import Executor
from lwcompile.manager import Manager
from lwcompile.oracle import Oracle
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.table import Choice, OptionTable

DROP, NEIGHBOURS = Spec("drop"), Spec.parse("share{source=[-2,-1,1,2],norms=source}")
SEQLEN = 256


class Judge:
    """The rise in log-perplexity over the dense model on the first tokens of each text."""

    def __init__(self, dense: Program, texts: Mapping[str, str], tokens: int, device: str) -> None:
        sets = {
            name: load_dataset(path, tokenizer=dense.tokenizer(), samples=tokens // SEQLEN, seqlen=SEQLEN, order="sequential")
            for name, path in texts.items()
        }
        names, self.device = Executor(dense).inputs(), device
        self.batches = {name: list(found.batches(2, names)) for name, found in sets.items()}
        self.dense = {name: self.losses(dense, name)[0] for name in sets}

    @torch.no_grad()
    def losses(self, made: Program, text: str) -> tuple[Tensor, Tensor]:
        """-log p of each next token, and the window it stands in."""
        executor, values, windows, seen = Executor(made, self.device), [], [], 0
        for batch in self.batches[text]:
            loss, rows = next_token_loss(executor.run(batch), batch)
            values.append(loss)
            windows.append(rows + seen)
            seen += len(batch["input_ids"])
        executor.release()
        return torch.cat(values), torch.cat(windows)

    def __call__(self, made: Program) -> dict[str, Estimate]:
        found = {name: self.losses(made, name) for name in self.batches}
        return {name: estimate(loss - self.dense[name], windows, "nats/token") for name, (loss, windows) in found.items()}


class Choosing:
    """One run on the calibration text: the table of options, the oracle, and what analyses and allocators make of them."""

    def __init__(self, dense: Program, options: argparse.Namespace, offered: dict[str, list[Spec]], analyses: list[str]) -> None:
        data = {"dataset": texts_of.calibration(options.texts), "samples": 16, "seqlen": SEQLEN}
        recipe = Recipe.named("fast").with_(options=offered, analyses=analyses, calibration=data)
        settings = Settings(recipe=recipe, backend="program", run_dir=options.run_dir, device=options.device)
        self.run: Session = session(dense, settings, terminal_progress())
        self.table = self.run.table
        self.oracle = Oracle(self.run.dense, self.run.structure, self.run.context, tokens=options.tokens)

    def lowest(self, analysis: str, count: int) -> list[str]:
        """The sites on offer with the least scores; where scores tie, as they come."""
        found = Manager(self.run.context).analyze(self.run.dense, make("passes", Spec.parse(analysis)))
        scores = {id: s.value for id, s in found.items() if isinstance(s, Score) and id in self.run.offer.options}
        return sorted(scores, key=scores.__getitem__)[:count]

    def allocated(self, allocator: str, count: int, table: OptionTable | None = None) -> Plan:
        made = make("allocators", Spec.parse(allocator))
        return made.allocate(table or self.table, Budget(drop_sublayers=count), self.oracle)


def orders(dense: Program, options: argparse.Namespace) -> Iterator[tuple[str, Choosing, Callable[[int], Plan]]]:
    """The orders of removal, one-shot similarity first."""
    tokens = options.tokens
    chosen = Choosing(
        dense,
        options,
        {kind: [DROP, NEIGHBOURS] for kind in ("attention", "mlp")},
        [
            f"measured{{tokens={tokens},only=drop}}",
            f"measured{{tokens={tokens},only=share,units=2}}",
            f"block_influence{{tokens={tokens}}}",
        ],
    )
    drop_alone = {id: replace(row, choices=(Choice(DROP, 0.0, 0, silences=True),)) for id, row in chosen.table.sites.items()
                  if row.kind == "block"}  # fmt: skip
    blocks = replace(chosen.table, sites={**chosen.table.sites, **drop_alone}, exclusions=())
    cosine, beam = f"tokens={options.cosine_tokens}", f"width={options.width},candidates={options.candidates}"

    def lowest(analysis: str) -> Callable[[int], Plan]:
        return lambda n: Plan({id: (DROP,) for id in chosen.lowest(analysis.replace("COUNT", str(n)), n)})

    yield "one-shot similarity", chosen, lowest(f"block_influence{{{cosine}}}")
    yield "iterative similarity", chosen, lowest(f"block_influence{{{cosine},removals=COUNT}}")
    yield "uniform, whole blocks", chosen, lambda n: chosen.allocated("uniform", n, blocks)
    yield "uniform, sublayers", chosen, lambda n: chosen.allocated("uniform", n)
    yield "measured alone", chosen, lambda n: chosen.allocated("greedy", n)
    yield "beam", chosen, lambda n: chosen.allocated(f"beam{{{beam}}}", n)
    yield "beam and re-use", chosen, lambda n: chosen.allocated(f"beam{{{beam},reuse=true}}", n)
    if options.gates:
        yield "gates", chosen, lowest(f"gates{{steps={options.gates}}}")


def groups(dense: Program, options: argparse.Namespace) -> Iterator[tuple[str, Choosing, Callable[[int], Plan]]]:
    """The blocks that an order names compute with the weights of the run that they stand in."""
    tokens = options.tokens
    chosen = Choosing(dense, options, {"block": [Spec("share")]}, [f"measured{{tokens={tokens}}}"])
    damages = {id: d[Spec("share")].value for id, d in chosen.run.damages.items() if Spec("share") in d}
    rankings = {"measured alone": lambda n: sorted(damages, key=damages.__getitem__)[:n]}
    rankings["trajectory"] = lambda n: chosen.lowest(f"trajectory{{tokens={options.cosine_tokens}}}", n)
    if options.gates:
        rankings["gates"] = lambda n: chosen.lowest(f"gates{{of=block,steps={options.gates}}}", n)

    def plan(runs: Iterable[Sequence[int]], common: str) -> Plan:
        choices: dict[str, tuple[Spec, ...]] = {}
        for run in runs:
            ways = [{f"block{i}": (_share(k - i, common),) for i in run if i != k} for k in run]
            best = ways[0] if common != "least damage" else min(ways, key=lambda way: chosen.oracle(Plan(way)))
            choices.update(best)
        return Plan(choices)

    for name, lowest in rankings.items():
        for common in ("first", "mean", "least damage"):
            yield f"{name}, {common}", chosen, lambda n, lowest=lowest, common=common: plan(_runs(lowest(n)), common)


def _share(source: int, common: str) -> Spec:
    return Spec.of("share", source=source, mean=True) if common == "mean" else Spec.of("share", source=source)


def _runs(sites: Iterable[str]) -> list[list[int]]:
    """Each maximal run of blocks that share, with the block before it, which they share with."""
    found: list[list[int]] = []
    for i in sorted(int(id.removeprefix("block")) for id in sites):
        if found and found[-1][-1] == i - 1:
            found[-1].append(i)
        else:
            found.append([i - 1, i])
    return found


def where(plan: Plan) -> str:
    """`attention 3 7, mlp 9<8`: what goes, and what computes with which other's weights."""
    by_kind: dict[str, list[str]] = {}
    for id, (option,) in plan.choices.items():
        block, _, kind = id.removeprefix("block").partition(".")
        source = dict(option.args).get("source", -1) if option.name == "share" else None
        by_kind.setdefault(kind or "block", []).append(block if source is None else f"{block}<{int(block) + int(str(source))}")
    return ", ".join(f"{kind} {' '.join(found)}" for kind, found in by_kind.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts_of.arguments(parser)
    parser.add_argument("--rows", default="orders", choices=["orders", "groups"])
    parser.add_argument("--only", nargs="*", help="names of rows; by default all of them")
    parser.add_argument(
        "--removed", type=int, nargs="*", help="sublayers of 60 that go (6 and 12), or blocks of 30 that share (3 and 6)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="calibration tokens that a damage is measured on")
    parser.add_argument("--cosine-tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--gates", type=int, default=0, help="steps that gates are trained for; 0: no such row")
    parser.add_argument("--judged", nargs="*", default=list(texts_of.EVALUATIONS), choices=texts_of.EVALUATIONS)
    parser.add_argument("--judge-tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/depth"))
    options = parser.parse_args()
    counts = options.removed or ([6, 12] if options.rows == "orders" else [3, 6])
    dense = program("smollm2")
    paths = texts_of.evaluations(options.texts)
    judge = Judge(dense, {name: paths[name] for name in options.judged}, options.judge_tokens, options.device)
    head = [
        "order",
        "removed" if options.rows == "orders" else "blocks",
        *judge.batches,
        "mean",
        "of the first row's",
        "bytes",
        "s",
        "where",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    first: dict[int, float] = {}
    for name, chosen, choose in (orders if options.rows == "orders" else groups)(dense, options):
        for count in counts if options.only is None or name in options.only else ():
            started = time.process_time()
            plan = choose(count)
            seconds = time.process_time() - started
            made = chosen.run.compress(plan)
            rises = judge(made)
            mean = sum(rise.mean for rise in rises.values()) / len(rises)
            ratio = mean / first.setdefault(count, mean)
            cells = [name, count, *(f"{r.mean:.3f} ({r.low:.3f} to {r.high:.3f})" for r in rises.values()), f"{mean:.3f}"]
            cells += [f"{ratio:.2f}", format_size(made.nbytes()), f"{seconds:.0f}", where(plan)]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
