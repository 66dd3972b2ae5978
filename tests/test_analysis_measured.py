"""Measured damage against full runs of models edited by hand; resumed runs against counts of what was computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import calibration, llama, llama_program
from torch import Tensor

from lwcompile.context import Context
from lwcompile.errors import BadInput
from lwcompile.formats import NumericFormat
from lwcompile.metric import Kl
from lwcompile.passes.analysis.measured import Measured
from lwcompile.passes.solve.rtn import Rtn
from lwcompile.rundir import RunDir
from lwcompile.spec import Spec

FOUR = Spec.parse("quantize{bits=4,group_size=16,solver=rtn}")
THREE = Spec.parse("quantize{bits=3,group_size=16,solver=rtn}")
DROP = Spec("drop")


def context(options: dict[str, list[Spec]], **fields: object) -> Context:
    return Context(calibration=calibration(), metric=Kl(), options=options, batch_size=3, **fields)  # type: ignore[arg-type]


def dense_logits() -> Tensor:
    with torch.no_grad():
        return llama()(input_ids=calibration().samples["input_ids"], use_cache=False).logits


def kl(changed: Tensor) -> float:
    p, q = (t.double().log_softmax(-1) for t in (dense_logits(), changed))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def logits_with(weights: dict[str, Tensor]) -> Tensor:
    """The module's logits with these parameters in place of its own."""
    inputs = {"input_ids": calibration().samples["input_ids"], "use_cache": False}
    with torch.no_grad():
        return torch.func.functional_call(llama(), weights, (), inputs, tie_weights=False).logits


def rounded(*names: str, bits: int = 4) -> dict[str, Tensor]:
    state = llama().state_dict()
    format = NumericFormat(bits, 16)
    return {name: Rtn().solve(state[name], format, None).dequantize() for name in names}


def test_damage_equals_the_kl_of_the_module_edited_by_hand() -> None:
    options = {
        "block1.attention.o_proj": [FOUR, THREE],
        "block0.attention.q_proj": [FOUR],
        "block0.attention.k_proj": [FOUR, THREE],
        "block0.attention.v_proj": [FOUR],
        "embedding": [FOUR],
        "head": [FOUR],
        "block2.mlp": [DROP],
    }
    program = llama_program()
    digest = program.digest()
    found: dict[tuple[str, Spec], float] = {}
    for id, option, damage in Measured().run(program, context(options)):
        assert damage.measured and damage.low <= damage.value <= damage.high and damage.samples == 96
        found[id, option] = damage.value
    layer = "model.layers.0.self_attn."
    o_proj = "model.layers.1.self_attn.o_proj.weight"
    assert found["block1.attention.o_proj", FOUR] == pytest.approx(kl(logits_with(rounded(o_proj))), rel=1e-3)
    assert found["block1.attention.o_proj", THREE] == pytest.approx(kl(logits_with(rounded(o_proj, bits=3))), rel=1e-3)

    names = [f"{layer}{x}_proj.weight" for x in "qkv"]
    together = [found.pop((f"block0.attention.{x}_proj", FOUR)) for x in "qkv"]
    assert sum(together) == pytest.approx(kl(logits_with(rounded(*names))), rel=1e-3)
    assert together[0] == pytest.approx(2 * together[1]) == pytest.approx(2 * together[2])  # by parameters
    assert ("block0.attention.k_proj", THREE) not in found  # q and v do not offer it

    tied = rounded("model.embed_tokens.weight")
    both = tied | {"lm_head.weight": tied["model.embed_tokens.weight"]}
    assert found["embedding", FOUR] == pytest.approx(kl(logits_with(both)), rel=1e-3)
    assert found["head", FOUR] == 0

    gone = logits_with({"model.layers.2.mlp.down_proj.weight": torch.zeros(32, 64)})
    assert found["block2.mlp", DROP] == pytest.approx(kl(gone), rel=1e-3)
    assert program.digest() == digest


def test_trials_leave_nothing_in_the_store() -> None:
    program = llama_program()
    before = program.store.keys()
    ctx = context({"block1.attention.o_proj": [FOUR, THREE]})
    assert len(list(Measured().run(program, ctx))) == 2
    assert program.store.keys() == before and not ctx.memo


def count_suffixes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from lwcompile.prefix import PrefixCache

    counted: list[str] = []
    real = PrefixCache.suffix_outputs

    def suffix_outputs(self: PrefixCache, program: object) -> object:
        counted.append("run")
        return real(self, program)  # type: ignore[arg-type]

    monkeypatch.setattr(PrefixCache, "suffix_outputs", suffix_outputs)
    return counted


def test_a_second_run_computes_nothing_and_a_killed_one_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {f"block{i}.attention.o_proj": [FOUR, THREE] for i in range(3)}
    counted = count_suffixes(monkeypatch)
    first = Measured().run(llama_program(), context(options, rundir=RunDir(tmp_path)))
    started = [next(first) for _ in range(4)]
    first.close()
    assert len(counted) == 4
    whole = list(Measured().run(llama_program(), context(options, rundir=RunDir(tmp_path))))
    assert whole[:4] == started and len(whole) == 6
    assert len(counted) == 6
    again = list(Measured().run(llama_program(), context(options, rundir=RunDir(tmp_path))))
    assert again == whole and len(counted) == 6


@pytest.mark.parametrize("change", ["tokens", "weights", "samples", "seed"])
def test_a_result_is_not_reused_for_anything_else(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"block1.attention.o_proj": [FOUR]}
    counted = count_suffixes(monkeypatch)
    list(Measured().run(llama_program(), context(options, rundir=RunDir(tmp_path))))
    ctx, program, measured = context(options, rundir=RunDir(tmp_path)), llama_program(), Measured()
    match change:
        case "tokens":
            measured = Measured(tokens=48)
        case "weights":
            name = "model.layers.0.mlp.up_proj.weight"
            program.main.set_tensor(name, 2 * program.main.tensor(name))
        case "samples":
            ctx.calibration = calibration(seed=2)
        case "seed":
            ctx.seed = 1
    list(measured.run(program, ctx))
    assert len(counted) == 2


def test_a_refused_option_is_remarked_and_gets_no_damage() -> None:
    ctx = context({"final_norm": [FOUR], "block0.mlp": [DROP]})
    found = list(Measured().run(llama_program(), ctx))
    assert [id for id, *_ in found] == ["block0.mlp"]
    (remark,) = ctx.remarks
    assert remark.site == "final_norm" and remark.kind == "refused" and "no stored matrix" in remark.text


def test_only_one_transform_is_measured_where_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"block1.mlp": [DROP], "block1.attention.o_proj": [FOUR]}
    counted = count_suffixes(monkeypatch)
    found = list(Measured(only="drop").run(llama_program(), context(options, rundir=RunDir(tmp_path))))
    assert [id for id, *_ in found] == ["block1.mlp"] and len(counted) == 1
    both = list(Measured().run(llama_program(), context(options, rundir=RunDir(tmp_path))))
    assert found[0] in both and len(both) == 2 and len(counted) == 2


def test_tokens_bound_the_samples() -> None:
    ctx = context({"block1.mlp": [DROP]})
    ((_, _, damage),) = Measured(tokens=24).run(llama_program(), ctx)
    assert damage.samples == 24


def test_it_says_what_it_lacks() -> None:
    with pytest.raises(BadInput, match="metric"):
        list(Measured().run(llama_program(), Context(calibration=calibration(), options={"block1.mlp": [DROP]})))
    with pytest.raises(BadInput, match="samples"):
        list(Measured().run(llama_program(), Context(metric=Kl(), options={"block1.mlp": [DROP]})))


def test_progress_ends_where_it_should() -> None:
    class Counting:
        def __init__(self) -> None:
            self.total = self.done = 0

        def task(self, name: str, total: int) -> Counting:
            self.total += total
            return self

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *details: object) -> None:
            pass

        def advance(self, steps: int = 1) -> None:
            self.done += steps

    counting = Counting()
    list(Measured().run(llama_program(), context({"block1.mlp": [DROP], "head": [FOUR]}, progress=counting)))
    assert counting.done == counting.total > 0
