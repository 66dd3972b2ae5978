"""`check_pass`, tried with passes that keep the contract and with one for each clause that they can break."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from tiny import pair

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Annotation, Damage, Score, Solver, StoredTensor, TransformPass
from lwcompile.errors import Refused, VerificationError
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import ModelGraph
from lwcompile.passes.solve.rtn import Rtn
from lwcompile.passes.transform.drop import Drop
from lwcompile.program import Program
from lwcompile.registry import load
from lwcompile.site import Site
from lwcompile.spec import Spec
from lwcompile.stats import InputStats
from lwcompile.testing import check_pass
from lwcompile.tiny import Decoder, models, programs, token_ids

aten = torch.ops.aten
UP = "block0.mlp.up_proj"


def breaks(given: Any, clause: str, words: str, sites: tuple[str, ...] | None = (UP,)) -> None:
    with pytest.raises(VerificationError, match=words) as caught:
        check_pass(given, programs()["decoder"], sites)
    assert f"breaks the clause '{clause}" in str(caught.value)


# --- passes that keep it


def test_the_plugins_passes_keep_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugin"))
    from lwcompile_example_plugin.half import Half  # type: ignore[import-not-found]
    from lwcompile_example_plugin.kurtosis import Kurtosis  # type: ignore[import-not-found]

    assert "annotations: 38 in all" in check_pass(Kurtosis)
    report = check_pass(Half("bfloat16"), programs()["decoder"])
    assert "options: half{dtype=bfloat16} reads back as itself" in report
    assert "sites: applied at 3 in all" in report, report


@pytest.mark.parametrize(("group", "name"), [("solvers", "rtn"), ("solvers", "hqq"), ("solvers", "gptq"), ("passes", "zd")])
def test_built_in_passes_keep_the_contract(group: Any, name: str) -> None:
    report = check_pass(load(group, name))
    assert len(report) >= 6, report


def test_drop_keeps_the_contract_on_every_kind_of_model() -> None:
    report = check_pass(Drop)
    assert "sites: applied at 18 in all" in report
    assert "declarations: lossy, structural, silences the sites below" in report


def test_a_program_of_ones_own() -> None:
    report = check_pass(Drop, programs()["encoder"], ["block1.mlp"])
    assert any(line.startswith("contract on encoder: block1.mlp; damage at most") for line in report)


def test_a_program_of_two_entries() -> None:
    _, _, program = pair()
    assert "annotations: 9 in all" in check_pass(load("passes", "zd"), program.copy())
    assert any(line.startswith("contract on pair: decoder.head; damage") for line in check_pass(Scale, program, ["decoder.head"]))


def test_an_unknown_site_is_named() -> None:
    breaks(Drop, "sites of decoder", "no site 'block7'; it has block0", ("block7",))


# --- clauses of every pass


@dataclass(frozen=True)
class Norms(AnalysisPass):
    """The norm of each linear's weight. Cost: one look at the weights."""

    name: ClassVar[str] = "norms"

    power: float = 2.0

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Annotation]]:  # type: ignore[override]
        for site in ctx.find_structure(program).of_kind("linear"):
            yield site.id, self.score(program, program.main.tensor(str(site.weight)))

    def score(self, program: Program, weight: torch.Tensor) -> Annotation:
        return Score(float(weight.norm(p=self.power)))


def test_an_honest_analysis_passes() -> None:
    assert "annotations: 13 in all" in check_pass(Norms(1.0), programs()["decoder"])


def test_a_name_that_a_spec_cannot_hold() -> None:
    class Named(Norms):
        name: ClassVar[str] = "two words"

    breaks(Named, "name", "two words")


def test_another_version_of_the_contract() -> None:
    class Older(Norms):
        api: ClassVar[int] = 0

    breaks(Older, "api", "written for version 0, and this is version 1")


def test_options_lost_for_want_of_the_decorator() -> None:
    class Undecorated(Norms):
        limit: float = 1.0

    breaks(Undecorated, "frozen", r"limit is no option, because the class lacks @dataclass\(frozen=True\)")


def test_options_that_do_not_read_back() -> None:
    @dataclass(frozen=True)
    class Rounds(Norms):
        steps: int = 3

        def __post_init__(self) -> None:
            object.__setattr__(self, "steps", self.steps + 1)

    breaks(Rounds, "options", "reads back as")


def test_an_option_of_a_type_that_no_spec_holds() -> None:
    @dataclass(frozen=True)
    class Holds(Norms):
        table: dict[str, int] = field(default_factory=dict)

    breaks(Holds, "options", "dict|table")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with these names and no docstring."""
    made = ModuleType("nowhere")
    vars(made).update({**globals(), "__doc__": None})
    monkeypatch.setitem(sys.modules, "nowhere", made)
    return "nowhere"


def test_no_documentation(nowhere: str) -> None:
    @dataclass(frozen=True)
    class Silent(AnalysisPass):
        name: ClassVar[str] = "silent"

    Silent.__module__ = nowhere
    breaks(Silent, "documentation", "neither the class nor its module has a docstring")


def test_documentation_without_the_cost(nowhere: str) -> None:
    @dataclass(frozen=True)
    class Free(AnalysisPass):
        """Norms."""

        name: ClassVar[str] = "free"

    Free.__module__ = nowhere
    breaks(Free, "documentation", "no word of what it costs")


def test_a_pass_that_does_not_construct() -> None:
    @dataclass(frozen=True)
    class Needy(Norms):
        tokens: int = field(kw_only=True)

    breaks(Needy, "options", "tokens")


# --- clauses of analyses


def test_an_analysis_that_edits() -> None:
    class Edits(Norms):
        def score(self, program: Program, weight: torch.Tensor) -> Annotation:
            program.main.set_tensor("embedding.weight", torch.zeros(61, 32))
            return Score(1.0)

    breaks(Edits, "contract on decoder", "edited the program")


def test_an_unknown_site() -> None:
    class Elsewhere(Norms):
        def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Annotation]]:  # type: ignore[override]
            yield "block9", Score(1.0)

    breaks(Elsewhere, "annotations on decoder", "'block9', which is no site")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Score(float("nan")), "the value is nan"),
        (Damage(float("inf")), "the value is inf"),
        (Score(torch.tensor(1.0)), "a Tensor, not a plain number"),  # type: ignore[arg-type]
        (1.0, "yields a float, not a Score or Damage"),
    ],
)
def test_numbers_that_nobody_can_use(value: Any, words: str) -> None:
    class Bad(Norms):
        def score(self, program: Program, weight: torch.Tensor) -> Annotation:
            return value

    breaks(Bad, "annotations on decoder", words)


def test_an_analysis_that_depends_on_the_global_seed() -> None:
    class Random(Norms):
        def score(self, program: Program, weight: torch.Tensor) -> Annotation:
            return Score(torch.rand(()).item())

    breaks(Random, "determinism on decoder", "13 sites differ twice under one seed")


def test_an_analysis_that_does_not_resume() -> None:
    class Forgets(Norms):
        def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Annotation]]:  # type: ignore[override]
            found = ctx.cached("key", lambda: {"value": 0.1, "fresh": ctx.rundir is None})
            yield UP, Score(found["value"])
            if ctx.rundir is not None:
                ctx.rundir.put("key", {"value": 0.2})

    breaks(Forgets, "resuming on decoder", "differ from its own run directory")


def test_an_analysis_that_says_nothing() -> None:
    class Mute(Norms):
        def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Annotation]]:  # type: ignore[override]
            yield from ()

    breaks(Mute, "annotations", "annotates nothing")


def test_an_analysis_may_refuse_a_model_with_a_reason() -> None:
    class Picky(Norms):
        def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Annotation]]:  # type: ignore[override]
            if "logits" not in program.main.outputs:
                raise Refused("it reads logits, and this model has none")
            yield from super().run(program, ctx)

    report = check_pass(Picky)
    assert "refusal on encoder: it reads logits, and this model has none" in report
    assert "annotations: 26 in all" in report


# --- clauses of transforms


@dataclass(frozen=True)
class Scale(TransformPass):
    """linear(x, W) -> linear(x, W * factor). Cost: none."""

    name: ClassVar[str] = "scale"
    kinds: ClassVar[tuple[Any, ...]] = ("linear",)

    factor: float = 0.5

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        graph.set_tensor(str(site.weight), graph.tensor(str(site.weight)) * self.factor)

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        return [StoredTensor(site.shape)]


def test_an_honest_transform_passes() -> None:
    report = check_pass(Scale, programs()["decoder"], [UP])
    assert any(line.startswith(f"contract on decoder: {UP}; damage at most") for line in report), report


def test_kinds_that_do_not_exist() -> None:
    class Nowhere(Scale):
        kinds: ClassVar[tuple[Any, ...]] = ("linear", "kitchen")

    breaks(Nowhere, "kinds", "kitchen is no kind of site")


def test_declarations_that_contradict_each_other() -> None:
    class Both(Scale):
        exact: ClassVar[bool] = True
        silences: ClassVar[bool] = True

    breaks(Both, "declarations", "cannot be exact as well")


def test_a_check_that_edits() -> None:
    class Meddles(Scale):
        def check(self, graph: ModelGraph, site: Site) -> None:
            self.apply(graph, site, Context())

    breaks(Meddles, f"check at decoder:{UP}", "`check` edits the graph")


def test_a_refusal_without_a_reason() -> None:
    class Sulks(Scale):
        def check(self, graph: ModelGraph, site: Site) -> None:
            raise Refused("")

    breaks(Sulks, f"check at decoder:{UP}", "refuses without a reason")


def test_a_transform_that_applies_nowhere() -> None:
    class Never(Scale):
        def check(self, graph: ModelGraph, site: Site) -> None:
            raise Refused("not today", site=site.id)

    breaks(Never, "sites", "applies nowhere")


def test_a_transform_that_does_nothing() -> None:
    class Idle(Scale):
        def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
            pass

    breaks(Idle, f"contract at decoder:{UP}", "changed nothing, and did not refuse")


def test_the_verifier_is_part_of_it() -> None:
    class Litters(Scale):
        def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
            graph.set_tensor("left.over", torch.zeros(3))

    breaks(Litters, f"contract at decoder:{UP}", "nothing reads, such as 'left.over'")


def test_an_exact_transform_is_held_to_it() -> None:
    class Claims(Scale):
        exact: ClassVar[bool] = True

    breaks(Claims, f"contract at decoder:{UP}", "promises the same function")


def test_an_exact_transform_is_held_to_it_at_other_sizes() -> None:
    """Right at the probes' 12 positions, wrong at any other number of them."""

    class Fitted(Scale):
        exact: ClassVar[bool] = True

        def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
            node, ids = graph.node(site.node), graph.input_nodes()["input_ids"]
            with graph.graph.inserting_after(node):
                ones = graph.graph.call_function(aten.ones_like.default, (ids,), {"dtype": torch.float32})
            with graph.graph.inserting_after(ones):
                count = graph.graph.call_function(aten.sum.dim_IntList, (ones, [1], True))
            with graph.graph.inserting_after(count):
                part = graph.graph.call_function(aten.div.Tensor, (count, 12.0))
            with graph.graph.inserting_after(part):
                column = graph.graph.call_function(aten.unsqueeze.default, (part, -1))
            with graph.graph.inserting_after(column):
                scaled = graph.graph.call_function(aten.mul.Tensor, (node, column))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    breaks(Fitted, f"contract at decoder:{UP}", "promises the same function; logits differs by .* on 3 x 7 inputs")


def test_a_transform_that_depends_on_the_global_seed() -> None:
    class Random(Scale):
        def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
            graph.set_tensor(str(site.weight), torch.rand(site.shape))

    breaks(Random, f"contract at decoder:{UP}", "two runs under one seed make different programs")


def test_bytes_that_count_as_nothing() -> None:
    class Free(Scale):
        def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
            return []

    breaks(Free, f"contract at decoder:{UP}", "its bytes would count as nothing")


def test_values_that_are_not_finite() -> None:
    breaks(Scale(float("1e39")), f"contract at decoder:{UP}", "is not finite|infin")


def test_silencing_without_saying_so() -> None:
    class Quiet(Drop):
        silences: ClassVar[bool] = False

    breaks(Quiet, "contract at decoder:block0.mlp", "`silences` does not say so", ("block0.mlp",))


def test_saying_so_without_silencing() -> None:
    class Loud(Scale):
        kinds: ClassVar[tuple[Any, ...]] = ("mlp",)
        silences: ClassVar[bool] = True

        def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
            super().apply(graph, ctx.find_structure(programs()["decoder"]).sites[UP], ctx)

    breaks(Loud, "contract at decoder:block0.mlp", "is still computed", ("block0.mlp",))


def test_sites_of_another_kind() -> None:
    class Wanders(Scale):
        def sites(self, sites: Any) -> list[Site]:
            return list(sites)

    breaks(Wanders, "sites of decoder", "of the kind block", None)


# --- solvers


def test_a_solver_with_the_wrong_format() -> None:
    class Coarse(Rtn):
        def solve(self, weight: torch.Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
            return super().solve(weight, NumericFormat(4), stats)

    breaks(Coarse, "solve to 2 bits", "it gives NumericFormat")


def test_a_solver_that_writes_into_the_weight() -> None:
    class Scribbles(Rtn):
        def solve(self, weight: torch.Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
            made = super().solve(weight, format, stats)
            weight.mul_(0.5)
            return made

    breaks(Scribbles, "solve to 2 bits", "writes into the weight")


@dataclass(frozen=True)
class Flat(Solver):
    """All codes are zero. Cost: none."""

    name: ClassVar[str] = "flat"

    def solve(self, weight: torch.Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
        made = Rtn().solve(weight, format, stats)
        shrink = torch.tensor(2.0 ** (format.bits - 8))
        return QuantizedTensor(format, made.codes, made.scale * (1 - shrink), made.zero)


def test_a_solver_that_gets_worse_with_bits() -> None:
    breaks(Flat, "error falls with bits", "does not fall")


# --- the models it runs on


def test_the_models_leave_the_global_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = models(), models()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first["decoder"].state_dict().values(), second["decoder"].state_dict().values()))


def test_the_programs_equal_the_models_at_other_sizes() -> None:
    ids = token_ids(3, 7, seed=5)
    for name, model in models().items():
        program = programs()[name]
        with torch.no_grad():
            wanted, found = model(ids)[program.main.outputs[0]], program.main.module()(ids)[0]
        assert torch.allclose(wanted, found, rtol=0, atol=1e-5 * wanted.abs().max().item()), name


def test_the_decoder_is_tied_and_copies_are_fresh() -> None:
    first, second = programs()["decoder"], programs()["decoder"]
    first.main.set_tensor("embedding.weight", torch.zeros(61, 32))
    assert first.digest() != second.digest()
    assert Decoder().head.weight is not Decoder().embedding.weight
    assert len([key for name, key in second.main.tensors.items() if "embedding" in name or "head" in name]) >= 1


def test_specs_of_checked_passes_are_plain() -> None:
    assert str(Norms(1.0).spec()) == "norms{power=1.0}"
    assert Spec.parse(str(Scale().spec())) == Spec("scale")
