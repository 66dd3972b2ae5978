"""Healing: gradients against autograd over plain formulas, what is trained and what is not, resuming, several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import calibration, llama_program

from lwcompile import pipeline
from lwcompile.context import Context
from lwcompile.contract import Healing
from lwcompile.errors import BadPlan, Refused
from lwcompile.executor import run
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.manager import Manager
from lwcompile.metric import Kl
from lwcompile.passes.heal._course import Course
from lwcompile.passes.heal.distill import Distill
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.rundir import RunDir
from lwcompile.spec import Spec
from lwcompile.structure import find_structure

pytest.importorskip("transformers", reason="the tiny models are built from transformers' classes: install lwcompile[hf]")


def context(program: Program, rows: int = 24, **given: Any) -> Context:
    return Context(calibration(rows), metric=Kl(), structure=find_structure(program), program=program, **given)


def compressed(
    dense: Program, option: str = "quantize{bits=2,group_size=16,zero_point=float,solver=rtn}", frozen: bool = False
) -> Program:
    ctx, made = context(dense), dense.copy()
    assert ctx.structure is not None
    if frozen:
        Manager(ctx).transform(made, [(site, make("passes", "freeze_norm")) for site in ctx.structure.of_kind("norm")])
    sites = [s for s in ctx.structure.of_kind("linear") if s.id != "head"]
    Manager(ctx).transform(made, [(site, make("passes", Spec.parse(option))) for site in sites])
    return made


def dropped(dense: Program, *sites: str) -> Program:
    ctx, made = context(dense), dense.copy()
    assert ctx.structure is not None
    Manager(ctx).transform(made, [(ctx.structure.sites[id], make("passes", "drop")) for id in sites])
    return made


def damage(dense: Program, program: Program) -> float:
    batch = {"input_ids": calibration(16, seed=7).samples["input_ids"]}
    return Kl().compare(run(dense, batch), run(program, batch), batch).mean().item()


def heal(dense: Program, program: Program, given: Distill, **context_: Any) -> tuple[Program, Healing]:
    healed = program.copy()
    ctx = context(dense, **context_)
    done = Manager(ctx).heal(healed, dense, given)
    assert done is not None, ctx.remarks
    return healed, done


def tensors(program: Program) -> dict[str, torch.Tensor]:
    return {name: program.main.tensor(name) for name in program.main.tensors}


def differing(a: Program, b: Program) -> set[str]:
    assert a.main.tensors.keys() == b.main.tensors.keys()
    return {name for name, key in a.main.tensors.items() if b.main.tensors[name] != key}


# --- the operator's gradients


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize(("bits", "group", "width"), [(3, 8, 20), (4, 16, 32), (8, 5, 5)])
def test_the_gradients_of_dequantizing_are_those_of_its_formula(zero_point: Any, bits: int, group: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    format = NumericFormat(bits, group, zero_point, "float32")
    codes = torch.randint(0, 2**bits, (6, width), generator=generator)
    scale = torch.randn(6, format.groups(width), generator=generator)
    zero = {"none": None, "integer": torch.randint(0, 2**bits, scale.shape, generator=generator),
            "float": torch.randn(scale.shape, generator=generator)}[zero_point]  # fmt: skip
    packed = QuantizedTensor.of(format, codes, scale, zero).pack()
    weight = torch.randn(6, width, generator=generator)

    given = {"codes": packed["codes"], "scale": packed["scale"].detach().clone().requires_grad_(), "zero": packed.get("zero")}
    if zero_point == "float":
        given["zero"] = given["zero"].clone().requires_grad_()
    args = (given["codes"], given["scale"], given["zero"], bits, group, width)
    (torch.ops.lwcompile.dequantize(*args) * weight).sum().backward()

    s = scale.double().detach().requires_grad_()
    z = torch.full_like(s, 2 ** (bits - 1)) if zero is None else zero.double()
    z = z.detach().requires_grad_()
    columns = torch.arange(width) // group
    ((codes.double() - z[:, columns]) * s[:, columns] * weight.double()).sum().backward()
    torch.testing.assert_close(given["scale"].grad.double(), s.grad, rtol=1e-5, atol=1e-5)
    if zero_point == "float":
        torch.testing.assert_close(given["zero"].grad.double(), z.grad, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.lwcompile.dequantize.default, args)


# --- what is trained


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        (("norms",), lambda n: "norm" in n),
        (("scales",), lambda n: n.endswith((".scale", ".zero"))),
        (("norms", "scales"), lambda n: "norm" in n or n.endswith((".scale", ".zero"))),
        (("codes",), lambda n: n.endswith(".codes")),
        (("block1.*",), lambda n: "layers.1." in n and not n.endswith(".codes")),
        (("*v_proj.weight.scale",), lambda n: n.endswith("v_proj.weight.scale")),
        ("all", lambda n: not n.endswith(".codes") and "inv_freq" not in n),
    ],
)
def test_what_train_names_changes_and_everything_else_is_the_same_to_the_bit(train: Any, wanted: Any) -> None:
    dense = llama_program()
    program = compressed(dense)
    before = tensors(program)
    kept = {name: t.clone() for name, t in before.items()}
    healed, done = heal(dense, program, Distill(steps=8, every=4, train=train, lr=0.01, batch=4))
    named = {n for n in program.main.tensors if wanted(n)}
    assert named and done.kept > 0
    assert differing(program, healed) <= named
    assert {n.rpartition(".")[2] for n in differing(program, healed)} == {n.rpartition(".")[2] for n in named}
    for name, tensor in kept.items():  # the program that was healed is not touched
        assert torch.equal(program.main.tensor(name), tensor)
    for name, tensor in tensors(healed).items():
        assert tensor.dtype == kept[name].dtype and tensor.shape == kept[name].shape
    assert damage(dense, healed) < damage(dense, program)


def test_what_dropped_sublayers_leave_behind_is_trained() -> None:
    dense = llama_program()
    program = dropped(dense, "block1.attention", "block2.mlp")
    healed, done = heal(dense, program, Distill(steps=20, every=5, train="norms", lr=0.02, batch=4))
    assert done.trained == sum(program.main.tensor(n).numel() for n in program.main.tensors if "norm" in n)
    assert damage(dense, healed) < 0.9 * damage(dense, program)
    healed, done = heal(dense, program, Distill(steps=4, every=2, train="changed", lr=0.01, batch=4, hidden=1.0, tail=1.0))
    assert 0 < len(differing(program, healed)) < len(program.main.tensors)
    assert damage(dense, healed) < damage(dense, program)


def test_changed_names_the_block_that_lost_something() -> None:
    dense = llama_program()
    program = dropped(dense, "block1.attention")
    healed, _ = heal(dense, program, Distill(steps=4, every=2, train="changed", lr=0.01, batch=4))
    assert {name.partition(".layers.")[2][:1] for name in differing(program, healed)} == {"1"}


def test_frozen_norms_are_blended_in_and_what_they_were_folded_into_is_trained() -> None:
    dense = llama_program()
    ctx, program = context(dense), dense.copy()
    assert ctx.structure is not None
    norms = ctx.structure.of_kind("norm")
    Manager(ctx).transform(program, [(site, make("passes", "freeze_norm")) for site in norms if site.id != "final_norm"])
    healed, done = heal(dense, program, Distill(steps=20, every=5, train="frozen", lr=0.02, batch=4, blend=0.5, patience=1))
    readers = {
        n
        for n in program.main.tensors
        if n.rpartition(".weight")[0].endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    assert differing(program, healed) == readers and done.steps > 10 and damage(dense, healed) < 0.9 * damage(dense, program)
    healed, _ = heal(dense, program, Distill(steps=10, every=5, train="norms", lr=0.02, batch=4, blend=0.5))
    assert {n for n in differing(program, healed)} == {n for n in program.main.tensors if n.endswith("norm.weight")}


def test_a_blend_of_nothing_is_noted() -> None:
    dense = llama_program()
    ctx = context(dense)
    assert Manager(ctx).heal(compressed(dense), dense, Distill(steps=2, train="scales", batch=4, blend=0.5)) is not None
    assert [r.text for r in ctx.remarks] == ["there is nothing to blend: no norm was frozen in this run"]


def test_tied_tensors_stay_tied_and_gains_of_ones_do_not_become_tied() -> None:
    dense = llama_program(tied=True)
    ones = torch.ones(32)
    for name in [n for n in dense.main.tensors if "norm" in n]:
        dense.main.set_tensor(name, ones)
    program = compressed(dense)
    healed, done = heal(dense, program, Distill(steps=6, every=3, train="all", lr=0.005, batch=4))
    gains = [n for n in healed.main.tensors if "norm" in n]
    assert done.kept > 0 and len({healed.main.tensors[n] for n in gains}) == len(gains)
    tied = [n for n in healed.main.tensors if "embed_tokens" in n or "lm_head" in n]
    assert len({healed.main.tensors[n] for n in tied}) == 1 and set(tied) & differing(program, healed)


def test_an_encoder_and_its_decoder_are_healed_together() -> None:
    from tiny import ids, pair

    from lwcompile.data import CalibrationSet

    dense = pair()[2]
    program, generator = dense.copy(), torch.Generator().manual_seed(0)
    for graph in program.entries.values():
        for name in list(graph.tensors):
            graph.set_tensor(name, graph.tensor(name) + 0.1 * torch.randn(graph.tensor(name).shape, generator=generator))
    samples = {"input_ids": ids(16, 7), "decoder_input_ids": ids(16, 5, seed=2)}
    ctx = Context(CalibrationSet(samples, "text", "random ids"), metric=Kl(), structure=find_structure(dense))
    healed = program.copy()
    done = Manager(ctx).heal(healed, dense, Distill(steps=20, every=5, lr=0.01, train="all", batch=4))
    assert done is not None and done.damages[-1][1] < 0.8 * done.damages[0][1]
    for entry, graph in healed.entries.items():
        assert all(key != program.entries[entry].tensors[name] for name, key in graph.tensors.items())


def test_adapters_are_known_by_their_shape() -> None:
    dense = llama_program()
    program = dense.copy()
    graph = program.main
    site = find_structure(program).sites["block0.mlp.up_proj"]
    (call,) = [n for n in graph.nodes if n.name == site.node]
    generator = torch.Generator().manual_seed(0)
    with graph.graph.inserting_after(call):
        total = graph.graph.call_function(torch.ops.aten.add.Tensor, (call, call))
    call.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    with graph.graph.inserting_before(total):
        down = graph.get_attr("first", 0.1 * torch.randn(4, 32, generator=generator))
        up = graph.get_attr("second", 0.1 * torch.randn(64, 4, generator=generator))
        inner = graph.graph.call_function(torch.ops.aten.linear.default, (call.args[0], down))
        outer = graph.graph.call_function(torch.ops.aten.linear.default, (inner, up))
    total.args = (call, outer)
    graph.propagate()
    healed, _ = heal(dense, program, Distill(steps=10, every=5, train="adapters", lr=0.02, batch=4))
    assert differing(program, healed) == {"first", "second"}
    assert damage(dense, healed) < damage(dense, program)


def test_a_hidden_state_distance_is_that_of_the_modules_own_hidden_states() -> None:
    """The loss of two block ends against transformers' `output_hidden_states` of the intact and of the edited module."""
    from tiny import ids, llama

    from lwcompile.executor import Executor
    from lwcompile.passes.heal._ends import common_ends, distance

    dense = llama_program()
    program = dropped(dense, "block1.attention")
    executors = Executor(dense), Executor(program)
    ends = common_ends(*executors, find_structure(dense))
    batch = {"input_ids": ids(3, 10)}
    found = [distance(executors[0].run(batch, ends)[k], executors[1].run(batch, ends)[k], batch).item() for k in ends]
    with torch.no_grad():
        model: Any = llama()
        states = {i: [] for i in range(3)}
        for edited in (False, True):
            hooks = [layer.register_forward_hook(lambda m, a, out, i=i: states[i].append(out if torch.is_tensor(out) else out[0]))
                     for i, layer in enumerate(model.model.layers)]  # fmt: skip
            if edited:
                hooks.append(model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (0 * out[0], None)))
            model(batch["input_ids"], use_cache=False)
            for hook in hooks:
                hook.remove()
    wanted = [((a - b).double().norm(dim=-1) ** 2 / a.double().norm(dim=-1) ** 2).mean().item() for a, b in states.values()]
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-12) and wanted[1] > 0


# --- a run of it


class Killed(Exception):
    pass


class KillAfter:
    """Progress that raises, or kills the process, at a step."""

    def __init__(self, step: int, hard: bool = False) -> None:
        self.left, self.hard = step, hard

    def task(self, name: str, total: float) -> Any:
        from contextlib import nullcontext

        return nullcontext(self)

    def advance(self, steps: float = 1) -> None:
        import os
        import signal

        self.left -= steps
        if self.left <= 0 and self.hard:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left <= 0:
            raise Killed


RESUMED = Distill(steps=12, every=3, lr=0.01, batch=4, train=("norms", "scales", "codes", "frozen"), hidden=0.5, blend=0.75)


def hurt(dense: Program) -> Program:
    """Its norms frozen, and then its linears quantized."""
    return compressed(dense, frozen=True)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    dense = llama_program()
    program = hurt(dense)
    first, again = (heal(dense, program, RESUMED)[0] for _ in range(2))
    assert first.digest() == again.digest()
    assert heal(dense, program, RESUMED, seed=1)[0].digest() != first.digest()


def killed(folder: str) -> None:
    """What the subprocess of the next test runs."""
    dense = llama_program()
    ctx = context(dense, rundir=RunDir(Path(folder)), progress=KillAfter(8, hard=True))
    Manager(ctx).heal(hurt(dense), dense, RESUMED)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_heal; test_heal.killed({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    dense = llama_program()
    program = hurt(dense)
    assert len(list((tmp_path / "tensors").iterdir())) == 1
    whole, straight = heal(dense, program, RESUMED)
    counting = KillAfter(100)
    resumed, healing = heal(dense, program, RESUMED, rundir=RunDir(tmp_path), progress=counting)
    assert resumed.digest() == whole.digest() and healing == straight
    from_file = KillAfter(100)
    served, healing = heal(dense, program, RESUMED, rundir=RunDir(tmp_path), progress=from_file)
    assert served.digest() == whole.digest() and healing == straight
    assert counting.left == from_file.left == 100 - 12


def test_without_held_out_samples_the_last_step_is_kept_unless_it_ran_away() -> None:
    dense = llama_program()
    program = compressed(dense)
    healed, done = heal(dense, program, Distill(steps=6, lr=0.01, batch=4, held_out=0.0, precision="bfloat16"))
    assert done.kept == done.steps == 6 and not done.damages and damage(dense, healed) < damage(dense, program)
    with pytest.raises(Refused, match="diverged"):
        Distill(steps=3, lr=3e37, train="norms", batch=4, held_out=0.0, warmup=0.0).heal(program.copy(), dense, context(dense))


def test_a_step_without_a_finite_gradient_is_left_out_and_counted() -> None:
    parameter = torch.ones(3, requires_grad=True)
    course = Course([parameter], [1.0], 0.1, steps=4, warmup=0.0, clip=1.0)
    for value in (1.0, float("nan"), float("inf"), 1.0):
        before = parameter.detach().clone()
        parameter.grad = torch.full((3,), value)
        course.advance()
        assert (parameter != before).all() == (value == 1.0) and parameter.grad is None
    assert torch.isfinite(parameter).all() and (course.step, course.skipped) == (4, 2)
    again = Course([torch.ones(3)], [1.0], 0.1, steps=4, warmup=0.0, clip=1.0)
    again.restore(course.state(False))
    assert again.skipped == 2


def test_no_gain_keeps_the_program_and_stops_early() -> None:
    dense = llama_program()
    program = compressed(dense)
    healed, done = heal(dense, program, Distill(steps=100, every=2, patience=2, lr=5.0, batch=4, warmup=0.0))
    assert (done.steps, done.kept) == (4, 0) and not differing(program, healed)


def _rank(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dense = llama_program()
    healed, _ = heal(dense, compressed(dense), SHARED)
    torch.save(tensors(healed), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


SHARED = Distill(steps=6, every=3, lr=0.01, batch=4, accumulate=2, hidden=0.5)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    dense = llama_program()
    alone = tensors(heal(dense, compressed(dense), SHARED)[0])
    for rank in (0, 1):
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            # float16 scales may round apart by one unit in the last place
            close = 1e-5 if tensor.dtype == torch.float32 else 1e-3
            torch.testing.assert_close(tensor.float(), alone[name].float(), rtol=close, atol=1e-7)


def test_torchrun_shares_one_compile(tmp_path: Path) -> None:
    """`torchrun -m lwcompile compress --heal` over two processes: the tensors that one process makes, and one of everything else."""
    import json

    import torch.distributed as dist

    from lwcompile.plans import Plan
    from lwcompile.recipe import Recipe

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo, which processes without a GPU talk through")
    program, recipe = llama_program(), Recipe.parse(RECIPE)
    (option,) = recipe.options["linear"]
    plan = Plan({s.id: (option,) for s in find_structure(program).of_kind("linear") if s.parent is not None})
    program.save(tmp_path / "model")
    plan.save(tmp_path / "plan.yaml")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    alone = pipeline.compress(program, recipe=recipe, plan=plan, heal=str(SHARED.spec()), run_dir=tmp_path / "alone")
    words = {"model": "model", "recipe": "recipe.yaml", "plan": "plan.yaml", "run-dir": "run"}
    given = [f"--{name}={tmp_path / value}" for name, value in words.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lwcompile"]
    done = subprocess.run(
        [*torchrun, "compress", str(tmp_path / "out"), *given, f"--heal={SHARED.spec()}", "--json"],
        check=False, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    if done.returncode and "bind" in done.stderr and "Permission" in done.stderr:
        pytest.skip("processes on this machine may not open a port to each other")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / "out")  # one document: the other process printed none
    made, wanted = tensors(pipeline.load(tmp_path / "out").program), tensors(alone.program)
    assert made.keys() == wanted.keys() and differing(program, program.copy()) == set()
    for name, tensor in wanted.items():
        close = 1e-5 if tensor.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(made[name].float(), tensor.float(), rtol=close, atol=1e-7)
    assert len(list((tmp_path / "run" / "tensors").iterdir())) == len(list((tmp_path / "alone" / "tensors").iterdir()))


def test_processes_behind_the_first_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lwcompile import ranks
    from lwcompile.recipe import Recipe

    program = llama_program()
    words: dict[str, Any] = {"recipe": Recipe.parse(RECIPE), "heal": False, "avg_bits": 32.0, "run_dir": tmp_path / "run"}
    monkeypatch.setattr(ranks, "prepared", lambda: True)
    monkeypatch.setattr(ranks, "join", lambda: (1, 2))
    monkeypatch.setattr(ranks, "told", lambda value: value)
    result = pipeline.compress(program, tmp_path / "out", **words)
    assert result.plan.measured is not None and not list(tmp_path.rglob("*"))


# --- refusals


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"train": "adapters"}, "there is nothing to train: adapters names no tensor"),
        ({"train": "nowhere*"}, "there is nothing to train: nowhere*"),
        ({"batch": 25}, "24 samples are too few for a batch of 25 beside 3 held out"),
    ],
)
def test_refusals_are_remarked(given: Any, reason: str) -> None:
    dense = llama_program()
    program = compressed(dense)
    ctx, digest = context(dense), program.digest()
    assert Manager(ctx).heal(program, dense, Distill(steps=2, **given)) is None
    (remark,) = ctx.remarks
    assert remark.kind == "refused" and reason in remark.text and program.digest() == digest


def test_a_metric_without_gradients_is_refused() -> None:
    from lwcompile.metric import UserMetric

    dense = llama_program()
    ctx = context(dense)
    ctx.metric = UserMetric("mine:hits", lambda p, q, inputs: (p.argmax(-1) != q.argmax(-1)).float().mean(1))
    with pytest.raises(Refused, match=r"gives no gradient.*set output=0"):
        Distill(steps=2, batch=4).heal(compressed(dense), dense, ctx)
    done = Distill(steps=2, batch=4, output=0.0, tail=1.0).heal(compressed(dense), dense, ctx)
    assert done.steps == 2


@pytest.mark.parametrize(
    "spec", ["distill{steps=0}", "distill{lr=0}", "distill{output=0}", "distill{held_out=1}", "distill{train=[]}"]
)
def test_options_that_cannot_be(spec: str) -> None:
    with pytest.raises(BadPlan):
        make("passes", spec)


def test_a_healer_that_edits_more_than_tensors_is_found_out() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from lwcompile.contract import HealPass
    from lwcompile.errors import VerificationError

    @dataclass(frozen=True)
    class Meddler(HealPass):
        name: ClassVar[str] = "meddler"
        whom: str = "program"

        def heal(self, program: Program, dense: Program, ctx: Context) -> Healing:
            graph = (program if self.whom == "program" else dense).main
            (call, *_) = (n for n in graph.nodes if n.target is torch.ops.aten.mul.Tensor)
            call.replace_all_uses_with(call.all_input_nodes[0])
            graph.prune()
            return Healing(0, 0, 0)

    for whom in ("program", "dense"):
        dense = llama_program()
        program, ctx = compressed(dense), context(dense)
        digest = program.digest()
        with pytest.raises(VerificationError, match="a healer trains tensors"):
            Manager(ctx).heal(program, dense, Meddler(whom=whom))
        assert program.digest() == digest


def test_the_contract_holds_on_the_built_in_models() -> None:
    from lwcompile.testing import check_pass

    report = check_pass(Distill(batch=4, train="norms"))
    assert "resuming on parallel: the same tensors from a run directory" in report


# --- in the pipeline


RECIPE = """
analyses: fisher{tokens=64}
options: {linear: "quantize{bits=2,group_size=16,zero_point=float,solver=rtn}"}
calibration: {dataset: random, samples: 24, seqlen: 12}
evaluation: {dataset: random, samples: 16, seqlen: 12}
heal: distill{steps=6,every=3,lr=0.01,batch=4}
"""


def test_a_recipe_heals_what_its_plan_made(tmp_path: Path) -> None:
    from lwcompile.plans import Plan
    from lwcompile.recipe import Recipe

    program, recipe = llama_program(), Recipe.parse(RECIPE)
    (option,) = recipe.options["linear"]
    sites = [s.id for s in find_structure(program).of_kind("linear") if s.parent is not None]
    words: dict[str, Any] = {"recipe": recipe, "plan": Plan({id: (option,) for id in sites}), "run_dir": tmp_path / "run"}
    plain = pipeline.compress(program, heal=False, **words)
    healed = pipeline.compress(program, tmp_path / "out", **words)
    assert "healing" not in plain.report.data
    said = healed.report.data["healing"]
    assert said["healer"] == str(recipe.heal) and said["before"]["mean"] == plain.plan.measured
    assert plain.plan.measured and healed.plan.measured and healed.plan.measured < plain.plan.measured
    assert said["after"]["mean"] == healed.plan.measured
    (remark,) = [r for r in healed.report.data["remarks"] if r["pass"] == str(recipe.heal)]
    assert (remark["numbers"]["before"], remark["numbers"]["after"]) == (plain.plan.measured, healed.plan.measured)
    assert pipeline.load(tmp_path / "out").program.digest() == healed.program.digest()
    assert "before healing" in {row[0] for row in _rows(healed)} and "before healing" not in {row[0] for row in _rows(plain)}


def test_a_limit_is_on_the_damage_once_healed(tmp_path: Path) -> None:
    """The limit is what every linear at 2 bits does once healed: healing reaches it with fewer bytes than plans that are not."""
    from lwcompile.plans import Plan
    from lwcompile.recipe import Recipe

    offered = "quantize{bits=[2,3,6],group_size=16,zero_point=float,solver=rtn}"
    recipe = Recipe.parse(RECIPE.replace("quantize{bits=2,group_size=16,zero_point=float,solver=rtn}", offered))
    program, words = llama_program(), {"recipe": recipe, "run_dir": tmp_path}
    least = Spec.parse("quantize{bits=2,group_size=16,zero_point=float,solver=rtn}")
    uniform = Plan({s.id: (least,) for s in find_structure(program).of_kind("linear") if s.parent is not None})
    smallest = pipeline.compress(program, plan=uniform, **words)
    assert smallest.plan.interval is not None
    limit = smallest.plan.interval[1] * 1.001
    plain = pipeline.compress(program, max_kl=limit, heal=False, **words)
    healed = pipeline.compress(program, max_kl=limit, **words)
    assert plain.plan.interval and healed.plan.interval and max(plain.plan.interval[1], healed.plan.interval[1]) <= limit
    assert (healed.plan.bytes or 0) < (plain.plan.bytes or 0) and healed.report.data["healing"]["before"][
        "mean"
    ] > healed.plan.measured
    assert len([r for r in healed.report.data["remarks"] if r["pass"] == str(recipe.heal)]) == 1
    assert pipeline.plan(program, max_kl=limit, **words).choices == healed.plan.choices


def _rows(result: pipeline.Result) -> list[tuple[str, str, str, str]]:
    from lwcompile.strip import summary_rows

    return summary_rows(result.report.data)


def test_a_healer_is_named_with_its_line() -> None:
    from lwcompile.recipe import Recipe

    with pytest.raises(BadPlan, match=r"recipe.yaml:1: unknown pass 'distil'.*did you mean 'distill'"):
        pipeline.session(llama_program(), pipeline.Settings(recipe=Recipe.parse("heal: distil")))
    run_ = pipeline.session(llama_program(), pipeline.Settings(recipe=Recipe.parse("heal: drop")))
    with pytest.raises(BadPlan, match=r"recipe.yaml:1: drop is no healer"):
        run_.heal(llama_program())


def test_the_command_line_says_it_too() -> None:
    from lwcompile.cli.flags import Healing as Flags
    from lwcompile.cli.flags import settings
    from lwcompile.errors import BadInput
    from lwcompile.recipe import Recipe

    recipe = Recipe.parse("heal: distill{steps=7}")
    for given, wanted in ((Flags(), "distill{steps=7}"), (Flags(heal="distill"), "distill"), (Flags(no_heal=True), None)):
        healer = pipeline.Settings(recipe=recipe, **settings(healing=given)).resolved().heal
        assert (healer and str(healer)) == wanted
    with pytest.raises(BadInput, match="--heal and --no-heal"):
        settings(healing=Flags("distill", True))


def test_a_dry_run_counts_it() -> None:
    from lwcompile.estimate import estimate

    seconds = [estimate(llama_program(), heal=heal).seconds.get("healing") for heal in (False, "distill")]
    assert seconds[0] is None and seconds[1] is not None
