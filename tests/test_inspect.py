"""The structure tree: totals against the program, runs of equal blocks, kinds of stream, and the drawing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from rich.console import Console
from tiny import llama_program, pair
from torch import Tensor, nn

from lwcompile import cli, pipeline
from lwcompile.apply import apply_plan
from lwcompile.backends.inductor import packed as packed_operators
from lwcompile.context import Context
from lwcompile.html.diagram import draw
from lwcompile.inspect import Part, collapse, look, tree
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.spec import Spec
from lwcompile.store import ParameterStore
from lwcompile.strip import format_count
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module


def text_of(view: Part, full: bool = False) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(tree(view, full))
    return captured.get()


def parts(view: Part) -> list[Part]:
    return [view, *(below for child in view.children for below in parts(child))]


def captured(model: nn.Module, **example: Tensor) -> Program:
    store = ParameterStore()
    graph, _ = capture_module(model.eval(), example, {name: {0: "batch"} for name in example}, store=store)
    return Program({"forward": graph}, store, "features", "made")


class _Block(nn.Module):
    """A block of two branches; `post` norms after each add, `parallel` adds both at once."""

    def __init__(self, width: int, inner: int, post: bool = False, parallel: bool = False) -> None:
        super().__init__()
        self.post, self.parallel = post, parallel
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unsqueeze(1) for f in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))

    def forward(self, x: Tensor) -> Tensor:
        mlp = lambda y: self.down(torch.relu(self.up(y)))  # noqa: E731
        if self.parallel:
            return x + self.attend(self.norm1(x)) + mlp(self.norm2(x))
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + mlp(x))
        x = x + self.attend(self.norm1(x))
        return x + mlp(self.norm2(x))


class _Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"last_hidden_state": x}


# --- totals


def test_the_root_counts_what_the_program_does():
    program = llama_program()
    view = look(program)
    assert (view.parameters, view.bytes) == (program.parameter_count(), program.nbytes())


def test_blocks_norm_embedding_and_the_rest_add_up_tied_ones_once():
    program = llama_program(tied=True)
    view = look(program)
    assert sum(child.bytes for child in view.children if child.id != "head") == program.nbytes()
    head = next(part for part in parts(view) if part.id == "head")
    assert head.note == "tied to embedding" and "tied to head" in text_of(view)
    assert "tied" not in text_of(look(llama_program(tied=False)))


def test_every_site_stands_once_in_the_tree():
    from lwcompile.structure import find_structure

    for program in (llama_program(), pair()[2]):
        shown = [part.id for part in parts(look(program)) if part.kind not in ("program", "entry", "stream", "other")]
        assert sorted(shown) == sorted(find_structure(program).sites)


# --- runs of equal blocks


def test_equal_blocks_are_one_line_unless_full():
    view = look(llama_program(layers=3))
    short, full = text_of(view), text_of(view, full=True)
    assert "block0 … block2 (3 ×)" in short and short.count("q_proj") == 1
    assert "…" not in full and full.count("q_proj") == 3
    stream = next(part for part in view.children if part.kind == "stream")
    (run, _) = collapse(stream.children)
    assert run.bytes == sum(part.bytes for part in stream.children if part.kind == "block") and run.repeat == 3


def test_a_block_that_differs_stands_alone():
    blocks = [_Block(8, 16), _Block(8, 16), _Block(8, 24), _Block(8, 16)]
    stream = next(p for p in look(captured(_Stack(*blocks), x=torch.randn(2, 5, 8))).children if p.kind == "stream")
    assert [(part.id, part.repeat) for part in collapse(stream.children) if part.kind == "block"] == [
        ("block0", 2),
        ("block2", 1),
        ("block3", 1),
    ]


# --- kinds of stream


@pytest.mark.parametrize(
    ("options", "note"), [({}, "pre-norm"), ({"post": True}, "post-norm"), ({"parallel": True}, "pre-norm, parallel branches")]
)
def test_the_kind_of_stream_is_said(options, note):
    view = look(captured(_Stack(*(_Block(8, 16, **options) for _ in range(3))), x=torch.randn(2, 5, 8)))
    stream = next(part for part in view.children if part.kind == "stream")
    assert stream.note == note
    assert note.split(",")[0] in text_of(view)


def test_a_model_without_a_stream_is_said_to_have_none():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.body(x)}

    view = look(captured(Plain(), x=torch.randn(2, 4)))
    assert "no residual stream" in text_of(view) and "no residual stream" in draw(view)
    assert [part.shape for part in parts(view) if part.kind == "linear"] == [(8, 4), (3, 8)]


def test_entry_points_are_branches_of_their_own():
    view = look(pair()[2])
    assert [child.id for child in view.children] == ["encoder", "decoder"]
    assert "encoder residual stream" in text_of(view)


# --- the drawing and the command


def test_the_drawing_holds_every_part_and_nothing_from_outside():
    view = look(llama_program())
    page = draw(view)
    for word in ("residual stream", "block0 … block2", "3 ×", "q_proj", "down_proj", "tied to head", "pre-norm"):
        assert word in page, word
    assert "http:" not in page and "https:" not in page and page.count("class='join'") == 2
    assert draw(Part("<b>", "program", children=(Part("<i>x", "linear", 1, 4, (1, 1)),))).count("<i>x") == 0


def test_the_drawing_runs_in_a_browser(tmp_path):
    from test_report import _browse

    dom = _browse(draw(look(llama_program())), tmp_path)
    assert 'data-ready="true"' in dom and "data-error" not in dom


def test_inspect_prints_draws_and_says_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pipeline, "capture", lambda source: llama_program())
    assert cli.run(["inspect", "m", "--html", str(tmp_path / "m.html")]) == 0
    printed = capsys.readouterr()
    assert re.search(r"q_proj\s+32 × 32\s+1,024\s+4\.096 kB", printed.out) and "m.html" in printed.err
    assert "residual stream" in (tmp_path / "m.html").read_text()
    assert cli.run(["inspect", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == llama_program().nbytes()
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.run(["inspect", "m", "--html", str(blocked / "m.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_inspect_says_who_runs_every_call(monkeypatch, capsys):
    """Every backend that runs what it writes and every codegen answers for every call, and the answers differ."""
    program = llama_program(layers=1)
    graph = program.main
    structure = find_structure(program)
    choices = {"block0.mlp.down_proj": (Spec.parse("quantize{bits=4,group_size=16,solver=rtn}"),)}
    small = apply_plan(program, choices, structure, Context(structure=structure, program=program))
    monkeypatch.setattr(pipeline, "capture", lambda source: small)
    assert cli.run(["inspect", "m", "--executors", "--json", "--full"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len({tuple(r.values()) for r in rows}) == len(rows)
    calls = {n.name for n in small.main.graph.nodes if n.op == "call_function"}
    by = {name: {r["operator"]: r["who"] for r in rows if r["by"] == name} for name in {r["by"] for r in rows}}
    assert all(set(who) == calls for who in by.values()) and {"triton", "inductor", "eager", "mlir"} <= by.keys(), by
    packed = next(n.name for n in small.main.graph.nodes if "dequantize" in str(n.target))
    assert all("nobody" in by[name][packed] for name in ("triton", "inductor", "eager"))
    down = next(iter(small.main.node(packed).users)).name
    theirs = "our packed product in C++, 4 bits" if packed_operators.unavailable() is None else "the linear algebra library"
    assert by["triton"][down].startswith("Triton: linear") and by["inductor"][down].startswith(theirs)
    if "onnx" in by:
        assert "MatMulNBits" in by["onnx"][down]
    assert cli.run(["inspect", "m", "--executors"]) == 0
    assert re.search(r"eager\s+forward\s+1 lwcompile.dequantize\s+nobody", capsys.readouterr().out)
    assert make("codegens", "eager").executors(graph) == {
        n.name: "torch, one by one" for n in graph.nodes if n.op == "call_function"
    }


@pytest.mark.parametrize("flags", [["--fusion", "--executors"], ["--fusion", "--html"], ["--executors", "--html"]])
def test_inspect_drops_no_flag_without_a_word(flags, capsys, tmp_path):
    page = tmp_path / "m.html"
    words = [word for flag in flags for word in ([flag, str(page)] if flag == "--html" else [flag])]
    assert cli.run(["inspect", "m", *words]) == 2
    assert capsys.readouterr().err == f"error: {flags[0]} and {flags[1]} show different things; give one of them at a time\n"
    assert not page.exists()


@pytest.mark.parametrize(("n", "text"), [(12, "12"), (9248, "9,248"), (134_515_008, "134.5 M"), (7_000_000_000, "7 B")])
def test_counts(n, text):
    assert format_count(n) == text
