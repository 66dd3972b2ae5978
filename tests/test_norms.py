"""Norms folded and frozen: equal to the model, or to the module with its norms replaced by hand, to relative 1e-5 (1e-9 in float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_drop import build, capture, outputs_differ
from torch import nn

from lwcompile.context import Context
from lwcompile.graph import iterate_calls
from lwcompile.manager import Manager, relative_error
from lwcompile.passes.transform.fold_norms import FoldNorms
from lwcompile.program import Program
from lwcompile.residual import NORMS
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass

pytest.importorskip("transformers", reason="the references are transformers' own modules: install lwcompile[hf]")

FOLDED = {"llama": 9, "qwen3": 9, "gpt2": 8, "gpt_neox": 9, "bert": 0, "vit": 8, "dinov2": 8, "t5": 8}
"""Of 4 blocks' norms, those that only linears read whose weights nothing else reads."""
KEPT = {
    "llama": {}, "qwen3": {"block3.attention.k_norm": "no linear"}, "gpt2": {"final_norm": "shares its weight with embedding"},
    "gpt_neox": {}, "bert": {"block2.mlp.post_norm": "add_"}, "vit": {"final_norm": "an output"}, "dinov2": {}, "t5": {},
}  # fmt: skip


def made(name: str, double: bool = False) -> tuple[nn.Module, dict[str, Any], Program]:
    """A random model whose gains and shifts are no ones and zeros, its inputs and its program."""
    model, example, _ = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.eval()
    if double:
        model = model.double()
        example = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in example.items()}
    return model, example, capture(model, example)


def folded(program: Program) -> tuple[Program, int, dict[str, str]]:
    """The program with every norm folded that can be, how many were, and why the others were not."""
    structure, after = find_structure(program), program.copy()
    ctx = Context(structure=structure, program=program)
    done = Manager(ctx).transform(after, [(site, FoldNorms()) for site in structure.of_kind("norm")])
    return after, len(done), {r.site: r.text for r in ctx.remarks}


def run(program: Program, example: dict[str, Any]) -> torch.Tensor:
    """The first output."""
    with torch.no_grad():
        return program.main.module()(*(example[i.name] for i in program.main.inputs))[0]


# --- fold_norms


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_the_function(name: str) -> None:
    model, example, program = made(name)
    after, done, refused = folded(program)
    assert done == FOLDED[name], refused
    assert outputs_differ(after, model, example) < 1e-5
    bare = [n for n in iterate_calls(after.main, *NORMS) if not any(s.op == "get_attr" for s in n.all_input_nodes)]
    assert len(bare) == done
    assert {id: any(word in refused.get(id, "") for word in (why,)) for id, why in KEPT[name].items()} == dict.fromkeys(
        KEPT[name], True
    ), refused
    assert find_structure(after).sites.keys() == find_structure(program).sites.keys()


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "vit"])
def test_folding_in_double_precision(name: str) -> None:
    _, example, program = made(name, double=True)
    after, done, _ = folded(program)
    assert done and relative_error(run(program, example), run(after, example)) < 1e-9


def test_folding_stores_no_more() -> None:
    """Gain and shift of 8 norms of width 32 go, and no linear of GPT-2 lacks a bias; where linears do, a shift costs one."""
    _, _, program = made("gpt2")
    after, done, _ = folded(program)
    assert program.nbytes() - after.nbytes() == done * 2 * 32 * 4

    class Unbiased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5, bias=False)
            nn.init.constant_(self.norm.bias, 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x))

    from lwcompile.tracing import capture_module

    graph, _ = capture_module(Unbiased(), {"x": torch.randn(2, 8)}, {"x": {0: "batch"}})
    small = Program({"forward": graph}, graph.store)
    site = find_structure(small).of_kind("norm")[0]
    assert [t.shape for t in FoldNorms().stored(graph, site)] == [(5,)]
    after, done, _ = folded(small)
    assert done == 1 and small.nbytes() - after.nbytes() == (2 * 8 - 5) * 4


def test_fold_norms_keeps_the_contract() -> None:
    assert "declarations: exact, structural" in check_pass(FoldNorms)
