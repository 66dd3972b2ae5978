"""Every operator of ours is one of torch's in good standing: it has a sample here, and passes torch's own checks with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwcompile.backends.inductor.attention
import lwcompile.backends.inductor.packed
import lwcompile.linear_attention
import lwcompile.ops
import lwcompile.relu_attention  # noqa: F401  (imported for the operators that they define)
from lwcompile.backends.inductor.ways import example
from lwcompile.formats import NumericFormat

IN_CPP = {"packed_linear", "packed_embedding", "few_attention"}
"""Built by a C++ compiler: `test_compile_products` has their samples."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _dequantize(bits: int, zero: Any) -> tuple[Any, ...]:
    stored = example(NumericFormat(bits, 16, zero), (6, 40)).pack()
    return stored["codes"], stored["scale"], stored.get("zero"), bits, 16, 40


def _attention(length: int, keys: int) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2."""
    return [_random(2, 4, length, 8), _random(2, 2, keys, 8, seed=1), _random(2, 2, keys, 8, seed=2)]


OPEN = torch.ones(2, 9, dtype=torch.bool)
OPEN[0, :3] = False
STATE, MAPS = _random(2, 2, 6, 9).exp(), [_random(4, 8, 3), _random(2, 8, 3, seed=1), _random(4)]
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "dequantize": [_dequantize(3, "integer"), _dequantize(4, "none"), _dequantize(8, "float")],
    "hybrid_attention": [
        (*_attention(9, 9), None, None, *MAPS, 4, 0.3),
        (*_attention(2, 9), OPEN, STATE, *MAPS, 12, 0.3),
    ],
    "absorb_keys": [
        (*_attention(9, 9)[1:], None, None, MAPS[1], 4),
        (*_attention(9, 9)[1:], OPEN, STATE, MAPS[1], 4),
        (*_attention(9, 9)[1:], OPEN, STATE, MAPS[1], 12),  # no key has left the window: the state as it was
    ],
    "relu_attention": [
        (*_attention(9, 9), None, _random(4, 9, 3), _random(2, 9, 3), _random(16, 1, 3, 3), 1, 2),  # an image of 2 x 4 patches
        (*_attention(9, 9), OPEN, _random(4, 9, 3), _random(2, 9, 3), _random(16, 1, 3), 0, 0),
    ],
}
CASES = [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))]


def test_every_operator_has_a_sample():
    ours = {name.removeprefix("lwcompile::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lwcompile::")}
    assert {name.split(".")[0] for name in ours} == SAMPLES.keys() | IN_CPP


@pytest.mark.parametrize(("name", "i"), CASES)
def test_operators_pass_opcheck(name, i):
    checks = torch.library.opcheck(getattr(torch.ops.lwcompile, name).default, SAMPLES[name][i])
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["hybrid_attention", "relu_attention"])
def test_gradients_pass_opcheck(name):
    """Those of `dequantize` are of its scale and zero point alone, and `test_heal` checks them."""
    given = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in _copied(SAMPLES[name][0])]
    quick = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")  # free sizes take 20 s
    checks = torch.library.opcheck(getattr(torch.ops.lwcompile, name).default, tuple(given), test_utils=quick)
    assert set(checks.values()) == {"SUCCESS"}


def _copied(given: tuple[Any, ...]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in given]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_operators_are_exported_saved_and_loaded(name, i, tmp_path):
    """In a program of torch's own, which knows the operator by its name alone."""
    given = SAMPLES[name][i]
    operator = getattr(torch.ops.lwcompile, name).default
    tensors = [a for a in given if isinstance(a, Tensor)]

    class Call(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return operator(*(next(left) if isinstance(a, Tensor) else a for a in given))

    torch.export.save(torch.export.export(Call(), tuple(tensors)), tmp_path / "call.pt2")
    loaded = torch.export.load(tmp_path / "call.pt2").module()
    assert torch.equal(loaded(*tensors), operator(*given))
