"""Every model of the zoo under torch.compile(backend="layerwise"), in every mode that a user may run it in.

    python -m benchmarks.compile_zoo [--codegen eager] [--write docs/zoo_compile.md] [NAME ...]

A cell is the largest error relative to the module's largest output, run in the same mode without the backend, over `CALLS` calls with
unlike inputs (but one in training), the last of which C++ makes where it can:

    no_grad, inference_mode    float32
    again                      a second copy with other weights, compiled in the same process
    bf16                       the module in bfloat16; past 0.05, in brackets, how far its outputs and the module's own are from those
                               of the same weights in float64: right if ours are no farther
    autocast                   float32 under autocast to bfloat16, which is left to torch
    training                   outputs and gradients in training mode, against those of dynamo's own backend `eager`, which draws the
                               same random numbers; left to torch, which is checked
    replayed                   how many graphs under no_grad C++ calls in the end
    graphs                     that the backend made of the module under no_grad; what it left to torch as it stands, after a +
    generate                   of language models: graphs for three prompts of unlike length, with a static and with a dynamic cache;
                               the tokens are those of the module without it, or the row says otherwise

With `--codegen eager`, what is left to torch runs eagerly too: this is about the graphs, and compiling all with Inductor takes hours.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.zoo_models import MEMBERS, Member
from lwcompile.manager import relative_error
from lwcompile.sources import open_source

FLOAT, HALF = 1e-4, 0.05
"""Errors past which a row is wrong, in float32 and in 16 bits."""

SECONDS, CALLS = 600, 5
MODES = ("no_grad", "inference_mode", "again", "bf16", "autocast", "training")


@dataclass
class Row:
    """What became of one member."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    exact: list[float] = field(default_factory=lambda: [0.0, 0.0])  # bf16 from float64: ours, and the module's own
    graphs: str = ""
    replayed: str = ""
    generate: str = ""
    seconds: float = 0.0
    reason: str = ""

    @property
    def right(self) -> bool:
        ours, theirs = self.exact
        wrong = {mode for mode, e in self.errors.items() if not e <= (HALF if mode in ("bf16", "autocast") else FLOAT)}
        return not self.reason and len(self.errors) == len(MODES) and wrong <= ({"bf16"} if ours <= theirs else set())

    def cells(self) -> list[str]:
        errors = [f"{self.errors[mode]:.0e}" if mode in self.errors else "" for mode in MODES]
        if not self.errors.get("bf16", 0.0) <= HALF:
            errors[MODES.index("bf16")] += f" ({self.exact[0]:.0e}, {self.exact[1]:.0e})"
        return [
            self.name,
            *errors,
            self.replayed,
            self.graphs,
            self.generate,
            f"{self.seconds:.0f}",
            "right" if self.right else self.reason or "wrong",
        ]


class Counted:
    """How many graphs the backend made, how many it left as they stand, and how many C++ calls in the end."""

    def __init__(self) -> None:
        from lwcompile.backends.dynamo import backend
        from lwcompile.backends.inductor.codegen import Eager, Inductor
        from lwcompile.backends.inductor.native import load
        from lwcompile.backends.inductor.replay import Replayed
        from lwcompile.backends.inductor.tape import SOURCE

        load(SOURCE)  # builds what replays, which calls do not wait for
        self.made = self.left = 0
        self.bound: list[Replayed] = []
        made, left = backend.Compiled.__init__, backend._as_it_stands

        def count_made(this: Any, *given: Any) -> None:
            made(this, *given)
            self.made += 1

        def count_left(*given: Any) -> Any:
            self.left += 1
            return left(*given)

        def bind(this: Any, call: Any, tensors: Any) -> Replayed:  # the eager codegen's too: it is what compiles all in minutes
            self.bound.append(Replayed(call, tensors))
            return self.bound[-1]

        backend.Compiled.__init__, backend._as_it_stands = count_made, count_left  # type: ignore[method-assign]
        Eager.bind = Inductor.bind = bind  # type: ignore[method-assign]

    def fresh(self) -> None:
        torch._dynamo.reset()
        self.made = self.left = 0
        self.bound.clear()

    @property
    def replayed(self) -> int:
        return sum(one.replays for one in self.bound)

    def __str__(self) -> str:
        return f"{self.made}" + (f" + {self.left}" if self.left else "")


def examine(member: Member, codegen: str) -> Row:
    """Every mode of one member. Failures of any kind end in the row."""
    row, started, counted = Row(member.name), time.perf_counter(), Counted()
    if codegen == "eager":
        from lwcompile.backends.dynamo import backend

        backend._plain = lambda: "eager"
    try:
        source = open_source(member.build())
        for part in source.parts.values():
            _modes(part.model, part.example_kwargs, codegen, counted, row)
        if source.task == "causal-lm":
            row.generate = _generate(source.model, codegen, counted)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        row.reason = f"{type(error).__name__}: {lines[0]}"
    row.seconds = time.perf_counter() - started
    return row


def _modes(model: nn.Module, feed: dict[str, Tensor], codegen: str, counted: Counted, row: Row) -> None:
    other, half = _shaken(model), copy.deepcopy(model).bfloat16()
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in feed.items()}
    whole: Callable[[], AbstractContextManager[Any]] = torch.no_grad
    for mode, made, given, around in (
        ("no_grad", model, feed, (whole,)),
        ("again", other, feed, (whole,)),
        ("inference_mode", model, feed, (torch.inference_mode,)),
        ("bf16", half, narrow, (whole,)),
        ("autocast", model, feed, (whole, lambda: torch.autocast("cpu", torch.bfloat16))),
    ):
        if mode != "again":  # in the same process, beside the first
            counted.fresh()
        error, *_ = _error(made, given, codegen, around)
        if mode == "bf16" and not error <= HALF:
            counted.fresh()
            _, *from_exact = _error(made, given, codegen, around, copy.deepcopy(half).double())
            row.exact = [max(pair) for pair in zip(row.exact, from_exact)]
        row.errors[mode] = max(row.errors.get(mode, 0.0), error)
        if mode == "no_grad":
            row.graphs = ", ".join(filter(None, [row.graphs, str(counted)]))
            row.replayed = ", ".join(filter(None, [row.replayed, str(counted.replayed)]))
    counted.fresh()
    row.errors["training"] = max(row.errors.get("training", 0.0), _trained(model, feed, codegen))
    assert counted.left, "nothing was left to torch in training"


def _shaken(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.25)
    return made


def _error(model: nn.Module, feed: dict[str, Tensor], codegen: str, around: Any, exact: nn.Module | None = None) -> list[float]:
    """Of the compiled module from the module; of both from `exact`, if there is one."""
    from contextlib import ExitStack

    compiled = torch.compile(model, backend="layerwise", options={"codegen": codegen})
    with ExitStack() as stack:
        for context in around:
            stack.enter_context(context())
        errors = [0.0, 0.0, 0.0]
        for call in range(CALLS):
            given = {name: _unlike(value, call) for name, value in feed.items()}
            wanted, made = _tensors(model(**given)), _tensors(compiled(**given))
            assert len(wanted) == len(made) > 0
            truth = wanted
            if exact is not None:
                truth = _tensors(exact(**{name: v.double() if v.is_floating_point() else v for name, v in given.items()}))
            for own, mine, true in zip(wanted, made, truth, strict=True):
                found = (
                    relative_error(own, mine),
                    relative_error(true, mine.to(true.dtype)),
                    relative_error(true, own.to(true.dtype)),
                )
                errors = [max(pair) for pair in zip(errors, found)]
        return errors


def _unlike(value: Any, call: int) -> Any:
    """Other numbers of the same form, that mean as much: a few positions on."""
    return value.roll(call, -1) if isinstance(value, Tensor) and value.dim() > 1 else value


def _trained(model: nn.Module, feed: dict[str, Tensor], codegen: str) -> float:
    seen: list[list[Tensor]] = []
    ways: list[dict[str, Any]] = [{"backend": "eager"}, {"backend": "layerwise", "options": {"codegen": codegen}}]
    for how in ways:
        module = copy.deepcopy(model).train()
        torch._dynamo.reset()
        torch.manual_seed(0)
        numpy.random.seed(0)
        outputs = [x for x in _tensors(torch.compile(module, **how)(**feed)) if x.requires_grad]
        sum(x.float().square().mean() for x in outputs).backward()  # type: ignore[union-attr]
        seen.append([*outputs, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(seen[0]) == len(seen[1]) > 1, "gradients of other weights"
    return max(relative_error(a.detach(), b.detach()) for a, b in zip(*seen))


def _tensors(value: Any) -> list[Tensor]:
    value = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _generate(model: Any, codegen: str, counted: Counted) -> str:
    found = []
    for cache in ("static", "dynamic"):
        counted.fresh()
        try:
            found.append(_generated(copy.deepcopy(model), cache, codegen) or str(counted))
        except Exception as error:
            found.append(f"{type(error).__name__}")
    return " / ".join(found)


def _generated(model: Any, cache: str, codegen: str) -> str:
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    how = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [torch.randint(1, vocabulary, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 12, 7)]
    wanted = [model.generate(prompt, **how) for prompt in prompts]
    model.forward = torch.compile(model.forward, backend="layerwise", options={"codegen": codegen})
    same = all(torch.equal(model.generate(prompt, **how), tokens) for prompt, tokens in zip(prompts, wanted))
    return "" if same else "other tokens"


def examine_apart(member: Member, codegen: str) -> Row:
    """`examine` in a process of its own."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(sender, member, codegen))
    process.start()
    sender.close()
    row = None
    if receiver.poll(SECONDS):
        with suppress(EOFError):
            row = receiver.recv()
    process.kill()
    process.join()
    return row or Row(member.name, reason=f"no end after {SECONDS} s, or the process died")


def _send(sender: Any, member: Member, codegen: str) -> None:
    sender.send(examine(member, codegen))


def table(rows: list[Row]) -> str:
    head = ["Architecture", *MODES, "replayed", "graphs", "generate", "seconds", "verdict"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(row.cells() for row in rows)))


def document(rows: list[Row], codegen: str) -> str:
    import transformers

    right = sum(row.right for row in rows)
    meaning = (__doc__ or "").split("A cell is", 1)[1].split("With `--codegen")[0].rstrip()
    return f"""# The zoo under torch.compile

<!-- generated by `python -m benchmarks.compile_zoo --write docs/zoo_compile.md` -->

`torch.compile(model, backend="layerwise")` on small random models of {len(rows)} architectures, {right} of them right in every mode.
The codegen is `{codegen}`, which also runs what is left to torch if it is `eager`: the table is about graphs, and not about speed.
A cell is{meaning}

Right is within {FLOAT:.0e} in float32 and {HALF} in 16 bits. Torch {torch.__version__.split("+")[0]},
transformers {transformers.__version__}, one thread of a shared machine, {time.strftime("%Y-%m-%d")}.

{table(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all of them if none is named")
    parser.add_argument("--codegen", default="eager")
    parser.add_argument("--write", type=Path, help="the Markdown file to write the table into")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for member in MEMBERS:
        if not options.names or member.name in options.names:
            rows.append(examine_apart(member, options.codegen))
            print(f"| {' | '.join(rows[-1].cells())} |", file=sys.stderr, flush=True)
    if options.write:
        options.write.write_text(document(rows, options.codegen), encoding="utf-8")
    else:
        print(table(rows))
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
