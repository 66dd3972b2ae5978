"""Gates against a training loop written by hand on the module; turns of a path against the simplification itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import calibration, llama, llama_program
from torch import Tensor

from lwcompile.context import Context
from lwcompile.executor import Executor
from lwcompile.metric import Kl
from lwcompile.passes.analysis.gates import Gates, _Gated
from lwcompile.passes.analysis.trajectory import Trajectory, turns
from lwcompile.testing import check_pass
from lwcompile.tiny import programs, token_ids


def by_hand(of: str, steps: int, keep: float, lr: float, rate: float, polarise: float) -> list[float]:
    """The course's mean of each gate, from hooks on the module and the loss as the docstring states it."""
    model, ids = llama(), calibration().samples["input_ids"]
    layers = [model.get_submodule(f"model.layers.{i}") for i in range(3)]
    parts = [layer.get_submodule(name) for layer in layers for name in ("self_attn", "mlp")] if of == "sublayer" else layers
    gates = torch.ones(len(parts), requires_grad=True)

    def gated(k: int):
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, out: object) -> object:
            value = out[0] if isinstance(out, tuple) else out
            into = 0.0 if of == "sublayer" else args[0] if args else kwargs["hidden_states"]
            value = into + gates[k] * (value - into)  # type: ignore[operator]
            return (value, *out[1:]) if isinstance(out, tuple) else value

        return hook

    handles: list = []
    adam, course = torch.optim.Adam([gates], lr), torch.zeros(len(parts))
    for step in range(steps):
        batch = ids[4 * (step % 2) : 4 * (step % 2) + 4]
        with torch.no_grad():
            dense = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        handles = [part.register_forward_hook(gated(k), with_kwargs=True) for k, part in enumerate(parts)]
        made = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        for handle in handles:
            handle.remove()
        damage = F.kl_div(made.flatten(0, 1), dense.flatten(0, 1), log_target=True, reduction="batchmean")
        pull = rate * (gates.mean() - keep) ** 2 + polarise * step / steps * (gates * (1 - gates)).sum()
        adam.zero_grad()
        (damage + pull).backward()
        adam.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            course += gates / steps
    return course.tolist()


@pytest.mark.parametrize("of", ["sublayer", "block"])
def test_gates_take_the_course_of_a_loop_written_by_hand(of: str) -> None:
    options = {"steps": 12, "keep": 0.5, "lr": 0.1, "rate": 10.0, "polarise": 0.05}
    program, ctx = llama_program(), Context(calibration=calibration(), metric=Kl())
    digest = program.digest()
    found = dict(Gates(of, batch=4, **options).run(program, ctx))  # type: ignore[arg-type]
    ids = [f"block{i}" for i in range(3)]
    assert list(found) == (ids if of == "block" else [f"{id}.{kind}" for id in ids for kind in ("attention", "mlp")])
    values = [score.value for score in found.values()]
    assert values == pytest.approx(by_hand(of, **options), abs=2e-4)  # type: ignore[arg-type]
    assert max(values) - min(values) > 50 * 2e-4 and program.digest() == digest
    assert {score.samples for score in found.values()} == {8}


@pytest.mark.parametrize("of", ["sublayer", "block"])
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_a_gate_at_one_changes_nothing_and_one_at_zero_removes(name: str, of: str) -> None:
    """Post-norm models too, whose norm goes with its sublayer."""
    from test_drop import drop

    program, batch = programs()[name], {"input_ids": token_ids(3, 7)}
    gated = _Gated(program, Context(), of)
    (output,) = Executor(program).run(batch)
    with torch.no_grad():
        same = gated.run(batch, torch.ones(len(gated.sites)))[output]
        torch.testing.assert_close(same, Executor(program).run(batch)[output], rtol=1e-5, atol=1e-5)
        for k, site in enumerate(gated.sites):
            gates = torch.ones(len(gated.sites))
            gates[k] = 0
            without = Executor(drop(program, [site.id])).run(batch)[output]
            torch.testing.assert_close(gated.run(batch, gates)[output], without, rtol=1e-5, atol=1e-5)


def simplified(points: Tensor, tolerance: float) -> set[int]:
    """Ramer, Douglas and Peucker: the indices that are kept at a tolerance."""

    def away(p: Tensor, a: Tensor, b: Tensor) -> float:
        along = (b - a) / (b - a).norm()
        return float((p - a - ((p - a) @ along) * along).norm())

    def between(a: int, b: int) -> set[int]:
        far = [away(points[i], points[a], points[b]) for i in range(a + 1, b)]
        if not far or max(far) <= tolerance:
            return set()
        middle = a + 1 + far.index(max(far))
        return {middle} | between(a, middle) | between(middle, b)

    return {0, len(points) - 1} | between(0, len(points) - 1)


def test_turns_are_what_a_simplification_keeps_at_every_tolerance() -> None:
    corner = torch.tensor([[0.0, 0], [1, 0.1], [2, 0], [3, 0], [3, 1], [3.1, 2], [3, 3]], dtype=torch.float64)
    kept = turns(corner)
    assert max(range(1, 6), key=lambda i: kept[i]) == 3 and kept[3] == pytest.approx(3 / math.sqrt(2))
    assert kept[1] == pytest.approx(0.1) and kept[0] == kept[-1] == math.inf
    path = torch.randn(14, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    found = turns(path)
    for tolerance in (0.0, *(value + side for value in found[1:-1] for side in (-1e-9, 1e-9))):
        assert {i for i, value in enumerate(found) if value > tolerance} == simplified(path, tolerance)
    assert turns(torch.zeros(3, 2)) == [math.inf, 0.0, math.inf]  # a chord without length


@pytest.mark.parametrize("unit", [False, True])
def test_the_path_is_of_mean_hidden_states(unit: bool) -> None:
    program, samples = llama_program(layers=3), calibration()
    found = dict(Trajectory(unit=unit).run(program, Context(calibration=samples, batch_size=3)))
    model = llama(layers=3)
    with torch.no_grad():
        states = model(**samples.samples, use_cache=False, output_hidden_states=True).hidden_states[:-1]
        last: list[Tensor] = []
        handle = model.get_submodule("model.norm").register_forward_hook(lambda m, args, out: last.append(args[0]))
        model(**samples.samples, use_cache=False)
        handle.remove()
    rows = [state.double().flatten(0, 1) for state in (*states, last[0])]
    path = torch.stack([(r / r.norm(dim=1, keepdim=True) if unit else r).mean(0) for r in rows])
    expected = turns(path)[1:-1]
    assert list(found) == [f"block{i}" for i in range(3)]
    assert [score.value for score in found.values()] == pytest.approx([max(expected), *expected], rel=1e-4)
    assert found["block0"].samples == 96


@pytest.mark.parametrize("analysis", [Gates(steps=2, batch=4), Trajectory()])
def test_the_contract(analysis: Gates | Trajectory) -> None:
    assert any("sites, all known" in line for line in check_pass(analysis))
