"""Layers that are fed stored tensors alone, as DeBERTa's projections of relative positions are: no step runs them, and solvers see
what they are fed. And `copy`, which has no derivative and stands in RWKV's trace: tokens then count alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lwcompile.apply import apply_plan
from lwcompile.context import Context
from lwcompile.data import CalibrationSet
from lwcompile.executor import Executor
from lwcompile.manager import relative_error
from lwcompile.metric import FeatureKl
from lwcompile.program import Program
from lwcompile.spec import Spec
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module


class Block(nn.Module):
    """x + softmax(query(x) key(places)^T) value(x): the keys do not depend on x."""

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(self.places).T).softmax(-1)  # type: ignore[operator]
        return x + torch.ops.aten.copy.default(x, weights @ self.value(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, places = nn.Embedding(50, 32), torch.randn(8, 32)
        self.blocks = nn.ModuleList(Block(places) for _ in range(2))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"last_hidden_state": x}


def test_solvers_see_what_is_fed_to_a_layer_of_constants() -> None:
    ids = torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(0))
    model = Model().eval()
    graph, _ = capture_module(model, {"input_ids": ids[:2]}, {"input_ids": {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    structure, executor = find_structure(program), Executor(program)
    fed = {site.id: executor.constant_input(site) for site in structure.of_kind("linear")}
    constant = [id for id, x in fed.items() if x is not None]
    assert len(constant) == 2
    assert all(torch.equal(fed[id], model.blocks[0].places) for id in constant)  # type: ignore[arg-type]

    def error(solver: str) -> float:
        """Of the keys, whose second moments the solver is to know."""
        metric = FeatureKl(batch=8)
        ctx = Context(
            metric=metric, structure=structure, program=program, calibration=CalibrationSet({"input_ids": ids}, "text", "ids")
        )
        made = apply_plan(
            program, {id: (Spec.parse(f"quantize{{bits=2,group_size=16,solver={solver}}}"),) for id in fed}, structure, ctx
        )
        keys = [next(n for n in g.nodes if n.name == structure.sites[constant[0]].node) for g in (program.main, made.main)]
        if solver == "gptq":
            assert ["no gradient passes" in note.text for note in ctx.remarks if note.by == "importance"] == [True]
        dense, found = (Executor(p).constant(key) for p, key in zip((program, made), keys))
        return relative_error(dense, found)

    assert error("gptq") < error("rtn{steps=1,refits=0}")
