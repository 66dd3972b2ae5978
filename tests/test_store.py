"""The parameter store: content keys against an independent hash, sharing, writes in place, and files that are read lazily."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lwcompile.errors import BadInput, VerificationError
from lwcompile.graph import OverlayStore
from lwcompile.store import ParameterStore, tensor_bytes, tensor_key

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
DTYPES += (torch.uint8, torch.bool)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    made = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype) if dtype.is_floating_point or dtype == torch.bool else made.abs().to(dtype)


@given(shapes, st.sampled_from(DTYPES), st.integers(0, 3), shapes, st.sampled_from(DTYPES), st.integers(0, 3))
@settings(deadline=None)
def test_equal_keys_mean_equal_tensors(s: tuple, d: torch.dtype, i: int, t: tuple, e: torch.dtype, j: int) -> None:
    a, b = random_tensor(s, d, i), random_tensor(t, e, j)
    same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert (tensor_key(a) == tensor_key(b)) == same


@given(st.sampled_from(DTYPES), st.integers(0, 5))
@settings(deadline=None)
def test_a_key_does_not_depend_on_strides(dtype: torch.dtype, seed: int) -> None:
    a = random_tensor((3, 4), dtype, seed)
    turned = a.t().contiguous().t()
    assert turned.stride() != a.stride() and tensor_key(turned) == tensor_key(a)
    assert bytes(tensor_bytes(turned)) == bytes(a.contiguous().view(torch.uint8).numpy().tobytes())


def test_signed_zeros_are_different_bytes() -> None:
    assert tensor_key(torch.tensor([0.0])) != tensor_key(torch.tensor([-0.0]))


def test_equal_tensors_are_stored_once() -> None:
    store = ParameterStore()
    keys = {store.put(torch.ones(2, 3)), store.put(torch.ones(2, 3)), store.put(torch.ones(3, 2))}
    assert len(keys) == len(store) == 2
    assert store.put(torch.ones(2, 3, requires_grad=True)) in keys and not store[store.put(torch.ones(2, 3))].requires_grad


def test_sizes_without_reading(tmp_path: Path) -> None:
    store = ParameterStore()
    key = store.put(torch.ones(5, 2, dtype=torch.float16))
    store.save(tmp_path / "w.safetensors", [key])
    for known in (store, ParameterStore.open(tmp_path / "w.safetensors")):
        assert (known.shape(key), known.dtype(key), known.nbytes(key)) == ((5, 2), torch.float16, 20)


def test_a_write_in_place_is_noticed_by_the_free_check() -> None:
    store = ParameterStore()
    key = store.put(torch.ones(4))
    store.check([key])
    store[key].mul_(1.0)
    with pytest.raises(VerificationError, match="written in place; make a new tensor with set_tensor"):
        store.check([key])


def test_a_write_behind_autograds_back_is_noticed_by_the_deep_check() -> None:
    store = ParameterStore()
    tensor = torch.ones(4)
    key = store.put(tensor)
    tensor.numpy()[0] = 2.0
    store.check([key])
    with pytest.raises(VerificationError, match="written in place"):
        store.check([key], deep=True)


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.integers(0, 9)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_files_give_back_what_was_stored(tmp_path_factory: pytest.TempPathFactory, made: list) -> None:
    path = tmp_path_factory.mktemp("store") / "w.safetensors"
    store = ParameterStore()
    tensors = {store.put(t): t for t in (random_tensor(*one) for one in made)}
    store.save(path, [*tensors, *tensors])
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(tensors), "each once"
    opened = ParameterStore.open(path)
    assert opened.keys() == tensors.keys()
    assert all(torch.equal(opened[key], tensor) and opened[key].dtype == tensor.dtype for key, tensor in tensors.items())


def test_a_file_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    store = ParameterStore()
    keys = [store.put(torch.full((1000,), float(i))) for i in range(3)]
    store.save(path, keys)
    opened = ParameterStore.open(path)
    assert not opened._resident
    assert torch.equal(opened[keys[1]], store[keys[1]])
    assert not opened._resident, "reading keeps nothing in memory"


def test_a_store_on_disk_takes_new_tensors(tmp_path: Path) -> None:
    store = ParameterStore()
    old = store.put(torch.ones(3))
    store.save(tmp_path / "w.safetensors", [old])
    opened = ParameterStore.open(tmp_path / "w.safetensors")
    new = opened.put(torch.zeros(3))
    assert opened.put(torch.ones(3)) == old and len(opened) == 2
    opened.save(tmp_path / "both.safetensors", [old, new])
    assert ParameterStore.open(tmp_path / "both.safetensors").keys() == {old, new}


def test_a_file_that_is_not_whole_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        ParameterStore.open(path)


def test_changed_bytes_are_noticed_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    store = ParameterStore()
    key = store.put(torch.ones(64))
    store.save(path, [key])
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(BadInput, match="damaged"):
        ParameterStore.open(path)[key]


def test_an_overlay_leaves_the_store_below_alone() -> None:
    below = ParameterStore()
    key = below.put(torch.ones(2))
    overlay = OverlayStore(below)
    held, new = overlay.hold(torch.zeros(2)), overlay.put(torch.full((2,), 3.0))
    assert {key, held, new} <= {k for k in (key, held, new) if k in overlay}
    assert held not in below and new not in below
    assert overlay.shape(key) == (2,) and overlay.dtype(key) == torch.float32 and torch.equal(overlay[key], below[key])
