"""A compressed model under torch.compile: what dynamo would have guarded is still noticed, and weights are not handed over."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lwcompile as lw

pytest.importorskip("transformers", reason="the models are transformers' own: install lwcompile[hf]")
from tiny import ids, llama

from lwcompile.backends.dynamo import still, watched
from lwcompile.backends.dynamo.watched import Watch
from lwcompile.backends.inductor import native
from lwcompile.manager import relative_error

PLAN = "sites: {block0.mlp.up_proj: 'quantize{bits=8,group_size=16,solver=rtn}'}"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(seed: int = 0) -> Any:
    return copy.deepcopy(llama(layers=1, seed=seed))


def compiled(of: nn.Module) -> Any:
    options: Any = {"codegen": "eager", "plan": lw.Plan.parse(PLAN)}
    made: Any = torch.compile(of, backend="layerwise", options=options)
    return torch.no_grad()(lambda x: made(x, use_cache=False).logits)


def test_weights_are_not_handed_over_and_modules_are_guarded_once(graphs):
    c, x = compiled(m := model()), ids(2, 9)
    wanted = c(x)
    frozen = graphs[0].frozen
    assert not frozen.positions and len(frozen.places.keys) == len({id(p) for p in m.parameters()}) + 1  # rotary's frequencies
    assert torch.equal(c(x), wanted) and len(graphs) == 1
    guards = _guards(m)
    assert sum("_modules['0']" in line and "_MATCH" in line for line in guards) < 20  # some 50, and 5 for each weight
    assert sum("modules hold what they held" in line for line in guards) == 1


def _guards(m: nn.Module) -> list[str]:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    found, function = list[str](), type(m).forward
    while function is not None:
        found += [line for e in _debug_get_cache_entry_list(function.__code__) for line in str(e.guard_manager).splitlines()]
        function = getattr(function, "__wrapped__", None)
    return found


CHANGES = {
    "a number": lambda layer: setattr(layer.self_attn, "scaling", 1.0),
    "a module": lambda layer: setattr(layer.mlp, "act_fn", nn.Tanh()),
    "its class": lambda layer: setattr(layer.mlp.act_fn, "__class__", nn.Tanh),
    "a bias where there was none": lambda layer: setattr(layer.mlp.down_proj, "bias", nn.Parameter(torch.ones(32))),
    "a function on the instance": lambda layer: setattr(layer.mlp.act_fn, "forward", lambda x: x * 0.5),
    "an attribute that was not there": lambda layer: setattr(layer.input_layernorm, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_compiled_again(change, graphs):
    """Against the changed model, compiled afresh."""
    c, x = compiled(m := model()), ids(2, 9)
    before = c(x)
    CHANGES[change](m.model.layers[0])
    after = c(x)
    torch._dynamo.reset()
    assert torch.equal(after, compiled(m)(x))
    assert relative_error(before, after) > 1e-3 and len(graphs) == 3


def test_an_equal_number_is_no_change(graphs):
    c, x = compiled(m := model()), ids(2, 9)
    before, attention = c(x), m.model.layers[0].self_attn
    attention.scaling = float(str(attention.scaling))
    attention.unread = 1
    assert torch.equal(c(x), before) and len(graphs) == 1
    attention.scaling = 1
    assert not torch.equal(c(x), before) and len(graphs) == 2


@pytest.mark.parametrize("how", ["in place", "replaced", "with its module"])
@pytest.mark.parametrize("rows", [2, 3])
def test_a_changed_weight_is_an_error_and_never_stale(how, rows):
    """Whether the graph would have been compiled again, for other sizes or another module, or not."""
    c, x = compiled(m := model()), ids(2, 9)
    c(x)
    mlp = m.model.layers[0].mlp
    with torch.no_grad():
        if how == "in place":
            mlp.up_proj.weight.add_(1)
        elif how == "replaced":
            mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.clone())
        else:
            m.model.layers[0].mlp = copy.deepcopy(mlp)
    with pytest.raises(Exception, match="a weight was changed after the model was compiled under a plan"):
        c(ids(rows, 9))
    torch._dynamo.reset()
    assert torch.isfinite(c(x)).all()


def test_a_model_that_is_gone_is_not_held():
    m = model()
    compiled(m)(ids(2, 9))
    gone = weakref.ref(m)
    del m
    gc.collect()
    assert gone() is None


def test_a_model_that_changes_at_every_call_is_left_to_dynamo(graphs):
    """By its guards, an object is as good as another of its type."""
    c, x = compiled(m := model()), ids(2, 9)
    wanted = c(x)
    for _ in range(12):
        m.config = type(m.config).from_dict(m.config.to_dict())
        assert torch.equal(c(x), wanted)
    assert len(graphs) <= watched.TRIES + 1
    other = model(seed=1)
    fresh_one = compiled(other)(x)
    assert relative_error(wanted, fresh_one) > 0.1 and torch.equal(c(x), wanted)
    with torch.no_grad():
        m.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(Exception, match="a weight was changed"):
        c(ids(3, 9))


def test_hooks_are_noticed_where_dynamo_was_told_to_look(graphs):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        c, x = compiled(m := model()), ids(2, 9)
        before = c(x)
        m.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, given, made: made * 0.5)
        assert relative_error(before, c(x)) > 1e-3 and len(graphs) == 2


# --- what is looked at


@pytest.fixture(params=["by C++", "by C++, without Python's count", "by Python"])
def looks(request, monkeypatch):
    if request.param == "by Python":
        monkeypatch.setattr(still, "_looks", lambda what, count: None)
    elif reason := native.load(*still.SOURCE):
        pytest.skip(reason)
    elif request.param != "by C++":
        found = {what: look for what, look in still._functions().items() if "tag" not in what}
        monkeypatch.setattr(still, "_looks", lambda what, count: found.get(what))
    else:
        monkeypatch.setattr(still, "MANY", 0)
        assert still._looks("places", 0) and (still._looks("tags", 0) or sys.version_info >= (3, 13))
    return request.param


THINGS = st.sampled_from([1, 1.0, True, None, "a", "b", 10**30, (1,), object, len])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from("abcde"), THINGS), st.sampled_from("abcdefg"), THINGS, st.booleans())
def test_places_are_the_same_until_one_holds_another_object(looks, before, key, value, gone):
    holder = dict(before)
    places = still.Places((holder, k) for k in "abcdef")
    assert places.same() and places.same() and not places.add(holder, "a")
    if gone:
        holder.pop(key, None)
    else:
        holder[key] = value
    same = all(holder.get(k, still) is before.get(k, still) for k in "abcdef")
    assert places.same() is same and places.same() is same  # the second time of dictionaries that were written to before
    places.take(places.now())
    assert places.same()


def test_a_class_a_write_and_another_memory_are_noticed(looks):
    typed, module = still.Typed(), nn.ReLU()
    typed.add(module)
    typed.add(nn.Tanh())
    assert typed.same()
    module.__class__ = nn.Tanh  # type: ignore[assignment]
    assert not typed.same()
    for change in (
        lambda t: t.add_(1),
        lambda t: t.view(-1)[1:].zero_(),
        lambda t: setattr(t, "data", t.data.clone()),
        lambda t: t.set_(t.clone()),
        lambda t: torch.utils.swap_tensors(t, torch.ones(3, 4)),
    ):
        tensors = [torch.ones(3), torch.ones(3, 4), torch.ones(())]
        unwritten = still.Unwritten(tensors)
        assert unwritten.same() and not unwritten.tensors[1].add(1).eq(1).any() and unwritten.same()
        change(tensors[1])
        assert not unwritten.same()


class Shadowed(nn.Module):
    """An attribute whose class computes it, whatever its dictionary holds."""

    @property
    def gain(self) -> float:
        return 2.0

    @gain.setter
    def gain(self, value: float) -> None: ...


def asks(kind: str, name: str, **keywords: Any) -> Any:
    return SimpleNamespace(create_fn_name=lambda: kind, name=name, create_fn=SimpleNamespace(keywords=keywords))


def test_only_what_a_dictionary_decides_is_taken_over():
    m: Any = nn.Sequential(nn.Linear(2, 2), Shadowed())
    m.plain, m.listed = 3, [1]
    m[1].__dict__["gain"] = 2.0
    watch = Watch("L['m']", m)
    assert watch.takes(asks("EQUALS_MATCH", "L['m'].plain"))
    assert watch.takes(asks("TYPE_MATCH", "L['m']._modules['0']._parameters"))
    assert watch.takes(asks("DICT_NOT_CONTAINS", "L['m']._modules['0'].__dict__", key="forward"))
    assert not watch.takes(asks("DICT_NOT_CONTAINS", "L['m']._modules['0'].__dict__", key="training"))
    assert watch.takes(asks("HASATTR", "L['m']._modules['0']", attr="training"))
    assert not watch.takes(asks("HASATTR", "L['m']._modules['0']", attr="weight"))  # its class looks for it elsewhere
    assert not watch.takes(asks("HASATTR", "L['m']._modules['0']", attr="nowhere"))
    assert not watch.takes(asks("HASATTR", "L['m']._modules['1']", attr="gain"))
    for kind, name in (
        ("EQUALS_MATCH", "L['m'].listed"),  # may change within
        ("TYPE_MATCH", "L['m'].listed[0]"),
        ("EQUALS_MATCH", "L['m']._modules['1'].gain"),
        ("TYPE_MATCH", "L['m'].extra_repr"),  # its class's
        ("TYPE_MATCH", "L['m']._modules['2']"),
        ("TYPE_MATCH", "L['n'].plain"),
        ("TENSOR_MATCH", "L['m']._modules['0']._parameters['weight']"),
        ("SEQUENCE_LENGTH", "L['m'].plain"),
    ):
        assert not watch.takes(asks(kind, name)), (kind, name)
    assert watch.holds(m) and not watch.holds(nn.Sequential(*m))
    m[0].forward = m[0].forward
    assert not watch.holds(m)
