"""ReLU attention with a convolution: against its formula by loops, fitted in models, and in a file."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from torch import Tensor, nn

from lwcompile.attention import attentions_at, find_attentions
from lwcompile.attention_cost import AttentionCost, pays_from
from lwcompile.context import Context
from lwcompile.data import CalibrationSet
from lwcompile.errors import BadPlan, Refused
from lwcompile.manager import Manager
from lwcompile.passes.transform.linear_attention import Linear
from lwcompile.passes.transform.linear_relu import LinearRelu
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.relu_attention import Maps, attend, relu_attention
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def given(first: int, rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two sequences of `first` + 12 positions, 4 heads over 2, the second padded by 3 on the right."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    length = first + 12
    open_ = torch.ones(2, length, dtype=torch.bool)
    open_[1, -3:] = False
    kernel = noise(10, 1, 3, 3) if rows else noise(10, 1, 3)
    return {"query": noise(2, 4, length, 6), "key": noise(2, 2, length, 6), "value": noise(2, 2, length, 5), "open": open_,
            "map_query": noise(4, 7, 3), "map_key": noise(2, 7, 3), "kernel": kernel}  # fmt: skip


def by_loops(x: dict[str, Tensor], first: int, rows: int) -> Tensor:
    """The formula as it is written, a pair of positions at a time."""
    query, value = x["query"].double(), x["value"].double() * x["open"][:, None, :, None]
    out, columns = torch.zeros(2, 4, query.shape[2], 5, dtype=torch.float64), 12 // max(rows, 1)

    def mapped(vector: Tensor, maps: Tensor) -> Tensor:
        inner = vector.double() @ maps[:-1].double() + maps[-1].double()
        return torch.cat([inner.clamp(min=0), (-inner).clamp(min=0)])

    for b in range(2):
        for h in range(4):
            for i in range(query.shape[2]):
                keys = [mapped(x["key"][b, h // 2, j], x["map_key"][h // 2]) * x["open"][b, j] for j in range(query.shape[2])]
                weights = [float(mapped(query[b, h, i], x["map_query"][h]) @ k) for k in keys]
                out[b, h, i] = sum(w * v for w, v in zip(weights, value[b, h // 2])) / (sum(weights) + 1e-6)
                for j in range(first, query.shape[2]):
                    if i < first:
                        continue
                    p, q = divmod(i - first, columns) if rows else (0, i - first)
                    r, s = divmod(j - first, columns) if rows else (0, j - first)
                    if abs(p - r) <= 1 and abs(q - s) <= 1:
                        kernel = x["kernel"].double().reshape(2, 5, *x["kernel"].shape[2:])[h // 2]
                        tap = kernel[:, r - p + 1, s - q + 1] if rows else kernel[:, s - q + 1]
                        out[b, h, i] += tap * value[b, h // 2, j]
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("first", "rows"), [(0, 0), (2, 3), (0, 4)])
def test_attention_is_its_formula(dtype, first, rows):
    x = given(first, rows, dtype)
    wanted = by_loops(x, first, rows)
    assert (relu_attention(**x, first=first, rows=rows) - wanted).abs().max() < TOLERANCE[dtype] * wanted.abs().max()


def test_gradients_are_those_of_the_formula():
    x = given(1, 3)
    names = ("query", "key", "value", "map_query", "map_key", "kernel")
    made = []
    for form in (lambda q, k, v, *m: attend(q, k, v, x["open"], Maps(*m), 1, 3),
                 lambda q, k, v, *m: relu_attention(q, k, v, x["open"], *m, 1, 3)):  # fmt: skip
        leaves = [x[name].clone().requires_grad_() for name in names]
        form(*leaves).square().sum().backward()
        made.append([leaf.grad for leaf in leaves])
    for a, b in zip(*made):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Vision(nn.Module):
    """Patches of an image behind a class token, and one attention block over them."""

    def __init__(self, tokens: int = 1) -> None:
        super().__init__()
        self.cut, self.cls = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, tokens, 16))
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.cut(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) if self.cls.shape[1] else x
        q, k, v = (f(self.norm(x)).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


@cache
def vision(tokens: int = 1, free: bool = False) -> Program:
    torch.manual_seed(0)
    size = {0: "batch", 2: "height"} if free else {0: "batch"}
    graph, _ = capture_module(Vision(tokens).eval(), {"pixel_values": torch.randn(2, 3, 12, 16)}, {"pixel_values": size})
    return Program({"forward": graph}, graph.store)


def fitted(program: Program, samples: CalibrationSet, **options: int) -> tuple[Program, dict[str, float]]:
    structure = find_structure(program)
    ctx, edited = Context(calibration=samples, structure=structure, program=program), program.copy()
    assert Manager(ctx).transform(edited, [(structure.sites["block0.attention"], LinearRelu(3, **options))]), ctx.remarks
    return edited, dict(ctx.remarks[-1].numbers)


def pictures(count: int = 16) -> CalibrationSet:
    return CalibrationSet(
        {"pixel_values": torch.randn(count, 3, 12, 16, generator=torch.Generator().manual_seed(1))}, "image", "noise"
    )


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_an_image_is_convolved_by_rows_of_patches(tokens):
    edited, _ = fitted(vision(tokens), pictures(), steps=1)
    (call,) = find_attentions(edited.main)
    assert call.node.args[-2:] == (tokens, 3) and call.features == 8 and call.softmax_window == 0
    assert edited.main.tensor("block0.attention.linear_relu.kernel").shape == (16, 1, 3, 3)
    site = find_structure(vision(tokens)).sites["block0.attention"]
    stored = sum(torch.Size(t.shape).numel() for t in LinearRelu(3).stored(vision(tokens).main, site))
    beside = sum(torch.Size(t.shape).numel() for t in Window(3, 1).stored(vision(tokens).main, site))
    assert stored - beside == edited.main.parameter_count() - vision(tokens).main.parameter_count()


def test_transfer_brings_the_layer_nearer_to_its_softmax():
    errors = [fitted(vision(), pictures(), steps=steps)[1]["error"] for steps in (1, 60)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("masked", [False, True])
def test_a_file_computes_it(masked, tmp_path):
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx
    from lwcompile.tiny import programs

    program = programs()["encoder"] if masked else vision()
    samples = CalibrationSet({i.name: program.main.example(i.name) for i in program.main.inputs}, "tensors", "example")
    edited, _ = fitted(program, samples, steps=2)
    backend, path = Onnx(), tmp_path / "model.onnx"
    assert backend.lower(edited, path, None).worst < 1e-5
    again = Program.load(edited.save(tmp_path / "saved"))
    assert again.digest() == edited.digest() and find_structure(edited).sites["block0.attention"].kind == "attention"


def test_costs_count_pairs_both_ways():
    """By loops over pairs; what is said is said of prefill alone."""
    for window, sinks, length in ((None, 0, 9), (4, 0, 9), (4, 2, 20), (30, 2, 9), (5, 4, 6)):
        pairs = sum(window is None or abs(i - j) < window or min(i, j) < sinks for i in range(length) for j in range(length))
        assert AttentionCost(6, 2, 8, 10, window, sinks, causal=False).prefill_flops(length) == 2 * pairs * 6 * 18
    cost = AttentionCost(6, 6, 64, 64, 0, features=128, causal=False, taps=25)
    each = 2 * (12 * 64 * 64 + 12 * 128 * 65 + 25 * 6 * 64)  # maps, the sum written and read, and the convolution
    assert cost.prefill_flops(100) == 100 * each
    assert pays_from(cost.prefill_flops, AttentionCost(6, 6, 64, 64, causal=False).prefill_flops) == each // (2 * 6 * 128) + 1


def test_what_it_cannot_read_is_refused():
    program = tiny.llama_program()
    site = find_structure(program).sites["block0.attention"]
    with pytest.raises(Refused, match="causal, and a sum over all positions reads later ones; use linear"):
        LinearRelu().check(program.main, site)
    with pytest.raises(Refused, match="size of its images is free"):
        LinearRelu().check(vision(free=True).main, find_structure(vision(free=True)).sites["block0.attention"])
    edited, _ = fitted(vision(), pictures(), steps=0)
    for transform in (LinearRelu(), Linear(), Window(3, 1)):
        with pytest.raises(Refused):
            transform.check(edited.main, attentions_site(edited))


def attentions_site(program: Program):
    site = find_structure(program).sites["block0.attention"]
    assert attentions_at(program.main, site)[0].features
    return site


@pytest.mark.parametrize("options", [{"taps": 4}, {"steps": -1}, {"tokens": 0}, {"learning_rate": 2.0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(BadPlan):
        LinearRelu(**options)
