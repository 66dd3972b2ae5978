"""`torch.compile(model, backend="layerwise", options={...})`.

    dynamo's graph -> ModelGraph with frozen parameters -> exact rewrites -> a plan's options -> code

Without options only rewrites that keep the function are made; the result is compared with dynamo's graph on the first inputs.
Options:

    plan      a folder that `lwcompile compress` wrote (its packed weights are used), a result of `lw.compress`, or a plan or its
              file, whose solvers must do without samples
    recipe    a recipe (name, file, or `Recipe`): its exact passes are run
    codegen   what makes the code, by name or with options: "inductor{freezing=true}", "onnxruntime", "triton", "eager"; "auto" takes,
              of those that can, the highest rank for a dense graph (Inductor, with a compiler), and for a compressed one the fewest
              seconds, as far as they measure them

Nothing is asked of a device table for a dense graph but how Inductor's code computes products of up to 4 rows with large weights.

Code made without options is kept in Inductor's cache (`kept`): compiling again, in this process or another, costs little more than
dynamo's trace. At level INFO the logger `lwcompile` says who runs each operator.

What is not for us (training, autocast, other devices, parts of a model that a plan cannot be found in) is compiled by Inductor as
it stands, and a warning says so once. Weights are part of the code: one that is replaced or written in place afterwards is
noticed at the next call, which then compiles the graph with its weights as inputs; under a plan, it raises. Noticed is what torch
counts: a write through `.data` or NumPy is seen where the code reads the weight in place, which without options is nearly everywhere,
and missed where something was computed from it or packed. Of several models of one class under equal options, each is compiled
under its plan; without one the first is, and the others run as torch compiles them.

Under a plan, what dynamo would ask of the model's modules before each call is asked at once (`watched`), and weights are not handed
over. A changed module, attribute or class is compiled anew, as by dynamo's own guards; hooks that are added later are not noticed, as
they are not by dynamo (`torch._dynamo.config.skip_nnmodule_hook_guards`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.backends.dynamo import kept, options, watched
from lwcompile.backends.dynamo.capture import Captured, as_input, capture, source_of
from lwcompile.backends.dynamo.frozen import Frozen
from lwcompile.backends.dynamo.options import Options
from lwcompile.backends.dynamo.plan import Changed, Given, apply
from lwcompile.backends.inductor.codegen import missing_compiler
from lwcompile.context import Context
from lwcompile.contract import Codegen, TransformPass, who_runs
from lwcompile.errors import BadInput, BadPlan, LwError, Refused
from lwcompile.graph import ModelGraph
from lwcompile.manager import EXACT_TOLERANCE, Manager, relative_error
from lwcompile.program import Program
from lwcompile.registry import make, plugins
from lwcompile.structure import find_structure

log = logging.getLogger("lwcompile")
_said: set[str] = set()

HALF_TOLERANCE = 0.05
"""Relative to the largest output, in 16-bit types, where the same function rounds elsewhere."""


def layerwise(
    module: fx.GraphModule, arguments: Sequence[Any], *, options: Mapping[str, Any] | None = None, **unknown: Any
) -> Callable[..., Any]:
    """What dynamo calls for each graph; see the module's text for `options`."""
    if unknown:
        raise BadInput(f"the backend takes options={{...}} and no {', '.join(unknown)}")
    chosen = Options.of(options or {})
    if not any(isinstance(value, Tensor) and node.users for node, value in _placeholders(module, arguments)):
        return module.forward
    try:
        if reason := _not_for_us(module, arguments):
            raise Refused(reason)
        return Compiled(module, arguments, chosen)
    except Refused as refusal:
        lost = "" if chosen.plan is None else ", without the plan"
        return _as_it_stands(module, arguments, f"a graph is compiled as it stands{lost}: {refusal}")


def _reset() -> None:
    """What `torch._dynamo.reset()` calls: weights may be others from here on."""
    options.forget()
    watched.forget()


layerwise.reset = _reset  # type: ignore[attr-defined]


def _placeholders(module: fx.GraphModule, arguments: Sequence[Any]) -> list[tuple[fx.Node, Any]]:
    return list(zip(module.graph.find_nodes(op="placeholder"), arguments))


def _not_for_us(module: fx.GraphModule, arguments: Sequence[Any]) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return "gradients are on; run it under torch.no_grad() to have it rewritten"
    if torch._C._is_any_autocast_enabled() or any("autocast" in str(n.target) for n in module.graph.nodes):
        return "autocast chooses types as the graph runs"
    return None


def _as_it_stands(module: fx.GraphModule, arguments: Sequence[Any], remark: str) -> Callable[..., Any]:
    reason = missing_compiler()
    _warn(remark if reason is None else f"{remark}; it runs call by call: {reason}")
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(_plain())(module, list(arguments))


def _plain() -> str:
    """torch's own backend for what is compiled as it stands."""
    return "inductor" if missing_compiler() is None else "eager"


def _warn(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning("%s", text)


class Compiled:
    """The code of one graph, for dynamo to call with its arguments."""

    def __init__(self, module: fx.GraphModule, arguments: Sequence[Any], chosen: Options) -> None:
        self.module = module
        self.lossy = chosen.plan is not None
        key = kept.key(module, arguments, chosen.codegen) if chosen.plan is None and chosen.recipe is None else None
        entry = kept.find(key, arguments) if key is not None else None
        self.was_kept = entry is not None
        entry = entry or self._made(arguments, chosen, key)
        self.run, self.inputs, self.results = entry.run, entry.inputs, entry.results
        self.frozen = Frozen(arguments, entry.frozen)
        self.numbers = list(entry.numbers.items())
        self.unfrozen: Callable[..., Any] | None = None
        self.others: Callable[..., Any] | None = None
        if chosen.plan is not None:
            self._settle(arguments, chosen.plan)

    def _settle(self, arguments: Sequence[Any], plan: Given) -> None:
        """Under a plan weights never become inputs, so dynamo need neither look at them nor hand them over."""
        if (found := watched.watch(self.module, self.frozen.positions)) is None:
            return
        model, places = found
        sources = [source_of(node) for node in self.module.graph.find_nodes(op="placeholder")]
        plan.require_same(model, {sources[i]: arguments[i] for i in self.frozen.positions})
        returned = {at for kind, at in self.results if kind == "argument"}
        places = {i: place for i, place in places.items() if i not in returned}
        left = [i for i in range(len(arguments)) if i not in places]
        now = {before: i for i, before in enumerate(left)}
        watched.leave_out(self.module, {i: arguments[i] for i in places})
        rest = [now[i] for i in self.frozen.positions if i in now]
        self.frozen = Frozen([arguments[i] for i in left], rest, list(places.values()))
        self.inputs = [now[i] for i in self.inputs]
        self.numbers = [(now[i], number) for i, number in self.numbers]
        self.results = [(kind, now[at] if kind == "argument" else at) for kind, at in self.results]

    def _made(self, arguments: Sequence[Any], chosen: Options, key: str | None) -> kept.Entry:
        try:
            captured = capture(self.module, arguments)
        except LwError:
            raise
        except Exception as error:
            raise Refused(f"it cannot be traced again ({type(error).__name__}: {_first_line(error)})") from error
        _compare(self.module, arguments, captured)
        graph = _rewritten(captured, chosen)
        codegen = _codegen(chosen.codegen, graph)
        code = codegen.compile(graph, captured.examples, captured.writes)
        _say_who_runs(graph, codegen)
        if key is not None:
            kept.keep(key, captured, codegen, code)
        run = codegen.bind(code.call, code.tensors)
        return kept.Entry(run, sorted(captured.frozen), captured.numbers, captured.inputs, captured.results)

    def __call__(self, *arguments: Any) -> Any:
        if self.unfrozen is None:
            if self.frozen.changed(arguments):
                if self.frozen.foreign(arguments) and not self.lossy:
                    return self._other(*arguments)
                self._thaw("a weight")
            if any(arguments[i].item() != number for i, number in self.numbers):
                self._thaw("a number that the model reads")
        if self.unfrozen is not None:
            return self.unfrozen(*arguments)
        made = self.run([as_input(arguments[i]) for i in self.inputs])
        return tuple(made[at] if kind == "output" else arguments[at] if kind == "argument" else at for kind, at in self.results)

    def _other(self, *arguments: Any) -> Any:
        """Another model of this class, which dynamo takes for this one."""
        if self.others is None:
            _warn(
                "another model of a class that was compiled before is called, or one whose weights were all replaced: its weights are "
                "inputs of its code, which is slower; compile it with options of its own, as {'codegen': 'inductor'}, to have them "
                "compiled in"
            )
            self.others = torch.compile(copy.deepcopy(self.module), backend=_plain())
        return self.others(*arguments)

    def _thaw(self, what: str) -> None:
        if self.lossy:
            raise Changed(what)
        _warn(
            f"{what} was changed after the model was compiled: from here on weights are inputs of the code, which is slower; "
            "call torch._dynamo.reset() to have the new ones compiled in"
        )
        self.frozen, self.numbers = Frozen((), ()), []
        self.unfrozen = torch.compile(copy.deepcopy(self.module), backend=_plain())


def _compare(module: fx.GraphModule, arguments: Sequence[Any], captured: Captured) -> None:
    """Raise `Refused` if the canonical graph computes something else than dynamo's on the first arguments."""
    mine, theirs = _cloned(arguments, captured.frozen), _cloned(arguments, captured.frozen)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = list(module(*theirs))
        torch.manual_seed(0)
        made = captured.graph.module()(*[as_input(mine[i]) for i in captured.inputs])
    positions = {i.name: at for i, at in zip(captured.graph.inputs, captured.inputs)}
    pairs = [(made[captured.graph.outputs.index(o)], theirs[positions[i]]) for o, i in captured.writes.items()]
    pairs += [(made[at], value) for (kind, at), value in zip(captured.results, wanted) if kind == "output"]
    for found, value in pairs:
        if not isinstance(value, Tensor):
            continue
        allowed = EXACT_TOLERANCE if value.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
        if (error := relative_error(value, found)) > allowed:
            raise Refused(f"rewritten, it differs by {error:.2g} relative to its largest value on these inputs")


def _cloned(arguments: Sequence[Any], frozen: Mapping[int, Tensor]) -> list[Any]:
    """The arguments for a trial run, which may write into them; sizes as numbers."""
    sizes = [a.node.hint if isinstance(a, torch.SymInt) else a for a in arguments]
    return [a.clone() if isinstance(a, Tensor) and i not in frozen else a for i, a in enumerate(sizes)]


def _rewritten(captured: Captured, chosen: Options) -> ModelGraph:
    """The graph after the recipe's exact passes and the plan; dynamo's names for things do not reach it."""
    program = Program({"forward": captured.graph}, captured.graph.store)
    if chosen.recipe is not None:
        for spec in chosen.recipe.passes:
            transform: TransformPass = make("passes", spec)
            if not transform.exact:
                raise BadPlan(
                    f"{chosen.recipe.where('passes')}: {spec} changes the function; a plan can, and a recipe here cannot"
                )
            structure = find_structure(program)
            ctx = Context(structure=structure, program=program, seed=chosen.recipe.seed)
            Manager(ctx).transform(program, [(site, transform) for site in transform.sites(structure.sites.values())])
    if chosen.plan is not None:
        program, remarks = apply(chosen.plan, program)
        for remark in remarks:
            if remark.kind == "refused":
                _warn(f"{remark.by} at {remark.site} was refused: {remark.text}")
    return program.main


def _say_who_runs(graph: ModelGraph, codegen: Codegen) -> None:
    """Log, once a graph, how many calls of each operator are whose. Nothing is computed for it unless somebody listens."""
    if log.isEnabledFor(logging.INFO):
        for line in who_runs(graph, codegen.executors(graph)):
            log.info("torch.compile, %s: %s", codegen.name, line)


def _codegen(name: str, graph: ModelGraph) -> Codegen:
    """The codegen of this name, or with "auto" the fastest that takes the graph, as far as they measure it; else of the highest rank."""
    if name != "auto":
        chosen: Codegen = make("codegens", name)
        reasons = [chosen.unavailable()] if chosen.unavailable() else chosen.unsupported(graph)
        if reasons:
            raise BadInput(f"the codegen {name} cannot be used: {'; '.join(map(str, reasons))}")
        return chosen
    found = [made for p in plugins("codegens") if (made := make("codegens", p.name)).automatic]
    found.sort(key=lambda c: -c.automatic)
    against = {c.name: c.unavailable() or "; ".join(c.unsupported(graph)) for c in found}
    by_rank = [c for c in found if not against[c.name]]
    if not by_rank:
        raise Refused(f"no codegen takes this graph ({'; '.join(against.values())})")
    if by_rank[0] is not found[0]:
        _warn(f"code is made by {by_rank[0].name}, which is slower than {found[0].name} is: {against[found[0].name]}")
    if graph.level() == "captured" or len(by_rank) == 1:
        return by_rank[0]
    measured = [(seconds, c) for c in by_rank if (seconds := c.seconds(graph)) is not None]
    return min(measured, key=lambda pair: pair[0])[1] if measured else by_rank[0]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
