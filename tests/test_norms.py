"""Norms folded and frozen: equal to the model, or to the module with its norms replaced by hand, to 1e-9 in float64."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import language_models as zoo
import pytest
import torch
from test_decode import assert_decodes
from test_drop import build, capture, outputs_differ
from torch import nn

from lwcompile.budget import Budget
from lwcompile.context import Context
from lwcompile.data import CalibrationSet
from lwcompile.decode import derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.executor import run as execute
from lwcompile.graph import iterate_calls
from lwcompile.manager import Manager, relative_error
from lwcompile.passes.heal._blend import Blend
from lwcompile.passes.transform._norms import norm_at, readers
from lwcompile.passes.transform.fold_norms import FoldNorms
from lwcompile.passes.transform.freeze_norm import FreezeNorm, freeze
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.residual import NORMS
from lwcompile.spec import Spec
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass
from lwcompile.tiny import programs as tiny_programs
from lwcompile.trials import context as trial_context

pytest.importorskip("transformers", reason="the references are transformers' own modules: install lwcompile[hf]")

FOLDED = {"llama": 9, "qwen3": 9, "gpt2": 8, "gpt_neox": 9, "bert": 0, "vit": 8, "dinov2": 8, "t5": 8}
"""Of 4 blocks' norms, those that only linears read whose weights nothing else reads."""
KEPT = {
    "llama": {}, "qwen3": {"block3.attention.k_norm": "no linear"}, "gpt2": {"final_norm": "shares its weight with embedding"},
    "gpt_neox": {}, "bert": {"block2.mlp.post_norm": "add_"}, "vit": {"final_norm": "an output"}, "dinov2": {}, "t5": {},
}  # fmt: skip


@cache
def made(name: str, double: bool = False) -> tuple[nn.Module, dict[str, Any], Program]:
    """A random model whose gains and shifts are no ones and zeros, its inputs and its program."""
    model, example, _ = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.eval()
    if double:
        model = model.double()
        for norm in norms_of(model).values():
            if not _is_layer_norm(norm):  # transformers' own compute in float32 whatever they are given
                norm.forward = partial(_rms_norm, norm)
        example = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in example.items()}
    return model, example, capture(model, example)


def _rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, _eps(norm))  # type: ignore[arg-type]


def _eps(norm: nn.Module) -> float:
    return getattr(norm, "eps", None) or norm.variance_epsilon  # type: ignore[return-value]


def folded(program: Program) -> tuple[Program, int, dict[str, str]]:
    """The program with every norm folded that can be, how many were, and why the others were not."""
    structure, after = find_structure(program), program.copy()
    ctx = Context(structure=structure, program=program)
    done = Manager(ctx).transform(after, [(site, FoldNorms()) for site in structure.of_kind("norm")])
    return after, len(done), {r.site: r.text for r in ctx.remarks}


def run(program: Program, example: dict[str, Any]) -> torch.Tensor:
    """The first output."""
    with torch.no_grad():
        return program.main.module()(*(example[i.name] for i in program.main.inputs))[0]


# --- fold_norms


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_the_function(name: str) -> None:
    model, example, program = made(name)
    after, done, refused = folded(program)
    assert done == FOLDED[name], refused
    assert outputs_differ(after, model, example) < 1e-5
    _, wide, exact = made(name, double=True)
    assert relative_error(run(exact, wide), run(folded(exact)[0], wide)) < 1e-9
    bare = [n for n in iterate_calls(after.main, *NORMS) if not any(s.op == "get_attr" for s in n.all_input_nodes)]
    assert len(bare) == done
    assert {id: any(word in refused.get(id, "") for word in (why,)) for id, why in KEPT[name].items()} == dict.fromkeys(
        KEPT[name], True
    ), refused
    assert find_structure(after).sites.keys() == find_structure(program).sites.keys()


def test_folding_stores_no_more() -> None:
    """Gain and shift of 8 norms of width 32 go, and no linear of GPT-2 lacks a bias; where linears do, a shift costs one."""
    _, _, program = made("gpt2")
    after, done, _ = folded(program)
    assert program.nbytes() - after.nbytes() == done * 2 * 32 * 4

    class Unbiased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5, bias=False)
            nn.init.constant_(self.norm.bias, 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x))

    from lwcompile.tracing import capture_module

    graph, _ = capture_module(Unbiased(), {"x": torch.randn(2, 8)}, {"x": {0: "batch"}})
    small = Program({"forward": graph}, graph.store)
    site = find_structure(small).of_kind("norm")[0]
    assert [t.shape for t in FoldNorms().stored(graph, site)] == [(5,)]
    after, done, _ = folded(small)
    assert done == 1 and small.nbytes() - after.nbytes() == (2 * 8 - 5) * 4


def test_fold_norms_keeps_the_contract() -> None:
    assert "declarations: exact, structural" in check_pass(FoldNorms)


# --- freeze_norm

EXPLICIT = {"llama": 0, "qwen3": 0, "gpt2": 1, "gpt_neox": 0, "bert": 9, "vit": 1, "dinov2": 1, "t5": 1}
"""Norms that stay as arithmetic, because something else than linears of their own reads them."""


class Frozen(nn.Module):
    """A norm that divides by a constant, and by another one at the first position. `first` is set before a run.

    share: of that in what it puts out; the rest is the norm's own.
    """

    def __init__(self, norm: nn.Module, constants: tuple[float, float], share: float) -> None:
        super().__init__()
        self.centred, self.gain, self.shift = _is_layer_norm(norm), norm.weight, getattr(norm, "bias", None)
        self.norm, self.constants, self.share = norm, constants, share
        self.first: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.share * self.frozen(x) + (1 - self.share) * self.norm(x)

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        others, first = self.constants
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        where = None if self.first is None or x.ndim != 3 else self.first[..., None].to(x)
        x = x / (others if where is None else where * first + (1 - where) * others) * self.gain  # type: ignore[operator]
        return x if self.shift is None else x + self.shift


def _is_layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m).__name__.endswith("Norm")}


def kinds(example: dict[str, Any], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens stand first, and which are padding."""
    mask = example.get("attention_mask", torch.ones(shape, dtype=torch.int64))
    return mask.cumsum(1) <= 1, mask == 0


@torch.no_grad()
def freeze_by_hand(model: nn.Module, example: dict[str, Any], own: bool, share: float = 1.0) -> None:
    """Measure each norm's deviations with a hook, and put `Frozen` in its place."""
    seen: dict[str, torch.Tensor] = {}
    norms = norms_of(model)
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].double()))  # type: ignore
        for name, m in norms.items()
    ]
    model(**example)
    [hook.remove() for hook in hooks]
    for name, norm in norms.items():
        x = seen[name]
        s = (((x - x.mean(-1, keepdim=True)) if _is_layer_norm(norm) else x).pow(2).mean(-1) + _eps(norm)).sqrt()
        others = first = s.mean().item()
        if s.ndim == 2:
            starts, padding = kinds(example, s.shape)
            others, first = s[~starts & ~padding].mean().item(), s[starts & ~padding].mean().item()
        made = Frozen(norm, (others, first if own else others), share)
        made.first = kinds(example, s.shape)[0] if s.ndim == 2 else None
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)


def samples(example: dict[str, Any]) -> CalibrationSet:
    return CalibrationSet({k: v for k, v in example.items() if isinstance(v, torch.Tensor)}, "tensors", "the example")


def frozen(program: Program, example: dict[str, Any], option: FreezeNorm) -> tuple[Program, list[str], dict[str, str]]:
    """The program with every norm frozen; which sites were, and what was remarked of the others."""
    structure, after = find_structure(program), program.copy()
    ctx = Context(structure=structure, program=program, calibration=samples(example))
    done = Manager(ctx).transform(after, [(site, option) for site in structure.of_kind("norm")])
    return after, [site.id for site, _ in done], {r.site: r.text for r in ctx.remarks}


def outputs(model: nn.Module, example: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**example)[0]


@pytest.mark.parametrize("first", ["own", "same"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_freezing_equals_the_module_with_constant_norms(name: str, first: Any) -> None:
    model, example, program = made(name, double=True)
    if name == "qwen3" and first == "own":  # norms of heads have no position: the others are frozen alone
        structure = find_structure(program)
        refused = frozen(program, example, FreezeNorm())[2]
        heads = {s.id for s in structure.of_kind("norm") if s.id.endswith(("q_norm", "k_norm"))}
        assert len(heads) == 8 and refused.keys() == heads and all("offer first=same" in r for r in refused.values())
        return
    option = FreezeNorm(first=first)
    after, done, remarks = frozen(program, example, option)
    assert len(done) == len(norms_of(model)), remarks
    explicit, _, _ = frozen(program, example, FreezeNorm(first=first, fold=False))
    model = deepcopy(model)
    freeze_by_hand(model, example, first == "own")
    wanted = outputs(model, example)
    assert relative_error(wanted, run(after, example)) < 1e-9
    assert relative_error(wanted, run(explicit, example)) < 1e-9
    assert relative_error(wanted, run(program, example)) > 1e-6
    heads = 8 if name == "qwen3" else 0
    assert len(remarks) == EXPLICIT[name] + heads, remarks
    assert not list(iterate_calls(after.main, *NORMS))


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_blend_goes_from_the_model_to_the_module_with_constant_norms(name: str) -> None:
    """At 0 the dense model, at 1 the program itself, and between them what a module does that computes both."""
    model, example, program = made(name, double=True)
    after = frozen(program, example, FreezeNorm(first="same" if name == "qwen3" else "own"))[0]
    blend = Blend(after)
    assert len(blend.parts) == len(norms_of(model))
    given = {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}
    found = []
    for share in (0.0, 0.25, 1.0):
        blend.set(share)
        found.append(next(iter(execute(blend.program, given).values())))
    assert relative_error(run(program, example), found[0]) < 1e-9
    assert torch.equal(next(iter(execute(after, given).values())), found[2])
    model = deepcopy(model)
    freeze_by_hand(model, example, name != "qwen3", share=0.25)
    assert relative_error(outputs(model, example), found[1]) < 1e-9


def test_what_is_done_to_a_reader_leaves_the_blend_whole() -> None:
    """Factors and quantized weights with a correction, behind frozen norms: the readers' readers still read the blend."""
    model, example, program = made("llama", double=True)
    structure, after = find_structure(program), program.copy()
    ctx = Context(structure=structure, program=program, calibration=samples(example))
    names = {"block1.attention.q_proj": "low_rank", "block2.mlp.up_proj": "quantize{bits=4,group_size=8,rank=2,solver=rtn}"}
    steps = [(site, FreezeNorm()) for site in structure.of_kind("norm")]
    steps += [(structure.sites[id], make("passes", Spec.parse(option))) for id, option in names.items()]
    done = Manager(ctx).transform(after, steps)
    assert len(done) == len(steps), ctx.remarks
    plain, blend = frozen(program, example, FreezeNorm())[0], Blend(after)
    between = [n for n in blend.program.main.nodes if n.name.endswith("_between")]
    readers = sum(len(n.users) for n in Blend(plain).program.main.nodes if n.name.endswith("_between"))
    assert len(between) == len(norms_of(model)) and sum(len(n.users) for n in between) == readers + 1  # the correction reads too


def test_a_norm_of_a_program_on_disk_is_frozen_in_the_open(tmp_path: Path) -> None:
    _, example, program = made("bert")
    program.save(tmp_path / "program")
    loaded = Program.load(tmp_path / "program")
    assert frozen(loaded, example, FreezeNorm())[0].digest() == frozen(program, example, FreezeNorm())[0].digest()


@pytest.mark.parametrize("name", EXPLICIT)
def test_each_tokens_own_deviation_is_the_model_again(name: str) -> None:
    """A guard of 1 over constants that no token reaches divides each token by its own deviation."""
    _, example, program = made(name, double=True)
    after = program.copy()
    for site in find_structure(program).of_kind("norm"):
        norm = norm_at(after.main, site)
        try:
            into = readers(after.main, norm)
        except Refused:
            into = []
        freeze(after.main, norm, 1e-7, 2e-7 if norm.node.meta["val"].dim() == 3 else 1e-7, into, guard=1.0)
    after.main.prune()
    assert not list(iterate_calls(after.main, *NORMS))
    assert relative_error(run(program, example), run(after, example)) < 1e-9


def test_the_guard_stops_an_outlier_and_nothing_else() -> None:
    _, example, program = made("llama")
    plain, guarded = (frozen(program, example, FreezeNorm(guard=g))[0] for g in (None, 1e6))
    assert relative_error(run(plain, example), run(guarded, example)) < 1e-5
    tight = frozen(program, example, FreezeNorm(guard=1.0))[0]
    assert relative_error(run(plain, example), run(tight, example)) > 1e-3
    site = find_structure(program).sites["final_norm"]
    graph = program.copy().main
    freeze(graph, norm_at(graph, site), 1.0, 1.0, guard=3.0)
    call = next(n for n in graph.nodes if n.target is torch.ops.aten.clamp_max.default)
    x = norm_at(program.main, site).x.name
    seen = execute(graph, {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}, [call.name, x])
    own = seen[x].double().square().mean(-1, keepdim=True).add(norm_at(program.main, site).eps).sqrt()
    assert relative_error((3.0 / own).clamp(max=1.0), seen[call.name]) < 1e-5


COUNTED = [("llama", ("position_ids",)), ("llama", ("position_ids", "attention_mask"))]


@pytest.mark.parametrize(("name", "without"), [("llama", ()), ("gpt2", ()), ("gemma3", ()), *COUNTED])
def test_decoding_goes_on_from_a_cache(name: str, without: tuple[str, ...]) -> None:
    """Only the sequence's first token is the first, however many are cached; padding before it does not count."""
    graph = zoo.captured(name, without)
    program = Program({"forward": graph}, graph.store)
    example = {i.name: zoo.batch(3, 16)[i.name] for i in graph.inputs}
    after, done, remarks = frozen(program, example, FreezeNorm())
    assert len(done) > 3, remarks
    first = [n for n in after.main.nodes if n.target in (torch.ops.aten.le.Scalar, torch.ops.aten.eq.Scalar)]
    assert len(first) == 1
    decode = derive_decode(after.main)
    if not without:
        assert_decodes(after.main, decode, tokens=12)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoders_and_decoders(name: str) -> None:
    from test_decode import seq2seq

    from lwcompile import pipeline
    from lwcompile.sources import open_source

    program = pipeline.capture(open_source(seq2seq(name)))
    structure = find_structure(program)
    norms = structure.of_kind("norm")
    after, done, refused = folded(program)
    assert done == len(norms) - 2, refused  # the encoder's last is an output, and the head is the embedding
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    first = program.entries["encoder"].inputs[0]
    shape = (2, *first.shape[1:]) if first.dtype.is_floating_point else (2, 9)
    example: dict[str, Any] = {"decoder_input_ids": ids[:, :6]}
    example[first.name] = torch.randn(shape) if first.dtype.is_floating_point else ids
    if "attention_mask" in [i.name for i in program.entries["encoder"].inputs]:
        example["attention_mask"] = torch.ones_like(ids)
    assert relative_error(execute(program, example)["logits"], execute(after, example)["logits"]) < 1e-5
    results = [frozen(program, example, FreezeNorm(fold=fold)) for fold in (True, False)]
    assert all(len(done) == len(norms) for _, done, _ in results)
    a, b = (execute(p, example)["logits"] for p, _, _ in results)
    assert relative_error(a, b) < 1e-5
    assert not any(list(iterate_calls(g, *NORMS)) for g in results[0][0].entries.values())
    derive_decode(results[0][0].entries["decoder"])


def test_freeze_norm_keeps_the_contract() -> None:
    for option in (FreezeNorm, FreezeNorm(first="same", guard=2.0, fold=False)):
        assert "declarations: lossy, structural" in check_pass(option)


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BadPlan, match="at least 1"):
        FreezeNorm(guard=0.5)
    with pytest.raises(BadPlan, match="at least one token"):
        FreezeNorm(tokens=0)


# --- in plans and in files


@pytest.mark.parametrize("allocator", ["integer_program", "greedy"])
def test_plans_remove_as_many_norms_as_the_damage_allows(allocator: str, tmp_path: Path) -> None:
    """A norm's bytes are its gain's and shift's, so the smallest plan within a damage is the one with the fewest norms."""
    from lwcompile.pipeline import Settings, session

    random = {"dataset": "random", "samples": 16, "seqlen": 12}
    recipe = Recipe.named("fast").with_(
        analyses=[Spec.parse("measured")], options={"norm": [Spec.parse("freeze_norm{first=[own,same]}")]},
        allocator=Spec(allocator), calibration=random, evaluation=random,
    )  # fmt: skip
    run_ = session(tiny_programs()["decoder"], Settings(recipe=recipe, backend="program", run_dir=tmp_path))
    damages = {id: min(d.value for d in found.values()) for id, found in run_.damages.items()}
    assert len(damages) == 5
    pays = sorted((v, id) for id, v in damages.items() if id != "final_norm")  # it stays in the open, and saves nothing
    limit = pays[0][0] + pays[1][0] + 1e-9
    plan = run_.plan(Budget(max_damage=limit))
    assert set(plan.choices) == {id for _, id in pays[:2]}
    compressed = run_.compress(plan)
    assert len(list(iterate_calls(compressed.main, *NORMS))) == 3
    assert (plan.bytes or 0) == run_.table.evaluate({}).bytes - 2 * 2 * 32 * 4
    assert run_.measure(compressed)["damage"].mean > 0


def test_one_forward_serves_all_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    from lwcompile.passes.analysis.measured import Measured
    from lwcompile.passes.transform import freeze_norm

    program, calls, real = tiny_programs()["decoder"], [], freeze_norm.deviations
    monkeypatch.setattr(freeze_norm, "deviations", lambda *args: (calls.append(1), real(*args))[1])
    structure = find_structure(program)
    ctx = trial_context(program, structure)
    ctx.options = {site.id: [Spec("freeze_norm")] for site in structure.of_kind("norm")}
    assert len(list(Measured().run(program, ctx))) == 5 and len(calls) == 1


@pytest.mark.parametrize("option", [FoldNorms(), FreezeNorm(), FreezeNorm(first="same", guard=2.0)], ids=str)
def test_a_language_model_runs_from_its_file(option: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx

    graph = zoo.captured("gpt2")
    program = Program({"forward": graph}, graph.store)
    example = {i.name: zoo.batch(3, 16)[i.name] for i in graph.inputs}
    after = folded(program)[0] if isinstance(option, FoldNorms) else frozen(program, example, option)[0]
    decode = derive_decode(after.main)
    both = Program({"forward": after.main, "decode": decode}, graph.store, "causal-lm", "tiny")
    assert Onnx().lower(both, tmp_path / "model.onnx", None).worst < 2e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["smollm2", "minilm", "dinov2"])
def test_the_real_models_norms(name: str, tmp_path: Path) -> None:
    from test_real import _in_order, real, real_program
    from test_real import example as real_example

    program, given = real_program(name), real_example(real(name), rows=2)
    if name == "smollm2":
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
        given["position_ids"] = torch.arange(24).expand(2, 24).contiguous()
    example = {k: v for k, v in _in_order(program, given).items() if k in [i.name for i in program.main.inputs]}
    structure, after = find_structure(program), program.copy()
    ctx = Context(structure=structure, program=program, calibration=samples(example))
    sites = structure.of_kind("norm")
    done = Manager(ctx).transform(after, [(site, FoldNorms()) for site in sites])
    assert len(done) == {"smollm2": 60, "minilm": 0, "dinov2": 24}[name]
    assert relative_error(run(program, example), run(after, example)) < 1e-5
    some = [sites[i] for i in (2, 5, len(sites) - 1)]
    made = []
    for option in (FreezeNorm(), FreezeNorm(fold=False)):
        after = program.copy()
        Manager(ctx).transform(after, [(site, option) for site in some])
        made.append(after)
    a, b = (run(p, example) for p in made)
    assert relative_error(a, b) < 1e-5 and relative_error(a, run(program, example)) > 1e-4
    if name == "smollm2":
        derive_decode(made[0].main)
    if name == "dinov2":
        pytest.importorskip("onnxruntime")
        from lwcompile.backends.onnx.backend import Onnx

        assert Onnx().lower(made[0], tmp_path / "model.onnx", ctx).worst < 2e-5
