"""Parallel blocks and sublayers equal the module whose forward was written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_drop import build, capture
from torch import Tensor, nn

from lwcompile.context import Context
from lwcompile.decode import derive_decode
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.manager import Manager, relative_error
from lwcompile.passes.transform.drop import Drop
from lwcompile.passes.transform.parallel import Parallel
from lwcompile.program import Program
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass
from lwcompile.tiny import models, programs, token_ids


def applied(program: Program, *steps: tuple[str, Any]) -> Program:
    structure = find_structure(program)
    ctx, changed = Context(structure=structure, program=program), program.copy()
    done = Manager(ctx).transform(changed, [(structure.sites[id], how) for id, how in steps])
    assert len(done) == len(steps), ctx.remarks
    return changed


def by_hand(model: Any, what: str, ids: Tensor) -> Tensor:
    """`lwcompile.tiny`'s decoder, or the one whose attention and MLP stand side by side."""
    x = model.embedding(ids)
    first, second = model.blocks
    if what == "mlp":
        x1 = x + first.attention(first.attention_norm(x))
        x = second(x1 + first.mlp(first.mlp_norm(x)))
    elif what == "attention":
        x1 = x + first.attention(first.attention_norm(x))
        x2 = x1 + first.mlp(first.mlp_norm(x1)) + second.attention(second.attention_norm(x1))
        x = x2 + second.mlp(second.mlp_norm(x2))
    else:
        x = first(x) + (second(x) - x)
    return model.head(model.norm(x))


@pytest.mark.parametrize(
    ("name", "what", "site"),
    [("decoder", "block", "block1"), ("decoder", "mlp", "block0.mlp"), ("decoder", "attention", "block1.attention"),
     ("parallel", "block", "block1")],
)  # fmt: skip
def test_parallel_equals_the_forward_written_by_hand(name: str, what: str, site: str) -> None:
    program, model = programs()[name], models()[name]
    with torch.no_grad():
        wanted = by_hand(model, what, token_ids())
    run = {"input_ids": token_ids()}
    assert relative_error(wanted, Executor(applied(program, (site, Parallel()))).run(run)["logits"]) < 1e-5
    assert relative_error(wanted, Executor(program).run(run)["logits"]) > 1e-4


class InStep(nn.Module):
    """Two layers on one input, for models whose layers return the stream."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.attention_type = getattr(first, "attention_type", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = self.first(x, *args, **kwargs), self.second(x, *args, **kwargs)
        return a + (b - x) if isinstance(a, Tensor) else (a[0] + (b[0] - x), *a[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "dinov2"])
def test_two_layers_run_on_one_input(name: str) -> None:
    model, example, layers = build(name)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(3)
    program = capture(model.eval(), example)
    changed = applied(program, ("block2", Parallel()))
    layers[1] = InStep(layers[1], layers[2])
    del layers[2]
    getattr(model, "config").num_hidden_layers = 3  # noqa: B009
    with torch.no_grad():
        wanted = model(**example)[program.main.outputs[0]]
    given = {k: v for k, v in example.items() if isinstance(v, Tensor)}
    assert relative_error(wanted, Executor(changed).run(given)[program.main.outputs[0]]) < 1e-5
    assert relative_error(wanted, Executor(program).run(given)[program.main.outputs[0]]) > 1e-4


def test_pairs_decode() -> None:
    import language_models as zoo
    from test_decode import assert_decodes

    graph = zoo.captured(zoo.NAMES[0])
    changed = applied(Program({"forward": graph}, graph.store), ("block1", Parallel()))
    assert_decodes(changed.main, derive_decode(changed.main), tokens=12)


def test_what_stands_before_it_may_go_afterwards() -> None:
    """With nothing between, side by side is one after the other."""
    program = tiny.llama_program(layers=3)
    run = {"input_ids": tiny.ids()}
    both = Executor(applied(program, ("block2", Parallel()), ("block1", Drop()))).run(run)["logits"]
    assert relative_error(Executor(applied(program, ("block1", Drop()))).run(run)["logits"], both) < 1e-5


def test_refusals_say_why() -> None:
    def reason(program: Program, id: str) -> str:
        structure = find_structure(program)
        with pytest.raises(Refused) as caught:
            Parallel().needs(program.main, structure.sites[id], structure)
        return str(caught.value)

    made = programs()
    assert "no block stands right before it" in reason(made["decoder"], "block0")
    assert "through a norm" in reason(made["encoder"], "block1")
    assert "beside the one before it already" in reason(made["parallel"], "block1.mlp")
    assert "is also read by" in reason(made["parallel"], "block1.attention")  # its norm is the MLP's too


def test_the_contract() -> None:
    assert "sites: applied at 5 in all" in check_pass(Parallel)
