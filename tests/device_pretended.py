"""Passes on another device than the CPU, pretended (`pretend_device`): no tensor is left behind, and the figures are the same.

Not the bytes: another device takes other kernels, attention's for one, and they round otherwise. In a process of their own, run by
`test_device`: autograd counts the devices at its first backward pass, and does not know one that comes later.
"""

from __future__ import annotations

from pathlib import Path

import pretend_device
import pytest
import tiny
import torch

from lwcompile.budget import Budget
from lwcompile.manager import Manager
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.spill import TensorCache

DATA = {"dataset": "random", "samples": 8, "seqlen": 12}
P = Spec.parse


@pytest.fixture(autouse=True)
def installed() -> None:
    pretend_device.install()


def started(folder: Path, device: str, program: Program, **given: object) -> Session:
    recipe = Recipe.named("fast").with_(calibration=DATA, evaluation=DATA, **given)  # type: ignore[arg-type]
    return session(program, Settings(recipe=recipe, backend="program", run_dir=folder / device, device=device))


def test_a_tensor_left_behind_is_found() -> None:
    with pretend_device.Pretend():
        there = torch.ones(3).to(pretend_device.NAME)
        with pytest.raises(RuntimeError, match="are not on gpu"):
            there + torch.ones(3)
        assert (there + torch.ones(())).sum().item() == 6


def test_what_is_spilled_comes_back_to_its_device(tmp_path: Path) -> None:
    with pretend_device.Pretend():
        cache, there = TensorCache(0, tmp_path), torch.arange(6.0).view(2, 3).to(pretend_device.NAME)
        cache["x"] = there
        assert cache.spilled == 24 and cache["x"].device == there.device and cache["x"].cpu().tolist() == there.cpu().tolist()


def test_a_whole_run_is_the_same(tmp_path: Path) -> None:
    formats = [P("quantize{bits=[3,4],group_size=16,solver=rtn}")]
    mlp = [P(text) for text in ("drop", "prune_mlp", "prune_mlp + quantize{bits=4,group_size=16,solver=rtn}")]
    found = []
    for device in ("cpu", pretend_device.NAME):
        with pretend_device.Pretend():
            run = started(
                tmp_path, device, tiny.llama_program(layers=2),
                options={"linear": formats, "embedding": formats, "mlp": mlp, "attention": [P("drop")]},
                allocator=P("search{evaluations=2}"),
                analyses=[P("fisher"), P("measured{only=[drop,prune_mlp],joint=false}")],
                budget=Budget(avg_bits=16),
            )  # fmt: skip
            plan = run.plan()
            made = run.compress(plan)
            healed = made.copy()
            assert Manager(run._ready()).heal(healed, run.dense, make("passes", P("distill{steps=3}"))) is not None
            found.append((plan.choices, *(run.measure(program)["damage"].mean for program in (made, healed))))
    assert found[0][0] == found[1][0]
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-2)


SUBLAYERS = {
    "drop": ("mlp", "drop"),
    "prune": ("mlp", "prune_mlp{ratio=0.5}"),
    "window": ("attention", "window{size=6}"),
    "linear": ("attention", "linear{window=4,steps=4}"),
    "latent": ("attention", "latent{rank=8}"),
    "low rank": ("mlp.down_proj", "low_rank{rank=8}"),
    "corrected": ("mlp.down_proj", "quantize{bits=3,group_size=16,rank=4}"),
    "hqq": ("mlp.down_proj", "quantize{bits=3,group_size=16,solver=hqq}"),
    "frozen": ("mlp.post_attention_layernorm", "freeze_norm"),
}


@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_transform_does_the_same(name: str, tmp_path: Path) -> None:
    where, option = SUBLAYERS[name]
    made = []
    for device in ("cpu", pretend_device.NAME):
        with pretend_device.Pretend():
            run = started(tmp_path, device, tiny.llama_program())
            changed = run.compress(Plan({f"block1.{where}": (P(option),)}))
            assert changed.digest() != run.dense.digest()
            made.append(run.measure(changed)["damage"].mean)
    assert made[0] == pytest.approx(made[1], rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("analysis", ["lim", "zd", "block_influence", "gates{steps=2}", "trajectory", "fisher", "measured"])
def test_an_analysis_finds_the_same(analysis: str, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", pretend_device.NAME):
        with pretend_device.Pretend():
            run = started(
                tmp_path,
                device,
                tiny.llama_program(),
                analyses=[P(analysis)],
                options={"mlp": [P("drop")]},
                budget=Budget(avg_bits=30),
            )
            run.damages  # noqa: B018  (runs the analyses)
            values = [v for found in run.annotations.values() for v in found.values()]
            found.append([v.value for value in values for v in (value.values() if isinstance(value, dict) else (value,))])
    assert found[0] and found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-6)
