"""The pass contract: what an analysis, a transform, a solver, an allocator, a healer, a backend and a codegen are.

A pass is a frozen dataclass. Its fields are its options, validated in `__post_init__`; `name` is what recipes and plans call
it. `spec()` writes a pass as one line and `configure` reads it back, so YAML, command line and Python say the same thing.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from lwcompile.errors import BadPlan
from lwcompile.site import SiteKind
from lwcompile.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from lwcompile.budget import Budget
    from lwcompile.context import Context
    from lwcompile.formats import NumericFormat, QuantizedTensor
    from lwcompile.graph import ModelGraph
    from lwcompile.plans import Plan
    from lwcompile.program import Program
    from lwcompile.site import Site
    from lwcompile.stats import InputStats
    from lwcompile.structure import Structure
    from lwcompile.table import OptionTable

P = TypeVar("P", bound="Pass")


@dataclass(frozen=True)
class Pass:
    """What all plugins share: a name, an API version, and options that are fields."""

    name: ClassVar[str]
    api: ClassVar[int] = 1

    def spec(self) -> Spec:
        """This pass as one line; options at their defaults are left out."""
        args = {
            field.name: _to_value(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return Spec(self.name, tuple(args.items()))


def _to_value(value: Any) -> Any:
    if isinstance(value, Pass):
        return value.spec()
    return tuple(map(_to_value, value)) if isinstance(value, list | tuple) else value


def configure(cls: type[P], spec: Spec) -> P:
    """The pass that `spec` describes. `BadPlan` names an unknown option, a value of the wrong type, or a refused value."""
    if spec.then:
        raise BadPlan(f"{spec} joins {len(spec.parts)} passes where one is wanted")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in spec.args:
        if key not in fields:
            offered = ", ".join(fields) or "none"
            raise BadPlan(f"{spec.name} has no option {key!r}; it has {offered}")
        values[key] = _checked(spec.name, key, value, hints[key])
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise BadPlan(f"{spec}: {error}") from error


def _checked(name: str, key: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    for kind in kinds:
        origin = typing.get_origin(kind)
        if origin is Literal and value in typing.get_args(kind):
            return value
        if kind is types.NoneType and value is None:
            return None
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str | Spec):
            return str(value)
        if kind is Spec and isinstance(value, str | Spec):
            return value if isinstance(value, Spec) else Spec.parse(value)
        if origin is tuple and isinstance(value, tuple):
            return tuple(_checked(name, key, v, typing.get_args(kind)[0]) for v in value)
    raise BadPlan(f"{name}: option {key!r} wants {' or '.join(map(_in_words, kinds))}, and got {value!r}")


def _in_words(kind: Any) -> str:
    """`int`; of a `Literal`, the choices."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return str(getattr(kind, "__name__", kind))


# --- analyses


@dataclass(frozen=True)
class Score:
    """A cheap ranking of sites in any unit: higher means that touching the site hurts more. `samples` is what it rests on."""

    value: float
    samples: int = 0
    spread: float = 0.0


@dataclass(frozen=True)
class Damage:
    """Harm in the task's unit: measured, or predicted by an analysis that says so. Interval at 95 %."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    samples: int = 0
    measured: bool = False


Annotation = Score | Damage


@dataclass(frozen=True)
class AnalysisPass(Pass):
    """Annotates sites and edits nothing: the manager compares the program's digest before and after.

    `run` yields `(site id, Score)`, or `(site id, option, Damage)` when it prices options one by one.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score] | tuple[str, Spec, Damage]]:
        raise NotImplementedError


# --- transforms


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a transform leaves at a site, for a backend to price: its shape, and its format or dense dtype."""

    shape: tuple[int, ...]
    format: NumericFormat | None = None
    dtype: str = "float32"
    role: Literal["linear", "embedding", "other"] = "other"


@dataclass(frozen=True)
class Needs:
    """What an option at one site asks of others, so that no plan takes it away.

    kept: ids of sites that must not be removed or replaced, nor what stands above them.
    shared: of a transform that `replaces`, own weight sites -> the sites whose tensors are read in their place. What those carry
        does its damage at both, and is stored once.
    """

    kept: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformPass(Pass):
    """Rewrites the graph at one site.

    Class attributes:
        kinds: the kinds of site it applies to.
        exact: promises the same function to relative 1e-5 in float32; otherwise its damage is measured.
        structural: changes what is computed; otherwise it gives a site a numeric format. A site takes one of each, in that order.
        silences: removes the sites below, so that their options no longer matter.
        replaces: with `silences`, what is below is still computed, of another site's tensors, and does not count as dropped.
        conflicts: names of transforms that must not stand at the same site.
    """

    kinds: ClassVar[tuple[SiteKind, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
    structural: ClassVar[bool] = True
    silences: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    conflicts: ClassVar[tuple[str, ...]] = ()

    def sites(self, sites: Iterable[Site]) -> list[Site]:
        """The sites it may be tried at; `check` has the last word."""
        return [site for site in sites if site.kind in self.kinds]

    def check(self, graph: ModelGraph, site: Site) -> None:
        """Raise `Refused` with the reason if it does not apply; edits nothing."""

    def needs(self, graph: ModelGraph, site: Site, structure: Structure) -> Needs:
        """What the option asks of other sites; `Refused` where they are not what it needs. Edits nothing."""
        return Needs()

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        """Rewrite `graph` at `site`."""
        raise NotImplementedError

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        """What the site stores afterwards; nothing by default."""
        return []

    def children(self, graph: ModelGraph, site: Site) -> list[Site]:
        """The weights that it leaves there, as sites that a numeric format at the same site goes to; by default the site's own.

        `graph` is the one before the edit. What a child is fed, `apply` says with `Context.derive`.
        """
        return [site] if site.kind in ("linear", "embedding") else []


# --- solvers, allocators, healers


@dataclass(frozen=True)
class Wanted:
    """How a solver would have its statistics taken.

    importance: tokens weigh their importance (`lwcompile.importance`) to this power; 0 takes all alike.
    drift: beside the inputs behind compressed layers, what the dense model feeds at the same tokens.
    """

    importance: float = 0.0
    drift: bool = False


@dataclass(frozen=True)
class Solver(Pass):
    """Finds the values of a numeric format for one weight."""

    needs_hessian: ClassVar[bool] = False

    @property
    def wanted(self) -> Wanted:
        """How the statistics it is given are taken."""
        return Wanted()

    def solve(self, weight: Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
        """weight [out, in] float32 -> codes, scales and zeros, on the weight's device. `stats` holds what is known of the layer's
        inputs, on the CPU, or None."""
        raise NotImplementedError


@dataclass(frozen=True)
class Allocator(Pass):
    """Turns damages, costs, constraints and a budget into a plan."""

    def allocate(self, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float] | None = None) -> Plan:
        """The plan of least predicted damage it finds under the budget; `InfeasibleBudget` says what could be met.

        `oracle` measures a whole plan's damage. Additive solvers do without: their plans are where a search starts.
        """
        raise NotImplementedError

    def measurements(self, budget: Budget, sublayers: int) -> int:
        """How many plans it asks the oracle for at most, of a model with so many sublayers: for progress and `--dry-run`."""
        return 0


@dataclass(frozen=True)
class Healing:
    """What a healer did.

    Attributes:
        steps: that it took.
        kept: the step whose tensors were kept; 0 if the program was best as it came.
        trained: numbers that it was free to change.
        damages: (step, damage) on the calibration samples that it held back.
    """

    steps: int
    kept: int
    trained: int
    damages: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class HealPass(Pass):
    """Trains what a plan changed against the dense model, for at most `steps` steps, whatever the clock says; resumable."""

    steps: int = 200

    def heal(self, program: Program, dense: Program, ctx: Context) -> Healing:
        """Bind trained tensors to names of `program`, in place; its nodes, and `dense`, stay as they are.

        `Refused` if there is nothing to train. The evaluation set is not its to look at.
        """
        raise NotImplementedError

    def forwards(self, samples: int) -> float:
        """How many samples run forward in all, a backward counted as two, from a calibration set of so many: for `--dry-run`."""
        return 0.0


# --- backends


@dataclass(frozen=True)
class Parity:
    """How far what a backend wrote is from the graph: the largest error relative to the largest output, per output.

    No errors at all mean that nothing was run, and `note` says why; the worst of them is then not a number.
    """

    errors: dict[str, float]
    tolerance: float
    note: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=float("nan"))


@dataclass(frozen=True)
class FusionGroup:
    """Nodes of an entry point, by name and in order, that a backend runs as one kernel."""

    entry: str
    kernel: str
    nodes: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Backend(Pass):
    """Prices tensors, lowers a program into files, and proves that they compute what the graph does.

    Class attributes:
        suffixes: of the files that it writes, so that a file's name says which backend is meant.
        file: the name of its main file, or of a folder of its own, for backends that are given the folder around it.
        writes: further files that are its own, where the source may have some of that name.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    file: ClassVar[str] = ""
    writes: ClassVar[tuple[str, ...]] = ()

    def unsupported(self, program: Program) -> list[str]:
        """Why this program cannot be lowered, one sentence a reason; empty if it can."""
        return []

    def price(self, tensor: StoredTensor) -> int:
        """Bytes on file of one stored tensor, with padding, scale dtype and unsupported widths counted. `Refused` for a numeric
        format that it has no form for: the option is then not offered, with that as the reason."""
        raise NotImplementedError

    def overhead(self, program: Program) -> int:
        """Bytes that belong to no tensor: the graph itself and its metadata."""
        return 0

    def fusion(self, program: Program) -> list[FusionGroup]:
        """The nodes that it would run as one kernel each; empty for a backend that leaves this to its runtime."""
        return []

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        """Node -> who runs it, in words, for every call of the graph; empty for a backend whose files are not run by it."""
        return {}

    def lower(self, program: Program, path: Path, ctx: Context) -> Parity:
        """Write the files, `path` the main one; run them; return the parity. A failure leaves no file."""
        raise NotImplementedError


# --- code in this process


@dataclass(frozen=True)
class Code:
    """What a codegen made of a graph.

    Attributes:
        call: from the tensors and then the inputs, in the graph's order, to its outputs, in order.
        tensors: what it takes before the inputs.
        save: writes it to a file for `Codegen.load`; None for code that lives in this process alone.
    """

    call: Callable[[Sequence[Tensor]], Sequence[Any]]
    tensors: tuple[Tensor, ...] = ()
    save: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Codegen(Pass):
    """Makes a graph into something to call in this process: what a compiler front end ends with.

    Class attributes:
        automatic: where several can take a graph and none was named, the one of the fewest `seconds` does, or where none measures,
            the one with the largest number; 0: only by name.
    """

    automatic: ClassVar[int] = 0

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, as a sentence; None if it can."""
        return None

    def unsupported(self, graph: ModelGraph) -> list[str]:
        """Why this graph cannot be taken, one sentence a reason; empty if it can."""
        return []

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        """Node -> who runs it, in words, for every call of the graph."""
        return {node.name: self.name for node in graph.graph.nodes if node.op == "call_function"}

    def seconds(self, graph: ModelGraph) -> float | None:
        """What one call's products with packed weights take here, as measured (`lwcompile.timings`); None if it measures nothing."""
        return None

    def compile(self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]) -> Code:
        """The graph's code.

        examples: one tensor an input, fake or real, whose sizes hold symbols where they may change.
        writes: output -> the input whose memory takes that output's value, beside its being returned.
        """
        raise NotImplementedError

    def load(self, path: Path) -> Callable[[Sequence[Tensor]], Sequence[Any]]:
        """The `call` of code that was saved."""
        raise NotImplementedError

    def bind(self, call: Callable[[Sequence[Tensor]], Sequence[Any]], tensors: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
        """The call from inputs alone."""
        return lambda values: call([*tensors, *values])


def who_runs(graph: ModelGraph, executors: Mapping[str, str]) -> list[str]:
    """`210 linear: the linear algebra library`, a line for each executor and operator, in the graph's order."""
    counts = Counter((_operator(n.target), executors[n.name]) for n in graph.graph.nodes if n.name in executors)
    return [f"{count} {operator}: {who}" for (operator, who), count in counts.items()]


def _operator(target: object) -> str:
    """`aten.linear`, without the overload; a Python function by its name."""
    name = getattr(target, "overloadpacket", None)
    return str(name) if name is not None else getattr(target, "__name__", str(target))
