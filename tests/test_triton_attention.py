"""Windows with sinks, linear and ReLU attention as a written package and as the code behind torch.compile: what the graph computes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_linear_relu import vision
from test_triton_backend import decoded, masked
from tiny import ids, llama_program

from lwcompile.attention import find_attentions
from lwcompile.backends.triton import emit
from lwcompile.backends.triton.backend import Triton
from lwcompile.backends.triton.codegen import TritonKernels
from lwcompile.backends.triton.fusion import find_groups
from lwcompile.context import Context
from lwcompile.contract import TransformPass
from lwcompile.decode import derive_decode
from lwcompile.errors import VerificationError
from lwcompile.generate import GraphStep, generate
from lwcompile.manager import Manager
from lwcompile.passes.transform.linear_attention import Linear
from lwcompile.passes.transform.linear_relu import LinearRelu
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.samples import BEYOND, cases
from lwcompile.structure import find_structure

pytest.importorskip("triton", reason="the package runs on triton: install lwcompile[triton]")


def changed(program: Program, transform: TransformPass, site: str = "block1.attention") -> Program:
    structure = find_structure(program)
    ctx, edited = Context(structure=structure, program=program), program.copy()
    assert Manager(ctx).transform(edited, [(structure.sites[site], transform)]), ctx.remarks
    return edited


FORMS = {
    "window": Window(4, 2), "window at its default": Window(), "linear": Linear(window=4, steps=0),
    "linear at its default window": Linear(steps=0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_package_computes_it_and_decodes(name: str, tmp_path: Path) -> None:
    """Past the window, whatever its size, and from a cache that rolls and a state."""
    graph = masked(2)
    program = changed(Program({"forward": graph}, graph.store), FORMS[name])
    program = Program({**program.entries, "decode": derive_decode(program.main, check=False)}, program.store, "causal-lm", "tiny")
    (group,) = [g for g in Triton().fusion(program) if g.entry == "forward" and "window" in g.note]
    assert group.kernel == ("attention" if name[:6] == "window" else "linear_attention")
    parity = Triton().lower(program, tmp_path / "triton_model", None)
    assert parity.worst < 1e-4 and {"forward.logits", "decode.logits"} <= set(parity.errors)
    if FORMS[name] in (Window(4, 2), Linear(window=4, steps=0)):
        prompts, mask = ids(2, 6), torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
        wanted = generate(GraphStep(program.entries["decode"]), prompts, max_new_tokens=4, attention_mask=mask)
        said = decoded(tmp_path / "triton_model", prompts, [1, 0], 4)
        assert said["tokens"] == wanted.tolist() and said["why"] is not None


@pytest.mark.parametrize("transform", [Window(3, 1), LinearRelu(3, steps=0)], ids=str)
def test_an_image_model_s_package_computes_it(transform: TransformPass, tmp_path: Path) -> None:
    program = changed(vision(), transform, "block0.attention")
    assert Triton().lower(program, tmp_path / "triton_model", None).worst < 1e-4


def test_the_proof_finds_sinks_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(graph: Any) -> list[Any]:
        groups = find_groups(graph)
        return [replace(g, args={**g.args, "sinks": 0}) if g.kernel == "attention" else g for g in groups]

    monkeypatch.setattr(emit, "find_groups", without)
    for window in (Window(4, 2), Window()):
        with pytest.raises(VerificationError, match="of the largest value away"):
            Triton().lower(changed(llama_program(layers=2), window), tmp_path / "triton_model", None)
    assert not (tmp_path / "triton_model").exists()


def test_the_codegen_compares_its_first_call() -> None:
    code = """
import sys; sys.path.insert(0, "tests")
import pytest, torch
from dataclasses import replace
from test_triton_attention import Window, changed, emit, find_groups, llama_program
from lwcompile.backends.triton.codegen import TritonKernels
from lwcompile.errors import VerificationError
graph = changed(llama_program(layers=2), Window(4, 2)).main
ids = torch.arange(24).reshape(2, 12)
wanted = graph.module()(ids)[0]
code = TritonKernels().compile(graph, [], {})
assert (code.call([ids])[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
emit.find_groups = lambda g: [replace(x, args={**x.args, "sinks": 0}) if x.kernel == "attention" else x for x in find_groups(g)]
with pytest.raises(VerificationError, match="the Triton kernels' logits"):
    TritonKernels().compile(graph, [], {}).call([ids])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_operator_that_the_package_has_not_is_refused() -> None:
    @torch.library.custom_op("lwcompile_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    doubled.register_fake(torch.empty_like)
    graph = llama_program(layers=2).main.copy()
    output: Any = graph.output_node
    with graph.graph.inserting_before(output):
        call = graph.graph.call_function(torch.ops.lwcompile_tests.doubled.default, (output.args[0][0],))
    output.args = ((call, *output.args[0][1:]),)
    (reason,) = TritonKernels().unsupported(graph)
    assert "lwcompile_tests.doubled" in reason


@pytest.mark.parametrize("size", [5, 128, 4096])
def test_proofs_go_beyond_a_window(size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Where it is not too long to run; where it is, the log says so."""
    graph = changed(llama_program(layers=2), Window(size, 2)).main
    assert [a.mask and a.mask.window for a in find_attentions(graph)] == [None, size]
    longest = max(feed["input_ids"].shape[1] for feed, _ in cases(graph, None))
    assert longest >= size + BEYOND if size < 4096 else longest < 20
    assert ("proved within its windows of [4096]" in caplog.text) is (size == 4096)


def test_a_proof_that_has_no_room_beyond_a_window_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """As with a table of 32 positions: the cases stay as they were."""
    graph = changed(llama_program(layers=2), Window(64, 2)).main
    given = graph.module

    def short(**options: Any) -> Any:
        run = given(**options)

        def call(*inputs: torch.Tensor) -> Any:
            if inputs[0].shape[1] > 32:
                raise IndexError("index out of range")
            return run(*inputs)

        return call

    graph.module = short  # type: ignore[method-assign, assignment]
    assert max(feed["input_ids"].shape[1] for feed, _ in cases(graph, None)) < 20
    assert "does not run at 72 positions (index out of range)" in caplog.text
