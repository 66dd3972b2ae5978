"""A sample of the zoo, and what the zoo's own checks say of models and graphs that do not agree."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
import torch

from benchmarks import zoo
from benchmarks.zoo_models import MEMBERS, Member
from benchmarks.zoo_transforms import transforms
from lwcompile.errors import VerificationError
from lwcompile.pipeline import capture
from lwcompile.sources import open_source

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

BY_NAME = {member.name: member for member in MEMBERS}
SAMPLE = {"Llama": 3, "MPT": 3, "BERT": 3, "DINOv2": 3, "CLIP": 6, "T5": 4}
"""A member and its number of blocks, counted by hand: layers of all its towers."""


TRANSFORMED = {
    "Llama": {"linear_relu": "its attention is causal, and a sum over all positions reads later ones; use linear"},
    "DINOv2": {"linear": "only causal attention has a state to carry", "latent": "it is no causal attention of one operator"},
}
"""Members that every transform is tried at, and the reasons that are known of those that are refused."""


@pytest.mark.parametrize("name", SAMPLE)
def test_a_member_goes_all_the_way(name: str):
    row = zoo.examine(BY_NAME[name], transforms=name in TRANSFORMED)
    assert row.right, row.reason
    assert row.blocks == SAMPLE[name] and len(row.dropped) == 2 and row.quantized > 0
    assert row.traced <= zoo.CAPTURE_TOLERANCE and row.parity <= zoo.PARITY_TOLERANCE
    assert row.decode == ("yes" if BY_NAME[name].auto == "ForCausalLM" else "")
    assert {o.name for o in row.transforms} == ({t.name for t in transforms()} if name in TRANSFORMED else set())
    for outcome in row.transforms:
        assert outcome.parity <= zoo.PARITY_TOLERANCE if outcome.at else outcome.reason, outcome
        assert TRANSFORMED[name].get(outcome.name, "") in outcome.reason, outcome
    applied = {o.name for o in row.transforms if o.at}
    assert name not in TRANSFORMED or applied >= {"drop", "window", "share", "parallel", "low_rank", "fold_norms", "freeze_norm"}


def test_members_are_many_and_the_required_ones_are_among_them():
    assert len(MEMBERS) >= 30 and len(BY_NAME) == len(MEMBERS)
    assert {m.name for m in MEMBERS if m.required} == {
        "Llama", "Mistral", "Qwen2", "Qwen3", "GPT-2", "GPT-NeoX", "BERT", "RoBERTa", "ViT", "DINOv2", "CLIP", "T5", "Whisper",
    }  # fmt: skip


def test_other_sizes_pad_on_the_left():
    source = open_source(BY_NAME["Llama"].build())
    program = capture(source)
    assert program.remarks == ()
    feed = zoo.other_sizes(source.parts["forward"], program.main)
    assert feed["input_ids"].shape == (3, 11)
    assert feed["attention_mask"][0].tolist() == [0, 0, 0, *[1] * 8] and feed["attention_mask"][1:].all()


class _Loop(torch.nn.Module):
    """A recurrence that Python unrolls, so that its trace holds for one length only; and a weight that is made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            state = torch.tanh(self.linear(x[:, i] + state))
        return state


def test_a_size_that_the_trace_fixed_is_kept_and_remarked():
    source = open_source(_Loop(), {"x": torch.randn(2, 5, 4)}, {"x": {0: "batch", 1: "sequence"}})
    program = capture(source)
    assert program.main.inputs[0].dynamic == {0: "batch"}
    assert program.remarks == ("forward: the trace depends on the example's sequence, which cannot change",)
    assert zoo.other_sizes(source.parts["forward"], program.main)["x"].shape == (3, 5, 4)
    assert zoo.check_capture(source, program) <= zoo.CAPTURE_TOLERANCE
    assert not any("weight_norm" in str(node.target) for node in program.main.nodes)


def test_a_graph_that_is_not_its_module_is_found():
    source = open_source(BY_NAME["ViT"].build())
    program = capture(source)
    assert zoo.check_capture(source, program) <= zoo.CAPTURE_TOLERANCE
    name = next(n for n in program.main.tensors if n.endswith("mlp.fc1.weight") or n.endswith("intermediate.dense.weight"))
    program.main.set_tensor(name, program.main.tensor(name) * 1.01)
    with pytest.raises(VerificationError, match="differs from the module's"):
        zoo.check_capture(source, program)


class _Dies(Member):
    def build(self) -> torch.nn.Module:
        os._exit(3)


class _Raises(Member):
    def build(self) -> torch.nn.Module:
        raise ValueError("no such configuration\nand more")


class _NeverEnds(Member):
    def build(self) -> torch.nn.Module:
        time.sleep(60)
        raise AssertionError


@pytest.mark.filterwarnings("ignore")
def test_what_dies_or_raises_is_a_crash_and_not_a_refusal():
    died, raised = zoo.examine_apart(_Dies("dies", "", "")), zoo.examine_apart(_Raises("raises", "", ""))
    assert died.crashed and died.reason == "the process died (exit code 3)"
    assert raised.crashed and raised.reason == "ValueError: no such configuration"
    stuck = zoo.examine_apart(_NeverEnds("stuck", "", ""), seconds=0.2)
    assert stuck.crashed and stuck.reason == "no end after 0 s"
    assert not zoo.passed([died]) and not zoo.passed([stuck])


def test_the_verdict_wants_the_required_ones_and_enough():
    rows = [zoo.Row(member.name) for member in MEMBERS]
    assert zoo.passed(rows)
    wrong = next(i for i, member in enumerate(MEMBERS) if member.required)
    assert not zoo.passed([dataclasses.replace(r, reason="no") if i == wrong else r for i, r in enumerate(rows)])
    few = [r if BY_NAME[r.name].required else dataclasses.replace(r, reason="no") for r in rows]
    assert not zoo.passed(few)


def test_the_table_names_reasons():
    rows = [zoo.Row("A", blocks=2, parity=1e-6, decode="yes"), zoo.Row("B", reason="it has no residual stream")]
    written = zoo.document(rows)
    assert "2 architectures, 1 of them right" in written
    assert "- B: it has no residual stream." in written and "| A | 2 |" in written
