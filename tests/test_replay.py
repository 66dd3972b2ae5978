"""Calls that C++ makes again: what they compute, what they must not take for granted, and what is left to Python."""

# pyright: reportArgumentType=false

from __future__ import annotations

import copy
import logging
import shutil
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lwcompile.backends.inductor import native, replay, tape
from lwcompile.backends.inductor.codegen import Inductor
from lwcompile.backends.inductor.replay import Replayed

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the tape is C++")

aten = torch.ops.aten
W = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def library():
    assert native.load(tape.SOURCE) is None


def inputs(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=random), torch.randn(4, 6, generator=random)]


class Calls:
    """A function whose calls are counted."""

    def __init__(self, function: Any) -> None:
        self.function, self.count = function, 0

    def __call__(self, values: Any) -> Any:
        self.count += 1
        with torch.no_grad():
            return self.function(*values)


def plain(w: Tensor, x: Tensor, y: Tensor) -> list[Any]:
    made = aten.addmm(y, x, w)
    parts = made.view(2, 2, 6).transpose(0, 1)
    return [aten.relu(parts), made[1:, ::2], None, x]


def twice(w: Tensor, x: Tensor, y: Tensor) -> list[Any]:
    y.mul_(2.0)
    row = aten.sum.dim_IntList(aten.mm(x, w), [0], True)
    return [aten.add(y, row, alpha=3), aten.leaky_relu(row, 1), aten.mean(row)]


def check(function: Any, replayed: Any, calls: Calls, rounds: int = 6) -> None:
    for seed in range(rounds):
        mine, theirs = inputs(seed), inputs(seed)
        made, wanted = replayed(mine), function(W, *theirs)
        assert len(made) == len(wanted)
        for a, b in zip([*made, *mine], [*wanted, *theirs]):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("function", [plain, twice])
def test_the_same_values_without_a_call(function, mode):
    calls = Calls(function)
    with mode():
        check(function, Replayed(calls, [W]), calls)
    assert calls.count == 3  # the first, the one that is recorded, the one that proves it


@torch.library.custom_op("lwcompile_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return 3 * x


def test_an_operator_in_python_is_called_from_there():
    def function(w: Tensor, x: Tensor, y: Tensor) -> list[Any]:
        return [torch.ops.lwcompile_tests.tripled(aten.mm(x, w))]

    calls = Calls(function)
    check(function, Replayed(calls, [W]), calls)
    assert calls.count == 3


@torch.library.custom_op("lwcompile_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


torch.library.define("lwcompile_tests::halved.into", "(Tensor(a!) out, Tensor x) -> ()")


@torch.library.impl("lwcompile_tests::halved.into", "CPU")
def _(out: Tensor, x: Tensor) -> None:
    _written.append(out.data_ptr())
    out.copy_(x / 2)


_written: list[int] = []


def test_operators_that_can_write_into_buffers_of_the_tape_s():
    """Into the same one at every call, unless it leaves the call; buffers are views' and operators' to read."""

    def function(w: Tensor, x: Tensor, y: Tensor) -> list[Any]:
        inner = torch.ops.lwcompile_tests.halved(x)
        return [aten.mm(inner[1:], w), aten.relu(inner.view(8, 4)), torch.ops.lwcompile_tests.halved(y)]

    _written.clear()
    calls = Calls(function)
    replayed = Replayed(calls, [W])
    check(function, replayed, calls, rounds=7)
    inner, last = _written[::2], _written[1::2]
    assert calls.count == 3 and len(_written) == 10 and len(set(inner)) == 1  # the proving call, and four more
    made = [replayed(inputs(seed))[2] for seed in range(3)]
    assert len({m.data_ptr() for m in made}) == 3 and not set(inner) & set(last)


def test_outputs_are_the_caller_s_own():
    replayed = Replayed(Calls(lambda w, x, y: [aten.mm(x, w)]), [W])
    made = [replayed(inputs(seed))[0] for seed in range(6)]
    assert all(torch.equal(m, inputs(seed)[0] @ W) for seed, m in enumerate(made))
    assert len({m.data_ptr() for m in made}) == 6


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["mm", "add", "view", "slice", "relu_", "mul", "sum"]), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_any_order_of_operators(steps, seed):
    def function(w: Tensor, x: Tensor, y: Tensor) -> list[Any]:
        for step in steps:
            if step == "mm":
                y = aten.mm(x, w)
            elif step == "add":
                y = aten.add(y, x[:, :6])
            elif step == "view":
                y = y.reshape(2, 12).view(4, 6)
            elif step == "slice":
                x = torch.as_strided(x, x.shape, x.stride(), 0)
            elif step == "relu_":
                y = aten.relu_(y)
            elif step == "mul":
                x = aten.mul(x, 0.5)
            else:
                y = aten.sub(y, aten.sum.dim_IntList(y, []))
        return [x, y, y[:, 1:]]

    calls = Calls(function)
    check(function, Replayed(calls, [W]), calls, rounds=5)
    assert calls.count == 3


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda w, x, y: [aten.mul(x, x.sum().item())], "something else than tensors"),
        (lambda w, x, y: [torch.cat([x, y], 1)], "list of tensors"),
        (lambda w, x, y: [x.view(torch.int32) + 1], "two types"),
        (lambda w, x, y: [x + 1, 3], "something else than tensors"),
    ],
)
def test_what_is_not_understood_stays_python_s(function, why, caplog):
    caplog.set_level(logging.INFO, "lwcompile")
    calls = Calls(function)
    replayed = Replayed(calls, [W])
    for seed in range(4):
        made, wanted = replayed(inputs(seed)), function(W, *inputs(seed))
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(made, wanted))
    assert calls.count == 4
    assert "stay Python's" in caplog.text and why in caplog.text


def test_inputs_that_share_memory_stay_python_s():
    calls = Calls(lambda w, x, y: [x + y])
    replayed = Replayed(calls, [W])
    for _ in range(4):
        x = torch.randn(4, 4)
        assert torch.equal(replayed([x, x[:]])[0], x + x)
    assert calls.count == 4


def test_inputs_of_another_form_are_python_s():
    calls = Calls(lambda w, x, y: [aten.mm(x, w)])
    replayed = Replayed(calls, [W])
    for seed in range(5):
        replayed(inputs(seed))
    x = torch.randn(8, 4).t()
    assert torch.equal(replayed([x, inputs(0)[1]])[0], x @ W) and calls.count == 4
    assert torch.equal(replayed(inputs(9))[0], inputs(9)[0] @ W) and calls.count == 4


LEFT_OUT = {
    "floats": (aten.relu.default, lambda w, x, y: [aten.mm(aten.relu(x), w)]),
    "numbers": (aten.argmax.default, lambda w, x, y: [aten.mul(aten.argmax(x, 1), 2)]),
    "truths": (aten.gt.Scalar, lambda w, x, y: [aten.bitwise_or(aten.gt(x, 0.0), aten.lt(x, -1.0))]),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_tape_that_leaves_something_out_is_found(kind, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lwcompile")
    left_out, function = LEFT_OUT[kind]
    whole = tape.Tape._operator

    def partly(self: Any, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        if func is not left_out:  # its result is taken for a buffer that something filled
            whole(self, func, args, kwargs, made)

    monkeypatch.setattr(tape.Tape, "_operator", partly)
    calls = Calls(function)
    replayed = Replayed(calls, [W])
    x = inputs(0)  # the same inputs each time: what is left over from the call before would be right
    for _ in range(5):
        assert torch.equal(replayed(x)[0], function(W, *x)[0])
    assert calls.count == 5 and "it differs by" in caplog.text


def test_a_tape_that_raises_is_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lwcompile")

    def broken(self: Any, given: Any) -> Any:
        raise RuntimeError("no such slot")

    monkeypatch.setattr(tape.Tape, "run", broken)
    calls = Calls(plain)
    check(plain, Replayed(calls, [W]), calls)
    assert calls.count == 6 and "replayed, it raises RuntimeError" in caplog.text


def test_a_tape_in_use_is_not_spoiled(monkeypatch):
    """By a thread that came for the proof when another had it done, or has it in hand."""
    calls = Calls(lambda w, x, y: [aten.relu(aten.mm(x, w))])
    replayed = Replayed(calls, [W])
    for seed in range(2):
        replayed(inputs(seed))
    late = replayed.next
    with replay._alone:
        assert torch.equal(replayed(inputs(2))[0], (inputs(2)[0] @ W).relu()) and replayed.next == late
    replayed(inputs(3))
    assert replayed.replays
    monkeypatch.setattr(tape.Tape, "spoil", lambda self: pytest.fail("spoiled"))
    assert torch.equal(late(inputs(4))[0], (inputs(4)[0] @ W).relu()) and replayed.replays


def test_kernels_called_in_an_unknown_way_are_not_followed(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lwcompile")
    module = type("Generated", (), {})()
    module.cpp_fused_add_0 = lambda *tensors: None
    monkeypatch.setattr(tape, "_modules", lambda: [module])
    calls = Calls(plain)
    check(plain, Replayed(calls, [W]), calls)
    assert calls.count == 6 and "in a way that is not known" in caplog.text


@pytest.mark.parametrize(("limit", "why"), [("LIMIT", "buffers and outputs take"), ("INPUTS", "inputs take")])
def test_many_bytes_stay_python_s(limit, why, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lwcompile")
    monkeypatch.setattr(tape, limit, 10)
    calls = Calls(lambda w, x, y: [aten.add(x, 1.0)])
    replayed = Replayed(calls, [W])
    for seed in range(4):
        assert torch.equal(replayed(inputs(seed))[0], inputs(seed)[0] + 1)
    assert calls.count == 4 and why in caplog.text


def test_an_operator_that_raises_leaves_the_tape_usable():
    calls = Calls(lambda w, x, y: [aten.index_select(w, 0, x)])
    replayed = Replayed(calls, [W])
    for seed in range(5):
        replayed([torch.tensor([seed]), torch.randn(3)])
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        replayed([torch.tensor([99]), torch.randn(3)])
    assert torch.equal(replayed([torch.tensor([2]), torch.randn(3)])[0], W[2:3]) and calls.count == 3


def test_threads_do_not_meet():
    replayed = Replayed(Calls(lambda w, x, y: [aten.relu(aten.mm(x, w))]), [W])
    wrong: list[int] = []

    def many(first: int) -> None:
        for seed in range(first, first + 200):
            x = inputs(seed)
            if not torch.equal(replayed(x)[0], (x[0] @ W).relu()):
                wrong.append(seed)

    threads = [threading.Thread(target=many, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Counting(nn.Module):
    """Products, a norm, and a buffer that every call writes to."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("count", torch.zeros(3, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        self.count.add_(made)
        return x + made, self.count.sum()


def test_inductor_s_kernels_are_recorded(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lwcompile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = Counting().eval()
    wanted = copy.deepcopy(model)
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False), torch.no_grad():
        compiled = torch.compile(model, backend="layerwise")
        for seed in range(7):
            x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
            for a, b in zip(compiled(x), wanted(x)):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.count, wanted.count, rtol=1e-5, atol=1e-5)
        assert not isinstance(Inductor(replay=False).bind(lambda values: values, []), Replayed)
    torch._dynamo.reset()
    said = [r.getMessage() for r in caplog.records if "without Python from here on" in r.getMessage()]
    assert len(said) == 1 and " 0 kernels" not in said[0]


def test_without_a_compiler_nothing_changes(monkeypatch):
    monkeypatch.setattr(replay, "beside", lambda source: "no compiler")
    calls = Calls(plain)
    check(plain, Replayed(calls, [W]), calls, rounds=5)
    assert calls.count == 5


def test_calls_do_not_wait_for_the_library(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(native, "_builders", {})
    monkeypatch.setattr(native, "load", lambda source: done.wait(60) and None)
    calls = Calls(plain)
    replayed = Replayed(calls, [W])
    check(plain, replayed, calls, rounds=4)
    assert calls.count == 4
    done.set()
    native._builders[tape.SOURCE].join()
    check(plain, replayed, calls)
    assert calls.count == 6
