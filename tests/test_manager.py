"""The contract, proved by passes that break it. Each test breaks one promise and checks that the program is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score, TransformPass
from lwcompile.errors import PluginError, Refused, VerificationError
from lwcompile.graph import ModelGraph
from lwcompile.manager import Manager, relative_error
from lwcompile.program import Program
from lwcompile.site import Site
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module

aten = torch.ops.aten


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tied(nn.Module):
    """Three residual blocks between an embedding and a head that share their weight."""

    def __init__(self, width: int = 8, vocabulary: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[Mlp(width) for _ in range(3)])

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.blocks(self.embedding(input_ids)) @ self.embedding.weight.T}


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    graph, _ = capture_module(Tied(), {"input_ids": torch.arange(10).reshape(2, 5)}, {"input_ids": {0: "batch", 1: "sequence"}})
    return Program({"forward": graph}, graph.store)


@pytest.fixture
def ctx(program: Program) -> Context:
    return Context(structure=find_structure(program), program=program)


@dataclass(frozen=True)
class AtLinears(TransformPass):
    """What the broken transforms below share: they are tried at the first `up`."""

    name: ClassVar[str] = "broken"
    kinds: ClassVar[tuple[Any, ...]] = ("linear",)

    def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
        raise NotImplementedError

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        self.edit(graph, graph.node(site.node))


def attempt(program: Program, ctx: Context, transform: TransformPass, error: type[Exception], words: str) -> str:
    """Run the transform; it must fail with these words and leave the program bit for bit as it was."""
    before, annotations = program.digest(), dict(program.annotations)
    site = ctx.find_structure(program).sites["block0.mlp.up"]
    with pytest.raises(error, match=words) as caught:
        Manager(ctx).transform(program, [(site, transform)])
    assert program.digest() == before
    assert program.annotations == annotations
    return str(caught.value)


def test_a_changed_dtype_fails(program: Program, ctx: Context) -> None:
    class Half(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            (result,) = graph.output_node.args[0]  # type: ignore[misc]
            with graph.graph.inserting_before(graph.output_node):
                cast = graph.graph.call_function(aten._to_copy.default, (result,), {"dtype": torch.float16})
            graph.output_node.args = ((cast,),)

    message = attempt(program, ctx, Half(), VerificationError, "output 'logits' was .*float32.* and is now .*float16")
    assert "broken at block0.mlp.up" in message and "_to_copy" in message


def test_shapes_that_do_not_fit_show_the_node_in_its_surroundings(program: Program, ctx: Context) -> None:
    class Narrow(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            weight = graph.tensor("blocks.0.up.weight")
            graph.set_tensor("blocks.0.up.weight", weight[:, :-1].contiguous())

    message = attempt(program, ctx, Narrow(), VerificationError, "shapes do not fit")
    assert "  > " in message and "layer_norm" in message


def test_a_dangling_parameter_fails(program: Program, ctx: Context) -> None:
    class Forgetful(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            graph.set_tensor("left.over", torch.zeros(3))

    attempt(program, ctx, Forgetful(), VerificationError, "nothing reads, such as 'left.over'")


def test_a_call_that_nobody_reads_fails(program: Program, ctx: Context) -> None:
    class Litter(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            with graph.graph.inserting_after(node):
                graph.graph.call_function(aten.neg.default, (node,))

    attempt(program, ctx, Litter(), VerificationError, "whose result nobody reads")


def test_a_read_of_an_unbound_tensor_fails(program: Program, ctx: Context) -> None:
    class Unbound(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            del graph.tensors["blocks.0.up.weight"]

    attempt(program, ctx, Unbound(), VerificationError, "bound to no tensor")


def test_broken_sharing_fails(program: Program, ctx: Context) -> None:
    class Untie(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            head = next(n for n in reversed(graph.nodes) if n.target is aten.linear.default)
            with graph.graph.inserting_before(head):
                own = graph.get_attr("head.weight", graph.tensor("embedding.weight") * 2)
            head.replace_input_with(head.args[1], own)  # type: ignore[arg-type]

    attempt(program, ctx, Untie(), VerificationError, "sharing must stay intact")


def test_a_lost_input_fails(program: Program, ctx: Context) -> None:
    class Rename(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            graph.input_nodes()["input_ids"].target = "tokens"

    attempt(program, ctx, Rename(), VerificationError, "the inputs were")


def test_an_operator_that_writes_its_inputs_fails(program: Program, ctx: Context) -> None:
    class Inplace(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            relu = next(iter(node.users))
            relu.target = aten.relu_.default

    attempt(program, ctx, Inplace(), VerificationError, "writes its inputs")


def test_a_stored_tensor_written_in_place_fails(program: Program, ctx: Context) -> None:
    class Scribble(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            graph.tensor("blocks.0.up.weight").mul_(1.0)

    attempt(program, ctx, Scribble(), VerificationError, "written in place")


def test_an_exact_pass_with_other_numbers_fails(program: Program, ctx: Context) -> None:
    class Nudge(AtLinears):
        exact: ClassVar[bool] = True

        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            graph.set_tensor("blocks.0.up.weight", graph.tensor("blocks.0.up.weight") * 1.01)

    attempt(program, ctx, Nudge(), VerificationError, "promises the same function, but output 'logits' differs")


def test_an_exact_pass_that_keeps_its_word_commits_and_drops_annotations(program: Program, ctx: Context) -> None:
    class Split(AtLinears):
        exact: ClassVar[bool] = True
        preserves: ClassVar[tuple[str, ...]] = ("kept",)

        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            with graph.graph.inserting_after(node):
                twice = graph.graph.call_function(aten.neg.default, (node,))
            with graph.graph.inserting_after(twice):
                again = graph.graph.call_function(aten.neg.default, (twice,))
            node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not twice)

    before = program.digest()
    program.annotations = {"kept": {}, "stale": {}}
    site = ctx.find_structure(program).sites["block0.mlp.up"]
    done = Manager(ctx).transform(program, [(site, Split())])
    assert [s.id for s, _ in done] == ["block0.mlp.up"]
    assert program.digest() != before
    assert program.annotations == {"kept": {}}


def test_an_exception_half_way_leaves_the_program(program: Program, ctx: Context) -> None:
    class HalfWay(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.prune()
            raise RuntimeError("half way")

    message = attempt(program, ctx, HalfWay(), PluginError, "half way")
    assert "block0.mlp.up" in message and __name__ in message


def test_a_late_refusal_undoes_its_own_edits_and_keeps_the_others(program: Program, ctx: Context) -> None:
    @dataclass(frozen=True)
    class Picky(AtLinears):
        def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
            graph.set_tensor(str(site.weight), graph.tensor(str(site.weight)) * 0.5)
            if site.id == "block1.mlp.up":
                raise Refused("the second one is too good to change", site=site.id)

    sites = ctx.find_structure(program).sites
    untouched = program.main.tensors["blocks.1.up.weight"]
    steps = [(sites[f"block{i}.mlp.up"], Picky()) for i in range(3)]
    done = Manager(ctx).transform(program, steps)
    assert [s.id for s, _ in done] == ["block0.mlp.up", "block2.mlp.up"]
    assert program.main.tensors["blocks.1.up.weight"] == untouched
    assert [(r.site, r.kind, r.text) for r in ctx.remarks] == [
        ("block1.mlp.up", "refused", "the second one is too good to change")
    ]


def test_damage_past_the_limit_is_rolled_back_and_said(program: Program, ctx: Context) -> None:
    @dataclass(frozen=True)
    class Zero(AtLinears):
        def edit(self, graph: ModelGraph, node: torch.fx.Node) -> None:
            graph.set_tensor("blocks.0.up.weight", torch.zeros_like(graph.tensor("blocks.0.up.weight")))

    before = program.digest()
    ids = torch.arange(10).reshape(2, 5)
    dense = program.main.module()(ids)[0]

    def measure(draft: Program) -> float:
        return relative_error(dense, draft.main.module()(ids)[0])

    site = ctx.find_structure(program).sites["block0.mlp.up"]
    manager = Manager(ctx, measure, limit=1e-6)
    assert manager.transform(program, [(site, Zero())]) == []
    assert program.digest() == before
    (remark,) = ctx.remarks
    assert "rolled back" in remark.text and remark.numbers["damage"] > 1e-6
    assert Manager(ctx, measure, limit=10.0).transform(program, [(site, Zero())])
    assert program.digest() != before


@dataclass(frozen=True)
class Looks(AnalysisPass):
    """What the analyses below share."""

    name: ClassVar[str] = "looks"
    provides: ClassVar[tuple[str, ...]] = ("looks",)

    def meddle(self, program: Program) -> None:
        return

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        self.meddle(program)
        for site in ctx.find_structure(program).of_kind("linear"):
            yield site.id, Score(float(program.main.tensor(str(site.weight)).square().mean()))


def test_an_analysis_that_edits_fails(program: Program, ctx: Context) -> None:
    class Edits(Looks):
        def meddle(self, program: Program) -> None:
            program.main.set_tensor("blocks.0.up.weight", torch.zeros(16, 8))

    with pytest.raises(VerificationError, match="only annotates"):
        Manager(ctx).analyze(program, Edits())
    assert "looks" not in program.annotations


def test_an_analysis_that_edits_behind_the_frameworks_back_fails(program: Program, ctx: Context) -> None:
    class Sneaks(Looks):
        def meddle(self, program: Program) -> None:
            program.main.tensor("blocks.0.up.weight").data.mul_(2.0)  # no version counter sees this

    with pytest.raises(VerificationError, match="behind the framework's back"):
        Manager(ctx).analyze(program, Sneaks())


def test_an_analysis_annotates(program: Program, ctx: Context) -> None:
    found = Manager(ctx).analyze(program, Looks())
    weight = program.main.tensor("blocks.1.down.weight")
    assert found["block1.mlp.down"] == Score(float(weight.square().mean()))
    assert program.annotations["looks"] == found


def test_a_missing_requirement_names_the_key(program: Program, ctx: Context) -> None:
    class Needs(AtLinears):
        requires: ClassVar[tuple[str, ...]] = ("curvature",)

    attempt(
        program, ctx, Needs(), Refused, "requires the annotation 'curvature', which is missing; no installed pass provides it"
    )


def test_an_analysis_that_raises_is_named(program: Program, ctx: Context) -> None:
    class Raises(Looks):
        def meddle(self, program: Program) -> None:
            raise ZeroDivisionError("by design")

    with pytest.raises(PluginError, match=r"looks .*by design"):
        Manager(ctx).analyze(program, Raises())
