"""Programs on disk: what is saved comes back bit for bit, and a file that something else wrote is refused in one sentence."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from lwcompile.errors import BadInput, LwError, Refused
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.serialize import decode, encode, graph_from_json, graph_to_json, resolve_target, target_name
from lwcompile.store import ParameterStore
from lwcompile.structure import find_structure
from lwcompile.tiny import programs, token_ids
from lwcompile.trials import context

aten = torch.ops.aten


def saved(folder: Path, name: str = "decoder") -> Program:
    program = programs()[name]
    program.save(folder)
    return program


def output(program: Program, rows: int = 3, length: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return program.main.module()(token_ids(rows, length))[0]


# --- round trips


@pytest.mark.parametrize("name", ["decoder", "encoder", "parallel"])
def test_a_graph_comes_back_from_json(name: str) -> None:
    graph = programs()[name].main
    text = json.dumps(graph.to_json())
    again = ModelGraph.from_json(json.loads(text), graph.store)
    assert again.digest() == graph.digest()
    assert [n.name for n in again.nodes] == [n.name for n in graph.nodes]
    assert [n.target for n in again.nodes] == [n.target for n in graph.nodes]
    assert [i for i in again.inputs] == [i for i in graph.inputs]
    for a, b in zip(graph.nodes, again.nodes):
        assert a.meta.get("path") == b.meta.get("path")
        assert getattr(a.meta["val"], "shape", None) == getattr(b.meta["val"], "shape", None)


def test_a_program_comes_back_from_its_folder(tmp_path: Path) -> None:
    program = programs()["decoder"]
    program.task, program.license, program.config, program.remarks = "causal-lm", "mit", {"eos_token_id": 2}, ("said",)
    loaded = Program.load(program.save(tmp_path))
    assert loaded.digest() == program.digest()
    assert (loaded.task, loaded.license, loaded.config, loaded.remarks) == ("causal-lm", "mit", {"eos_token_id": 2}, ("said",))
    assert torch.equal(output(loaded), output(program))
    assert find_structure(loaded).tied == [("embedding", "head")]


def test_no_file_of_a_program_is_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["program.json", "weights.safetensors"]
    for path in tmp_path.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK")), f"{path.name} is a pickle or an archive that may hold one"


def test_a_quantized_program_comes_back(tmp_path: Path) -> None:
    program = programs()["decoder"]
    structure = find_structure(program)
    ctx = context(program, structure)
    for id in ("block0.mlp.up_proj", "embedding"):
        make("passes", "quantize{bits=3,group_size=16,solver=rtn}").apply(program.main, structure.sites[id], ctx)
    loaded = Program.load(program.save(tmp_path))
    assert loaded.digest() == program.digest() and loaded.main.level() == "quantized"
    assert torch.equal(output(loaded), output(program))


def test_saving_over_a_program_that_is_open(tmp_path: Path) -> None:
    """Its tensors are memory-mapped from the file that is replaced."""
    program = saved(tmp_path)
    loaded = Program.load(tmp_path)
    loaded.save(tmp_path)
    assert Program.load(tmp_path).digest() == program.digest()
    assert torch.equal(output(Program.load(tmp_path)), output(program))


arguments = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(arguments)
@settings(max_examples=60)
def test_plain_arguments_come_back(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value))), {})
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    "value",
    [torch.float16, torch.int64, torch.strided, torch.channels_last, torch.device("cpu"), slice(1, None, 2), float("-inf")],
    ids=str,
)
def test_values_of_torch_come_back(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value))), {}) == value


def test_nan_comes_back_as_nan() -> None:
    value = decode(json.loads(json.dumps(encode(float("nan")))), {})
    assert value != value


def test_nodes_and_sizes_come_back() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    twice = graph.call_function(operator.mul, (size, 2))
    graph.output((graph.call_function(aten.reshape.default, (x, [twice, -1])),))
    again = graph_from_json(json.loads(json.dumps(graph_to_json(graph))))
    found = fx.GraphModule({}, again)(torch.arange(8).reshape(2, 4))[0]
    assert found.shape == (4, 2)


# --- what is not in the closed list


@pytest.mark.parametrize("target", [torch.relu, print, len, torch.load, eval, lambda x: x])
def test_a_function_outside_the_list_cannot_be_saved(target: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match="neither a torch operator nor arithmetic on sizes"):
        target_name(target)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "torch.load",
        "operator.methodcaller",
        "operator.attrgetter",
        "aten.no_such_operator.default",
        "nobody.has.this",
        "aten.relu",
        "",
        "a.b.c.d",
        "aten.__class__.mro",
        "aten.__init__.__globals__",
        "aten.add.overloads",
        "aten.add_.Tensor",
        "aten.copy_.default",
        "aten.from_file.default",
        "load_library.__call__.__self__",
    ],
)
def test_a_function_outside_the_list_cannot_be_loaded(name: str) -> None:
    with pytest.raises(BadInput, match="the program calls"):
        resolve_target(name)


def test_every_name_in_a_program_resolves_to_what_it_was() -> None:
    for program in programs().values():
        for node in program.main.nodes:
            if node.op == "call_function":
                assert resolve_target(target_name(node.target)) is node.target


def test_an_argument_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(Refused, match="of type object"):
        encode(object())


@pytest.mark.parametrize("value", [{"dtype": "load"}, {"layout": "float32"}, {"pickle": "gASV"}, {"memory_format": "os"}, {}])
def test_a_value_of_an_unknown_kind_is_refused(value: Any) -> None:
    with pytest.raises(BadInput, match="the program"):
        decode(value, {})


# --- files that something else wrote


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "program.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def node(data: dict[str, Any], word: str) -> dict[str, Any]:
    return next(n for n in data["entries"]["forward"]["nodes"] if word in n["target"])


TAMPERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda d: d.update(format=99),
    "no entries": lambda d: d.pop("entries"),
    "entries of another shape": lambda d: d.update(entries=[1, 2]),
    "a function that runs commands": lambda d: node(d, "linear").update(target="os.system"),
    "an operator that writes": lambda d: node(d, "gelu").update(target="aten.gelu_.default"),
    "another kind of node": lambda d: node(d, "linear").update(op="call_method"),
    "a node that reads itself": lambda d: node(d, "gelu").update(args=[{"node": node(d, "gelu")["name"]}]),
    "a node that is not there": lambda d: node(d, "gelu").update(args=[{"node": "nobody"}]),
    "two nodes of one name": lambda d: node(d, "gelu").update(name=node(d, "linear")["name"]),
    "too few arguments": lambda d: node(d, "linear").update(args=[]),
    "a tensor that is not stored": lambda d: d["entries"]["forward"]["tensors"].update({"norm.weight": "0" * 32}),
    "a read of no tensor": lambda d: d["entries"]["forward"]["tensors"].pop("norm.weight"),
    "shapes that do not fit": lambda d: d["entries"]["forward"]["tensors"].update(
        {"norm.weight": d["entries"]["forward"]["tensors"]["blocks.0.mlp.up_proj.weight"]}
    ),
    "an unknown dtype": lambda d: d["entries"]["forward"]["inputs"][0].update(dtype="load"),
    "a file outside": lambda d: d.update(assets=["../secret.txt"]),
    "a node without a name": lambda d: node(d, "linear").pop("name"),
    "no list of nodes": lambda d: d["entries"]["forward"].update(nodes=None),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_program_is_bad_input(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    edit(tmp_path, TAMPERED[name])
    with pytest.raises(BadInput) as caught:
        Program.load(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text and "\n" not in text.split(" at\n")[0]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"program"', "\x00\x01", "{}"])
def test_a_program_that_is_no_json_object_is_bad_input(tmp_path: Path, text: str) -> None:
    saved(tmp_path)
    (tmp_path / "program.json").write_text(text)
    with pytest.raises(BadInput, match=r"program\.json"):
        Program.load(tmp_path)


def test_a_folder_without_a_program_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no program\.json; name a folder"):
        Program.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_bad_input(tmp_path: Path, keep: float) -> None:
    saved(tmp_path)
    path = tmp_path / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        Program.load(tmp_path)


def test_missing_weights_are_bad_input(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(BadInput, match=r"weights\.safetensors"):
        Program.load(tmp_path)


def test_weights_of_another_program_are_bad_input(tmp_path: Path) -> None:
    saved(tmp_path)
    ParameterStore().save(tmp_path / "weights.safetensors", [])
    with pytest.raises(BadInput, match=r"lacks \d+ tensors"):
        Program.load(tmp_path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BadInput, match="is not the one that was saved"):
        output(Program.load(tmp_path))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_to_the_json_does_worse_than_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any node's any field, replaced by anything: it loads, or it is bad input."""
    folder = tmp_path_factory.mktemp("damaged")
    saved(folder)

    def change(d: dict[str, Any]) -> None:
        rows = d["entries"]["forward"]["nodes"]
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        key = data.draw(st.sampled_from(sorted(row)))
        row[key] = data.draw(arguments | st.dictionaries(st.sampled_from(["node", "slice", "dtype", "x"]), arguments, max_size=2))

    edit(folder, change)
    try:
        Program.load(folder)
    except LwError as error:
        assert isinstance(error, BadInput)
