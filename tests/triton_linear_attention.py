"""What `test_triton_linear_attention` runs in a process of its own, under TRITON_INTERPRET=1: the kernels against the operators' own
definition in float64, by small odd sizes and small tiles, of which a short sequence has several.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests need TRITON_INTERPRET=1: run tests/test_triton_linear_attention.py", allow_module_level=True)

from triton_interpreted import SEEDS, TOLERANCE, error, few, ruled

from lwcompile.backends.triton.kernels.linear_attention import absorb_keys, hybrid_attention
from lwcompile.linear_attention import Maps, absorbed, attend

SMALL = {
    "features": {"BLOCK_S": 16, "BLOCK_D": 16, "num_warps": 1, "num_stages": 1},
    "state": {"BLOCK_F": 16, "BLOCK_V": 16, "BLOCK_T": 16, "num_warps": 1, "num_stages": 1},
    "hybrid": {"BLOCK_S": 16, "BLOCK_T": 16, "BLOCK_F": 16, "BLOCK_V": 16, "CHUNK": 32, "num_warps": 1, "num_stages": 1},
}
BATCHES, HEADS = st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (3, 1)])
WIDTHS, WINDOWS, PADDING = st.integers(1, 20), st.sampled_from([2, 5, 17, 40, 300]), st.sampled_from([None, "left", "any"])


def drawn(
    batch: int, heads: tuple[int, int], queries: int, keys: int, width: int, value: int, half: int, padding: str | None, state: bool,
) -> dict[str, Any]:  # fmt: skip
    """Arguments but for window and scale; keys and values are views, as projections leave them."""
    lengths = torch.arange(batch)[:, None] * 5 + 1
    masks = {"left": torch.arange(keys) >= lengths.clamp(max=keys), "any": torch.rand(batch, keys) < 0.5}
    return {
        "query": torch.randn(batch, heads[0], queries, width), "key": torch.randn(batch, keys, heads[1], width).transpose(1, 2),
        "value": torch.randn(batch, keys, heads[1], value).transpose(1, 2), "open": masks.get(padding or ""),
        "state": torch.rand(batch, heads[1], 2 * half, value + 1) * 3 if state else None,
        "map_query": torch.randn(heads[0], width, half) * 0.5, "map_key": torch.randn(heads[1], width, half) * 0.5,
        "gate": torch.randn(heads[0]),
    }  # fmt: skip


def wanted(x: dict[str, Any], window: int, scale: float = 0.4) -> Tensor:
    exact: dict[str, Any] = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in x.items()}
    maps = Maps(exact.pop("map_query"), exact.pop("map_key"), exact.pop("gate"))
    return attend(**exact, maps=maps, window=window, scale=scale)


def wanted_state(x: dict[str, Any], window: int) -> Tensor:
    gone = max(0, x["key"].shape[2] - window + 1)
    open_ = None if x["open"] is None else x["open"][:, :gone]
    state = None if x["state"] is None else x["state"].double()
    return absorbed(x["key"][:, :, :gone].double(), x["value"][:, :, :gone].double(), open_, state, x["map_key"].double())


def state_after(x: dict[str, Any], window: int) -> Tensor:
    return absorb_keys(x["key"], x["value"], x["open"], x["state"], x["map_key"], window)


@few
@given(BATCHES, HEADS, st.integers(1, 75), st.integers(0, 40), WIDTHS, WIDTHS, st.integers(1, 20), WINDOWS, PADDING, st.booleans(),
       SEEDS)  # fmt: skip
def test_a_sequence_in_chunks(batch, heads, queries, past, width, value, half, window, padding, state, seed) -> None:
    torch.manual_seed(seed)
    x = drawn(batch, heads, queries, queries + past, width, value, half, padding, state)
    with ruled(**SMALL):
        found = hybrid_attention(**x, window=window, scale=0.4)
        after = state_after(x, window)
    assert error(found, wanted(x, window)) < TOLERANCE
    assert error(after, wanted_state(x, window)) < TOLERANCE
    assert found.transpose(1, 2).is_contiguous() and after.is_contiguous()


@few
@given(BATCHES, st.sampled_from([(1, 1), (6, 2), (20, 1)]), st.integers(0, 50), WIDTHS, WIDTHS, WINDOWS, PADDING, st.booleans(),
       SEEDS)  # fmt: skip
def test_one_query(batch, heads, past, width, value, window, padding, state, seed) -> None:
    """Its heads are rows of one tile where they fit."""
    torch.manual_seed(seed)
    x = drawn(batch, heads, 1, 1 + past, width, value, 6, padding, state)
    assert error(hybrid_attention(**x, window=window, scale=0.4), wanted(x, window)) < TOLERANCE
    assert error(state_after(x, window), wanted_state(x, window)) < TOLERANCE


@pytest.mark.parametrize("length,window", [(150, 40), (130, 2)])
def test_the_table_s_own_tiles(length: int, window: int) -> None:
    torch.manual_seed(0)
    x = drawn(1, (2, 1), length, length, 64, 70, 40, "left", True)
    assert error(hybrid_attention(**x, window=window, scale=0.1), wanted(x, window, 0.1)) < TOLERANCE
    assert error(state_after(x, window), wanted_state(x, window)) < TOLERANCE


@pytest.mark.parametrize("pieces", [[1] * 14, [9, 1, 1, 3], [2, 12]])
def test_the_recurrent_step_makes_what_one_pass_makes(pieces: list[int]) -> None:
    """Of what was read, each step has a state and the last `window - 1` keys."""
    torch.manual_seed(0)
    x, window = drawn(2, (4, 2), 14, 14, 7, 9, 6, "left", False), 5
    whole = wanted(x, window)
    maps = {name: x[name] for name in ("map_query", "map_key", "gate")}
    held, state, end = {name: x[name][:, :, :0] for name in ("key", "value")}, torch.zeros(2, 2, 12, 10), 0
    for size in pieces:
        start, end = end, end + size
        joined = {name: torch.cat([held[name], x[name][:, :, start:end]], 2) for name in held}
        open_ = x["open"][:, end - joined["key"].shape[2] : end]
        step = {"query": x["query"][:, :, start:end], **joined, "open": open_, "state": state, **maps}
        found = hybrid_attention(**step, window=window, scale=0.4)
        assert float((found - whole[:, :, start:end]).abs().max()) < TOLERANCE * float(whole.abs().max())
        state = state_after(step, window)
        held = {name: tensor[:, :, 1 - window :] for name, tensor in joined.items()}


def test_what_is_wrong_is_found() -> None:
    """Each change of a call, however small, is far beyond what the tests above let pass."""
    torch.manual_seed(0)
    x = drawn(1, (2, 1), 40, 50, 7, 9, 6, "left", True)
    right, scale = wanted(x, 5), 0.4
    open_ = x["open"].clone()
    open_[:, 30] = False
    changes: tuple[dict[str, Any], ...] = (
        {"gate": x["gate"] + 0.01}, {"state": x["state"] * 1.01}, {"state": None}, {"open": open_},
        {"map_key": x["map_key"] * 1.01}, {"map_query": x["map_query"].flip(0)}, {"value": x["value"].roll(1, 2)},
    )  # fmt: skip
    with ruled(**SMALL):
        assert error(hybrid_attention(**x, window=5, scale=scale), right) < TOLERANCE
        assert error(hybrid_attention(**x, window=6, scale=scale), right) > 20 * TOLERANCE
        assert error(state_after(x, 6), wanted_state(x, 5)) > 20 * TOLERANCE
        for change in changes:
            assert error(hybrid_attention(**x | change, window=5, scale=scale), right) > 20 * TOLERANCE, change.keys()


def test_half_precision_loses_no_more_than_its_rounding() -> None:
    """And sums are rounded as their normaliser is: what is lost does not make all of it smaller."""
    torch.manual_seed(0)
    x = drawn(1, (2, 1), 40, 40, 16, 30, 6, "left", True)
    x |= {name: t.half() for name, t in x.items() if name not in ("open", "state")}
    with ruled(**SMALL):
        found, after = hybrid_attention(**x, window=2, scale=0.3), state_after(x, 2)
    assert (found.dtype, after.dtype) == (torch.float16, torch.float32)
    right = wanted(x, 2, 0.3)
    assert error(found, right) < 1e-3 and error(after, wanted_state(x, 2)) < 5e-4
    assert abs(float((found.double() * right).sum() / right.square().sum()) - 1) < 1e-4


def test_no_feature_is_zero() -> None:
    torch.manual_seed(0)
    x = drawn(1, (2, 1), 2, 2, 16, 9, 6, None, False)
    x["map_key"] *= 30
    after, right = state_after(x, 2)[..., -1].double(), wanted_state(x, 2)[..., -1]
    assert float(right.min()) == 1e-12
    assert float(((after - right) / right).abs().max()) < 10 * TOLERANCE, "e ** -20 of a float32 has no more digits"


def test_nothing_to_attend_to_and_nothing_to_absorb() -> None:
    x = drawn(2, (4, 2), 3, 3, 7, 9, 6, None, True)
    empty = {**x, "query": x["query"][:, :, :0]}
    assert hybrid_attention(**empty, window=5, scale=0.4).shape == (2, 4, 0, 9)
    assert torch.equal(state_after(x, 5), x["state"]) and not state_after({**x, "state": None}, 5).any()
    closed = {**x, "open": torch.zeros(2, 3, dtype=torch.bool), "state": None}
    assert not hybrid_attention(**closed, window=2, scale=0.4).any()
