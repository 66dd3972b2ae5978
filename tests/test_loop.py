"""Looped stacks: the module whose layers hold the looped weights, the model itself at full rank, and bytes as priced."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_drop import outputs_differ
from test_share import PARTS, captured, priced, share

from lwcompile.apply import apply_plan
from lwcompile.context import Context
from lwcompile.contract import Wanted
from lwcompile.decode import derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.passes.transform.loop import Loop
from lwcompile.passes.transform.share import Share
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.spec import Spec
from lwcompile.structure import find_structure


def looped(program: Program, how: Loop) -> Program:
    """The program with the option at every block that takes it."""
    structure, blocks = find_structure(program), []
    for site in structure.of_kind("block"):
        try:
            how.needs(program.entries[site.entry], site, structure)
        except Refused:
            continue
        blocks.append(site.id)
    assert blocks
    return share(program, *((id, how) for id in blocks))


@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_loop_equals_the_module_with_the_weights_put_there(name: str, init: Any) -> None:
    """Four layers: 0 1 2 3 as 0 1 0 1, whose weights are the means, those of 0 and 3, or those of 0 and 1."""
    model, example, program = captured(name)
    model = copy.deepcopy(model)
    made = looped(program, Loop(first=0, last=0, init=init))
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    before, norms = copy.deepcopy(layers), [p for part in PARTS[name][2:] for p in part.split()]
    sources = {"average": ((0, 2), (1, 3)), "stepwise": ((0,), (3,)), "lower": ((0,), (1,))}[init]
    with torch.no_grad():
        for at, layer in enumerate(layers):
            for key, parameter in layer.named_parameters():
                if not any(key.startswith(norm) for norm in norms):
                    meant = [dict(before[i].named_parameters())[key] for i in sources[at % 2]]
                    parameter.copy_(torch.stack(tuple(meant)).mean(0))
    assert outputs_differ(made, model, example) < 1e-5
    assert outputs_differ(program, model, example) > 1e-3
    assert made.parameter_count() < program.parameter_count()


def test_a_loop_of_means_is_what_sharing_them_one_by_one_makes() -> None:
    _, _, program = captured("gpt2")
    made = looped(program, Loop(first=0, last=0))
    by_hand = share(program, *((f"block{i}", Share(-2, mean=True)) for i in (2, 3)))
    assert made.digest() == by_hand.digest()


@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
def test_full_rank_is_the_model_itself(init: Any) -> None:
    model, example, program = captured("bert")
    made = looped(program, Loop(first=0, last=0, init=init, rank=10**6))
    assert outputs_differ(made, model, example) < 1e-5
    assert made.main.tensors != program.main.tensors


def test_the_middle_is_cycled_and_the_ends_are_not() -> None:
    program = tiny.llama_program(layers=8)
    structure = find_structure(program)
    made = looped(program, Loop(loops=3))
    keys = [made.main.tensors[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(8)]
    assert keys[1:3] == keys[3:5] == keys[5:7] and len(set(keys)) == 4
    mean = sum(program.main.tensor(f"model.layers.{i}.mlp.up_proj.weight") for i in (1, 3, 5)) / 3
    torch.testing.assert_close(made.main.tensor("model.layers.3.mlp.up_proj.weight"), mean)

    def reason(block: int, how: Loop) -> str:
        with pytest.raises(Refused) as caught:
            how.needs(program.main, structure.sites[f"block{block}"], structure)
        return str(caught.value)

    assert "stands outside of the loop" in reason(7, Loop())
    assert "is a looped block" in reason(2, Loop())
    assert "the 6 blocks between the first and the last ones are not 4 loops" in reason(5, Loop(loops=4))
    bad: dict[str, Any]
    for bad in ({"loops": 1}, {"rank": 4, "ratio": 0.1}, {"ratio": 2.0}, {"importance": -1.0}):
        with pytest.raises(BadPlan):
            Loop(**bad)


@pytest.mark.parametrize("option", ["loop{rank=4}", "loop{ratio=0.3,init=stepwise}", "loop", "loop{rank=4} + quantize{bits=8}"])
def test_bytes_are_as_priced(option: str) -> None:
    """All of a loop together, residuals of the looped block among them."""
    program, spec = tiny.llama_program(layers=6), Spec.parse(option)
    structure = find_structure(program)
    table, made = priced(program, Recipe.parse(f"options: {{block: ['{option}']}}"))
    chosen = {id: spec.parts for id in made.options}
    assert list(chosen) == ["block3", "block4"]
    ctx = Context(structure=structure, program=program, calibration=tiny.calibration())
    compressed = apply_plan(program, chosen, structure, ctx)
    assert not [r for r in ctx.remarks if r.kind == "refused"]
    saved = program.nbytes() - compressed.nbytes()
    assert saved == table.evaluate({}).bytes - table.evaluate(chosen).bytes > 0


def test_a_plan_may_say_it_of_all_blocks_in_one_line(tmp_path: Path) -> None:
    program, spec = tiny.llama_program(layers=6), Spec.parse("loop{rank=4}")
    table, _ = priced(program, Recipe.parse(f"options: {{block: ['{spec}', drop]}}"))
    (tmp_path / "plan.yaml").write_text('sites:\n  block0: drop\n  "block*": loop{rank=4}\n')
    plan = Plan.load(tmp_path / "plan.yaml").spread(table)
    assert plan.choices == {"block0": (Spec("drop"),), "block3": (spec,), "block4": (spec,)}
    assert plan.where("block4").endswith("plan.yaml:3")
    plan.validate(table)
    with pytest.raises(BadPlan, match=r"plan.yaml:2: no site that 'block\*.mlp' matches can carry loop"):
        (tmp_path / "plan.yaml").write_text('sites:\n  "block*.mlp": loop\n')
        Plan.load(tmp_path / "plan.yaml").spread(table)


def test_residuals_are_nearest_in_the_norm_of_the_outputs() -> None:
    program = tiny.llama_program(layers=6)
    ctx = Context(structure=find_structure(program), program=program, calibration=tiny.calibration(8), batch_size=8)
    site = ctx.structure.sites["block3.mlp.down_proj"]  # type: ignore[union-attr]
    stats = ctx.stats_of(program.main, site, Wanted(0.5))
    assert stats is not None
    edited = ctx.edited(program, ["block3"], [Spec.parse("loop{rank=5}")]).main
    name = str(site.weight)
    own, source = (program.main.tensor(name.replace("3", layer, 1)).double() for layer in "31")
    lower = torch.linalg.cholesky(stats.hessian.double() + 1e-9 * torch.eye(64))
    left = own - (own + source) / 2 - edited.tensor(f"{name}_up").double() @ edited.tensor(f"{name}_down").double()
    tail = torch.linalg.svdvals((own - source) / 2 @ lower)[5:].square().sum()
    assert (left @ lower).square().sum().item() == pytest.approx(tail.item(), rel=1e-3)


def test_a_loop_decodes_and_is_a_file(tmp_path: Path) -> None:
    program = tiny.llama_program(layers=4)
    made = looped(program, Loop(rank=4))
    derive_decode(made.main)  # raises where decoding step by step differs
    onnx = pytest.importorskip("lwcompile.backends.onnx.backend", reason="install lwcompile[onnx]")
    assert onnx.Onnx().lower(made, tmp_path / "model.onnx", Context(program=made)).worst < 2e-5
