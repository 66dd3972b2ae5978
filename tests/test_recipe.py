"""Recipes: they round-trip, flags come over them, and errors name file, line and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lwcompile.budget import Budget
from lwcompile.errors import BadInput, BadPlan
from lwcompile.recipe import Recipe, shipped
from lwcompile.registry import make, plugins
from lwcompile.spec import Spec

TEXT = """\
passes: fold_norms
analyses: [fisher, "damage{tokens=4096}"]
options:
  linear:
  - quantize{bits=[3,4],group_size=[32,64]}
  - quantize{bits=4,group_size=64}
  attention: drop
  "block0.*": []
  block0.mlp.down: "quantize{bits=8}"
allocator: greedy
budget: {avg_bits: 4.25}
backend: onnx
metric: "mine:metric{unit=points}"
calibration: {samples: 16}
seed: 3
"""


def test_a_recipe_says_what_it_says() -> None:
    recipe = Recipe.parse(TEXT)
    assert [str(spec) for spec in recipe.analyses] == ["fisher", "damage{tokens=4096}"]
    assert recipe.passes == (Spec("fold_norms"),) and recipe.allocator == Spec("greedy")
    assert recipe.budget == Budget(avg_bits=4.25) and recipe.metric == "mine:metric{unit=points}"
    assert recipe.calibration.samples == 16 and recipe.calibration.seqlen == 256 and recipe.seed == 3


def test_the_last_key_that_matches_a_site_counts() -> None:
    recipe = Recipe.parse(TEXT)
    grid = [str(spec) for spec in recipe.offered("block1.mlp.down", "linear")]
    assert grid == [f"quantize{{bits={b},group_size={g}}}" for b in (3, 4) for g in (32, 64)]
    assert recipe.offered("block0.mlp.up", "linear") == []
    assert recipe.offered("block0.mlp.down", "linear") == [Spec.of("quantize", bits=8)]
    assert recipe.offered("block1.attention", "attention") == [Spec("drop")]
    assert recipe.offered("final_norm", "norm") == []


def test_the_canonical_form_is_plain_and_tells_recipes_apart() -> None:
    recipe = Recipe.parse(TEXT)
    assert json.loads(json.dumps(recipe.canonical())) == recipe.canonical()
    again = Recipe.parse("# a comment\n" + TEXT.replace("seed: 3", "description: other words\nseed: 3"))
    assert again.canonical() == recipe.canonical()
    assert recipe.with_(seed=4).canonical() != recipe.canonical()
    assert Recipe.parse("").canonical() == Recipe().canonical()


def test_flags_come_over_the_file() -> None:
    recipe = Recipe.parse(TEXT)
    calibration = {"seqlen": 64, "dataset": None}
    flags = recipe.with_(budget={"bytes": "80MB", "avg_bits": None}, calibration=calibration, backend=None, seed=0)
    flags = flags.with_(allocator="integer_program{gap=0.01}")
    assert flags.budget == Budget(bytes=80_000_000)
    assert (flags.calibration.samples, flags.calibration.seqlen) == (16, 64)
    assert flags.backend == Spec("onnx") and flags.seed == 0 and flags.allocator.get("gap") == 0.01
    assert recipe.with_(budget={"avg_bits": None}) == recipe == recipe.with_()
    assert recipe.where("seed") == "recipe.yaml:15" and flags.where("analyses") == "recipe.yaml:2"
    assert flags.where("allocator") == "allocator"  # and no longer the file's line
    with pytest.raises(BadPlan, match=r"recipe: unknown key 'sead' \(did you mean 'seed'\?\)"):
        recipe.with_(sead=1)
    with pytest.raises(BadPlan, match=r"recipe: calibration.samples: must be greater than or equal to 1, and got 0"):
        recipe.with_(calibration={"samples": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nanlyses: [x]", "recipe.yaml:2: unknown key 'anlyses' (did you mean 'analyses'?)"),
        ("calibration:\n  sample: 3", "recipe.yaml:2: unknown key 'sample' (did you mean 'samples'?)"),
        ("budget:\n  avg_bit: 3", "recipe.yaml:2: unknown key 'avg_bit' (did you mean 'avg_bits'?)"),
        ("budget: 3", "recipe.yaml:1: budget wants lines such as avg_bits: 4.25, and got 3"),
        ("budget: {bytes: 80XB}", "recipe.yaml:1: cannot read '80XB' as a size"),
        ("analyses:\n- fisher\n- zd{", "recipe.yaml:3: analyses.1: cannot read the spec 'zd{'"),
        (
            "options:\n  linear:\n  - drop\n  - 5",
            "recipe.yaml:4: options.linear.1: wants a spec such as quantize{bits=4}, and got 5",
        ),
        ("options: [drop]", "recipe.yaml:1: options wants `key: value` lines"),
        ("calibration: 3", "recipe.yaml:1: calibration wants `key: value` lines, and got 3"),
        ("seed: few", "recipe.yaml:1: seed: must be a valid integer"),
        ("metric: kl{", "recipe.yaml:1: metric: cannot read the spec"),
        ("analyses: [quantize{bits=4}]", "put a spec such as quantize{bits=4} in quotes"),
        ("seed: 1\nseed: 2", "recipe.yaml:2: 'seed' is given twice, first at line 1"),
    ],
)
def test_errors_name_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(BadPlan) as raised:
        Recipe.parse(text)
    assert message in str(raised.value)


def test_unknown_plugins_are_named_with_their_line() -> None:
    recipe = Recipe.parse(TEXT)
    known = {"passes": {"fold_norms", "fisher", "damage", "quantize", "drop"}, "allocators": {"greedy"}, "backends": {"onnx"}}
    recipe.check_names(known)
    with pytest.raises(
        BadPlan, match=r"recipe.yaml:5: unknown pass 'quantize' \(did you mean 'quantise'\?\); there are damage, "
    ):
        recipe.check_names(known | {"passes": {"fold_norms", "fisher", "damage", "quantise", "drop"}})
    with pytest.raises(BadPlan, match=r"recipe.yaml:10: unknown allocator 'greedy'"):
        recipe.check_names(known | {"allocators": set()})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("linear: quantize{bits=[4,9]}", "r.yaml:2: quantize{bits=[4,9]}: a numeric format has 2 to 8 bits, not 9"),
        ("linear: quantize{bit=4}", "r.yaml:2: quantize has no option 'bit'"),
        ("linear: quantize{solver=gptk}", "no solver is named 'gptk'"),
        ("attention: window{size=4,sinks=4}", "r.yaml:2: window"),
    ],
)
def test_arguments_are_checked_with_their_line(line, said):
    from lwcompile.registry import make

    with pytest.raises(BadPlan) as error:
        Recipe.parse(f"options:\n  {line}\n", "r.yaml").check_specs(make)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"backend": "hff"}, "--backend: unknown backend 'hff' (did you mean 'hf'?)"),
        ({"backend": "mlir{form=tex}"}, "--backend: mlir: option 'form' wants one of bytecode, text, and got 'tex'"),
        ({"backend": "hf{"}, "--backend: cannot read the spec 'hf{'"),
        ({"heal": "distil"}, "--heal: unknown pass 'distil' (did you mean 'distill'?)"),
    ],
)
def test_what_a_flag_got_wrong_is_not_blamed_on_the_file(flags: dict[str, str], said: str) -> None:
    known: dict[str, list[str]] = {}
    for plugin in plugins():
        known.setdefault(plugin.group, []).append(plugin.name)
    with pytest.raises(BadPlan) as caught:
        recipe = Recipe.named("balanced").with_(**flags).with_(seed=1)
        recipe.check_names(known)
        recipe.check_specs(make)
    assert str(caught.value).startswith(said)


def test_shipped_recipes(tmp_path: Path) -> None:
    assert shipped() == ["balanced", "best", "compact", "fast", "quality", "transformers"]
    for name in shipped():
        recipe = Recipe.named(name)
        assert recipe.offered("block0.mlp.up", "linear") and recipe.budget.sized and recipe.analyses and recipe.description
        assert recipe.offered("embedding", "embedding") == recipe.offered("head", "linear")  # tied ones carry the same option
    with pytest.raises(
        BadInput, match=r"no recipe is named 'balancd' \(did you mean 'balanced'\?\); there are balanced, best, compact"
    ):
        Recipe.find("balancd")
    (tmp_path / "mine.yaml").write_text(TEXT)
    assert Recipe.find(tmp_path / "mine.yaml") == Recipe.parse(TEXT) and Recipe.find("fast") == Recipe.named("fast")
    with pytest.raises(BadInput, match=r"cannot read .*gone.yaml"):
        Recipe.find(tmp_path / "gone.yaml")
