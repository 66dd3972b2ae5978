"""Drop, share and window in an encoder and its decoder, against the nn.Module edited by hand, to relative 1e-5."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any, Literal

import pytest
import torch
from test_decode import seq2seq
from test_drop import drop
from test_share import share
from torch import Tensor, nn

from lwcompile import pipeline
from lwcompile.context import Context
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.manager import Manager, relative_error
from lwcompile.passes.transform.share import Share
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.sources import open_source
from lwcompile.structure import find_structure

pytest.importorskip("transformers", reason="the references are transformers' own modules: install lwcompile[hf]")

_T5 = {
    "attention": "layer.0.SelfAttention layer.0.SelfAttention.o layer.0.layer_norm",
    "cross_attention": "layer.1.EncDecAttention layer.1.EncDecAttention.o layer.1.layer_norm",
}
_LAYERS = {
    "attention": "self_attn self_attn.out_proj self_attn_layer_norm",
    "cross_attention": "encoder_attn encoder_attn.out_proj encoder_attn_layer_norm",
    "mlp": "fc1 fc2 final_layer_norm",
}
PARTS = {  # what a sublayer is made of: its weights, the last of which puts out what is added to the stream, and its norm
    ("t5", "encoder"): _T5 | {"mlp": "layer.1.DenseReluDense layer.1.DenseReluDense.wo layer.1.layer_norm"},
    ("t5", "decoder"): _T5 | {"mlp": "layer.2.DenseReluDense layer.2.DenseReluDense.wo layer.2.layer_norm"},
    **{(name, side): _LAYERS for name in ("whisper", "bart") for side in ("encoder", "decoder")},
}
NAMES = ("t5", "whisper", "bart")
SUBLAYERS = {
    "encoder": ("attention", "mlp"),
    "decoder": ("attention", "cross_attention", "mlp"),
}
SITES = [f"{side}.block{i}.{kind}" for side, kinds in SUBLAYERS.items() for i in (0, 1) for kind in kinds]


@cache
def captured(name: str) -> tuple[Any, dict[str, Tensor], Program]:
    """A model whose norms and biases differ from layer to layer, an example that is padded where it may be, and the program."""
    model, generator = seq2seq(name), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    example: dict[str, Tensor] = {"decoder_input_ids": torch.randint(3, 90, (2, 6), generator=generator)}
    if name == "whisper":
        example["input_features"] = torch.randn(2, 8, 60, generator=generator)
    else:
        example["input_ids"] = torch.randint(3, 90, (2, 9), generator=generator)
        example["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
        example["attention_mask"][1, -2:] = 0
    return model, example, pipeline.capture(open_source(model))


def layers(name: str, model: Any, side: str) -> nn.ModuleList:
    return getattr(model, side).block if name == "t5" else getattr(model.model, side).layers


def parts(name: str, model: Any, id: str) -> list[nn.Module]:
    side, block, kind = id.split(".")
    layer = layers(name, model, side)[int(block.removeprefix("block"))]
    return [layer.get_submodule(path) for path in PARTS[name, side][kind].split()]


def silence(name: str, model: Any, id: str) -> None:
    """Let a sublayer add zeros to the stream, and after it, where the norm comes after it, no norm."""
    *_, last, norm = parts(name, model, id)

    def zeros(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def unchanged(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0]

    last.register_forward_hook(zeros)
    if name == "bart":
        norm.register_forward_hook(unchanged)


def run(program: Program, example: dict[str, Tensor]) -> Tensor:
    return Executor(program).run(example)["logits"]


def logits(model: Any, example: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**example, use_cache=False).logits


def assert_is(edited: Any, example: Any, changed: Program, instead_of: Program) -> None:
    """The changed program computes what the edited module does, and the dense one does not, or the test would show nothing."""
    wanted = logits(edited, example)
    assert relative_error(wanted, run(changed, example)) < 1e-5
    assert relative_error(wanted, run(instead_of, example)) > 1e-3, "the edit changed nothing"


@pytest.mark.parametrize("name", NAMES)
def test_the_program_is_the_module(name: str) -> None:
    model, example, program = captured(name)
    assert relative_error(logits(model, example), run(program, example)) < 1e-5


# --- drop


@pytest.mark.parametrize("id", SITES)
@pytest.mark.parametrize("name", NAMES)
def test_dropping_a_sublayer_equals_the_module_without_it(name: str, id: str) -> None:
    model, example, program = captured(name)
    edited, dropped = copy.deepcopy(model), drop(program, [id])
    silence(name, edited, id)
    assert_is(edited, example, dropped, instead_of=program)
    assert dropped.parameter_count() < program.parameter_count()


@pytest.mark.parametrize("name", NAMES)
def test_dropping_many_sublayers_equals_the_module_without_them(name: str) -> None:
    model, example, program = captured(name)
    edited, ids = copy.deepcopy(model), [id for id in SITES if ("block1" in id) == (id.endswith(".attention"))]
    for id in ids:
        silence(name, edited, id)
    assert len(ids) == 5
    assert relative_error(logits(edited, example), run(drop(program, ids), example)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_dropping_blocks_equals_the_module_with_shorter_stacks(name: str) -> None:
    model, example, program = captured(name)
    edited, last = copy.deepcopy(model), 1 if name == "t5" else 0  # T5's first block makes the position bias of all
    del layers(name, edited, "encoder")[1]
    del layers(name, edited, "decoder")[last]
    dropped = drop(program, ["encoder.block1", f"decoder.block{last}"])
    assert_is(edited, example, dropped, instead_of=program)


def test_a_dropped_first_block_leaves_t5_its_position_bias() -> None:
    model, example, program = captured("t5")
    edited, dropped = copy.deepcopy(model), drop(program, ["encoder.block0", "decoder.block0"])
    for id in SITES:
        if "block0" in id:
            silence("t5", edited, id)
    assert relative_error(logits(edited, example), run(dropped, example)) < 1e-5
    assert sum("relative_attention_bias" in n for graph in dropped.entries.values() for n in graph.tensors) == 2


# --- share


def copy_by_hand(name: str, model: Any, into: str, source: str, norms: str) -> None:
    """Copy a sublayer's weights from one layer to another; T5's position bias is in one layer only, and stays there."""
    pairs = list(zip(parts(name, model, into), parts(name, model, source)))
    for mine, theirs in pairs if norms == "source" else pairs[:-1]:
        given = dict(theirs.named_parameters())
        for key, parameter in mine.named_parameters():
            if key in given:
                parameter.data = given[key].data.clone()


@pytest.mark.parametrize("norms", ["own", "source"])
@pytest.mark.parametrize("id", ["encoder.block1", "decoder.block0", *SITES[-3:]])
@pytest.mark.parametrize("name", NAMES)
def test_sharing_equals_the_module_copied_by_hand(name: str, id: str, norms: Literal["own", "source"]) -> None:
    model, example, program = captured(name)
    edited, offset = copy.deepcopy(model), -1 if "block1" in id else 1
    shared = share(program, (id, Share(offset, norms)))
    for own in SITES:
        if own == id or own.startswith(f"{id}."):
            source = own.translate(str.maketrans("01", "10"))
            copy_by_hand(name, edited, own, source, norms)
    assert_is(edited, example, shared, instead_of=program)
    assert shared.parameter_count() < program.parameter_count()


@pytest.mark.parametrize("name", NAMES)
def test_sharing_a_block_with_its_own_copy_is_exact(name: str) -> None:
    """The store tells the copies apart by the last bit alone, and the function is that of the module that holds true copies."""
    model, example, program = captured(name)
    edited, twins = copy.deepcopy(model), program.copy()
    for id in (id for id in SITES if "block1" in id):
        copy_by_hand(name, edited, id, id.replace("block1", "block0"), "source")
    for graph in twins.entries.values():
        for own in list(graph.tensors):
            if (source := re.sub(r"(layers|block)\.1\.", r"\1.0.", own)) != own:
                value = graph.tensor(source)
                graph.set_tensor(own, torch.nextafter(value, torch.full_like(value, torch.inf)))
    assert relative_error(logits(model, example), run(twins, example)) > 1e-3
    shared = share(twins, ("encoder.block1", Share()), ("decoder.block1", Share()))
    assert relative_error(logits(edited, example), run(shared, example)) < 1e-5
    assert shared.parameter_count() < twins.parameter_count()


# --- window


def windowed(program: Program, *steps: tuple[str, Window]) -> Program:
    structure, narrow = find_structure(program), program.copy()
    ctx = Context(structure=structure, program=program)
    assert len(Manager(ctx).transform(narrow, [(structure.sites[id], how) for id, how in steps])) == len(steps), ctx.remarks
    return narrow


def refusal(program: Program, id: str, how: Window) -> str:
    site = find_structure(program).sites[id]
    with pytest.raises(Refused) as caught:
        how.check(program.entries[site.entry], site)
    return str(caught.value)


@pytest.mark.parametrize("name", ["whisper", "bart"])
def test_a_window_as_long_as_the_decoders_sequence_changes_nothing(name: str) -> None:
    model, example, program = captured(name)
    sites, wanted = [f"decoder.block{i}.attention" for i in (0, 1)], logits(model, example)
    for length in (6, 100):
        assert relative_error(wanted, run(windowed(program, *((id, Window(length, 0)) for id in sites)), example)) < 1e-5
    narrow = windowed(program, *((id, Window(2, 0)) for id in sites))
    assert relative_error(wanted, run(narrow, example)) > 1e-3, "so narrow a window changes nothing"


def test_a_window_that_hides_no_pair_from_whispers_encoder_changes_nothing() -> None:
    """Of 30 positions the first and the last alone are 29 apart, and the first is open to all."""
    model, example, program = captured("whisper")
    sites, wanted = [f"encoder.block{i}.attention" for i in (0, 1)], logits(model, example)
    assert relative_error(wanted, run(windowed(program, *((id, Window(29, 1)) for id in sites)), example)) < 1e-5
    assert relative_error(wanted, run(windowed(program, *((id, Window(5, 1)) for id in sites)), example)) > 1e-3
    assert all("its 30 positions are always within the window" in refusal(program, id, Window(30, 0)) for id in sites)


@pytest.mark.parametrize("name", NAMES)
def test_attention_that_has_no_window_says_why(name: str) -> None:
    *_, program = captured(name)
    for i in (0, 1):
        assert "it reads another stream" in refusal(program, f"decoder.block{i}.cross_attention", Window(100, 0))
        for side in ("encoder", "decoder") if name == "t5" else ():  # its mask holds the learned position bias
            assert "its mask follows no rule that is known" in refusal(program, f"{side}.block{i}.attention", Window(100, 0))
