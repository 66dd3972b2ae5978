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
from lwcompile.passes.heal.distill import Distill
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.rundir import RunDir
from lwcompile.spec import Spec
from lwcompile.structure import find_structure

pytest.importorskip("transformers", reason="the tiny models are built from transformers' classes: install lwcompile[hf]")


def context(program: Program, rows: int = 24, **given: Any) -> Context:
    return Context(calibration(rows), metric=Kl(), structure=find_structure(program), program=program, **given)


def compressed(dense: Program, option: str = "quantize{bits=2,group_size=16,zero_point=float,solver=rtn}") -> Program:
    ctx, made = context(dense), dense.copy()
    assert ctx.structure is not None
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
