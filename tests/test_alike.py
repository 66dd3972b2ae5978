"""A compressed model under torch.compile: a cache that calls bring is looked at once, and every change that dynamo would notice is."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwcompile as lw

pytest.importorskip("transformers", reason="the models are transformers' own: install lwcompile[hf]")
from tiny import ids, llama

from lwcompile.backends.dynamo import alike, still
from lwcompile.backends.dynamo.alike import Alike
from lwcompile.backends.inductor import native
from lwcompile.manager import relative_error

PLAN = "sites: {block0.mlp.up_proj: 'quantize{bits=8,group_size=16,solver=rtn}'}"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(alike, "MANY", 0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def m() -> Any:
    return copy.deepcopy(llama(layers=2))


def compiled(of: nn.Module) -> Any:
    options: Any = {"codegen": "eager", "plan": lw.Plan.parse(PLAN)}
    made: Any = torch.compile(of, backend="layerwise", options=options, dynamic=False)
    return torch.no_grad()(lambda x, cache: made(x, past_key_values=cache).logits)


def filled(m: Any, length: int = 16, seed: int = 0) -> Any:
    """A static cache behind five tokens."""
    from transformers import StaticCache

    cache = StaticCache(config=m.config, max_cache_len=length)
    with torch.no_grad():
        m(ids(1, 5, seed=seed), past_key_values=cache)
    return cache


def test_another_cache_is_taken_by_the_same_code(m, graphs):
    c, x, caches = compiled(m), ids(1, 1), [filled(m), filled(m, seed=1)]
    twins = copy.deepcopy(caches)
    made = [c(x, cache) for cache in (caches[0], caches[0], caches[1], caches[0])]
    assert len(graphs) == 1
    wanted = [_plain(m, x, twin) for twin in (twins[0], twins[0], twins[1], twins[0])]
    for a, b in zip(wanted, made):
        assert relative_error(a, b) < 0.02  # eight bits
    assert relative_error(made[0], made[2]) > 0.1


def _plain(m: Any, x: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return m(x, past_key_values=cache).logits


def test_dynamo_asks_nothing_of_layers(m):
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    compiled(m)(ids(1, 1), filled(m))
    found, function = list[str](), type(m).forward
    while function is not None:
        found += [line for e in _debug_get_cache_entry_list(function.__code__) for line in str(e.guard_manager).splitlines()]
        function = getattr(function, "__wrapped__", None)
    assert sum("is like the one before" in line for line in found) == 1
    assert not [line for line in found if ".layers[1]" in line and "source=" in line]


def replaced(cache: Any) -> None:
    cache.layers[0].keys = cache.layers[0].keys.clone()


CHANGES = {
    "longer": (2, lambda m, cache: filled(m, 24)),
    "a tensor of another form": (
        2,
        lambda m, cache: setattr(cache.layers[1], "values", cache.layers[1].values.double()) or cache,
    ),
    "a tensor resized in place": (
        2,
        lambda m, cache: setattr(cache.layers[1].keys, "data", cache.layers[1].keys.data[:, :, :8]) or cache,
    ),
    "a number": (2, lambda m, cache: setattr(cache.layers[0], "is_initialized", False) or cache),
    "a function on an instance": (2, lambda m, cache: setattr(cache.layers[0], "update", cache.layers[0].update) or cache),
    "its class": (
        2,
        lambda m, cache: setattr(cache.layers[1], "__class__", type("Other", (type(cache.layers[1]),), {})) or cache,
    ),
    "an equal tensor": (1, lambda m, cache: replaced(cache) or cache),
    "an attribute that is not read": (1, lambda m, cache: setattr(cache.layers[0], "note", 1) or cache),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, m, graphs):
    """Against what is compiled for the changed cache alone."""
    count, how = CHANGES[change]
    c, x = compiled(m), ids(1, 1)
    c(x, cache := filled(m))
    c(x, cache)
    assert len(graphs) == 1
    try:
        twin = copy.deepcopy(cache := how(m, cache))
        made = c(x, cache)
    except Exception as error:  # which the model raises of such a cache by itself
        assert "compiled under a plan" not in str(error)
        with pytest.raises(type(error)):
            torch._dynamo.reset()
            compiled(m)(x, twin)
        return
    assert len(graphs) == count
    torch._dynamo.reset()
    assert torch.equal(made, compiled(m)(x, twin))


def test_a_cache_that_is_gone_is_not_held(m):
    c, cache = compiled(m), filled(m)
    c(ids(1, 1), cache)
    c(ids(1, 1), cache)
    gone = [weakref.ref(cache), weakref.ref(cache.layers[0].keys)]
    del cache
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# --- what is asked


class Layer:
    sliding = False

    def __init__(self) -> None:
        self.keys, self.values, self.used = torch.zeros(2, 3), torch.ones(2, 3), True


class Held:
    def __init__(self) -> None:
        self.layers, self.sizes = [Layer(), Layer()], (1, 2)


def asks(kind: str, name: str, **keywords: Any) -> Any:
    return SimpleNamespace(create_fn_name=lambda: kind, name=name, create_fn=SimpleNamespace(keywords=keywords))


GUARDS = [
    asks("TYPE_MATCH", "L['c']"),
    asks("SEQUENCE_LENGTH", "L['c'].layers"),
    asks("SEQUENCE_LENGTH", "L['c'].sizes"),
    asks("TYPE_MATCH", "L['c'].layers[1]"),
    asks("CONSTANT_MATCH", "L['c'].layers[0].used"),
    asks("CONSTANT_MATCH", "L['c'].sizes[1]"),
    asks("TENSOR_MATCH", "L['c'].layers[0].keys"),
    asks("TENSOR_MATCH", "L['c'].layers[0].values"),
    asks("NOT_PRESENT_IN_GENERIC_DICT", "L['c'].layers[0]", attr="update"),
    asks("HASATTR", "L['c'].layers[0]", attr="sliding"),
    asks("HASATTR", "L['c'].layers[1]", attr="used"),
]


@pytest.fixture(params=["by C++", "by Python"])
def looks(request, monkeypatch):
    if request.param == "by Python":
        monkeypatch.setattr(still, "_looks", lambda what, count: None)
    elif reason := native.load(*still.SOURCE):
        pytest.skip(reason)
    else:
        monkeypatch.setattr(still, "MANY", 0)
        assert still._looks("forms", 0)


@pytest.fixture
def held(looks) -> tuple[Alike, Held]:
    made = Alike("L['c']", first := Held())
    assert all(made.takes(guard) for guard in GUARDS)
    assert made.holds(first) and made.holds(first)
    return made, first


DIFFERENT = {
    "a layer more": lambda c: c.layers.append(Layer()),
    "a layer less": lambda c: c.layers.pop(),
    "another kind of layer": lambda c: c.layers.__setitem__(1, Held()),
    "another kind of list": lambda c: setattr(c, "layers", {0: c.layers[0], 1: c.layers[1]}),
    "a class": lambda c: setattr(c.layers[1], "__class__", type("Other", (Layer,), {})),
    "a constant": lambda c: setattr(c.layers[0], "used", False),
    "a constant of another type": lambda c: setattr(c.layers[0], "used", 1),
    "a constant that is gone": lambda c: delattr(c.layers[0], "used"),
    "an attribute more": lambda c: setattr(c.layers[0], "update", len),
    "an attribute less": lambda c: delattr(c.layers[1], "used"),
    "a shape": lambda c: setattr(c.layers[0], "keys", torch.zeros(3, 2)),
    "strides": lambda c: setattr(c.layers[0], "keys", torch.zeros(3, 2).T),
    "a type": lambda c: setattr(c.layers[0], "keys", torch.zeros(2, 3, dtype=torch.float16)),
    "a subclass": lambda c: setattr(c.layers[0], "keys", nn.Parameter(torch.zeros(2, 3), requires_grad=False)),
    "gradients": lambda c: c.layers[0].keys.requires_grad_(),
    "turned in place": lambda c: c.layers[0].keys.t_(),
    "resized in place": lambda c: c.layers[0].keys.resize_(2, 2),
    "more dimensions in place": lambda c: setattr(c.layers[0].keys, "data", torch.zeros(1, 1, 1, 1, 1, 1, 1)),
    "one tensor twice": lambda c: setattr(c.layers[0], "keys", c.layers[0].values),
}
ALIKE = {
    "written to": lambda c: c.layers[0].keys.add_(1),
    "another tensor": lambda c: setattr(c.layers[0], "keys", torch.ones(2, 3)),
    "its memory": lambda c: setattr(c.layers[0].keys, "data", torch.ones(2, 3)),
    "what nobody asked for": lambda c: setattr(c.layers[1], "keys", None),
    "an equal constant": lambda c: setattr(c, "sizes", (1, 2)),
    "an equal layer": lambda c: c.layers.__setitem__(1, Layer()),
}


@pytest.mark.parametrize("change", [*DIFFERENT, *ALIKE])
@pytest.mark.parametrize("new", [False, True])
def test_an_object_holds_if_all_that_was_asked_is_so(held, change, new):
    made, c = held
    c = Held() if new else c
    {**DIFFERENT, **ALIKE}[change](c)
    assert made.holds(c) is (change in ALIKE)
    assert made.holds(c) is (change in ALIKE) and made.holds(Held())


def test_a_class_that_changes_is_noticed(held, monkeypatch):
    made, c = held
    monkeypatch.setattr(Layer, "sliding", True)
    assert not made.holds(c)


class Computed(Held):
    @property
    def width(self) -> int:
        return 3


@pytest.mark.parametrize(
    "guard",
    [
        asks("TYPE_MATCH", "L['d'].layers"),
        asks("TYPE_MATCH", "L['c'].layers[7]"),
        asks("CONSTANT_MATCH", "L['c'].layers"),  # may change within
        asks("CONSTANT_MATCH", "L['c'].width"),
        asks("HASATTR", "L['c']", attr="width"),
        asks("HASATTR", "L['c']", attr="nowhere"),
        asks("NOT_PRESENT_IN_GENERIC_DICT", "L['c']", attr="sizes"),
        asks("TENSOR_MATCH", "L['c'].sizes"),
        asks("WEAKREF_ALIVE", "L['c']"),
        asks("TYPE_MATCH", "type(L['c'])"),
    ],
    ids=lambda guard: f"{guard.create_fn_name()} {guard.name}",
)
def test_other_guards_stay_dynamo_s(guard):
    assert not Alike("L['c']", Computed()).takes(guard)
