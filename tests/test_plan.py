"""Plans as files: they round-trip, and what a hand breaks is named with file and line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_table import small
from tiny import llama_program

from lwcompile.budget import Budget
from lwcompile.errors import BadInput, BadPlan
from lwcompile.plans import Change, Plan
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import KEEP, Spec
from lwcompile.table import Group

Q4, Q2, DROP = Spec.of("quantize", bits=4), Spec.of("quantize", bits=2), Spec("drop")

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)
words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=6)
floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), floats, words)
specs = st.builds(lambda name, args: Spec(name, tuple(args.items())), names, st.dictionaries(names, values, max_size=3))
sites = st.one_of(
    st.from_regex(r"[a-z]{1,5}[0-9]?(\.[a-z_]{1,6}){0,2}", fullmatch=True),
    st.sampled_from(["on", "null", "y", "1e3", "3.5", "a: b"]),
)
options = specs.filter(lambda s: s != KEEP).map(lambda s: (s,)) | st.tuples(specs, specs).filter(lambda t: KEEP not in t)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(sites, options, max_size=5), st.none() | st.floats(0, 9), words)
def test_any_plan_round_trips(choices: dict, damage: float | None, note: str) -> None:
    interval = None if damage is None else (damage / 2, damage * 2)
    plan = Plan(choices, Budget(avg_bits=4.25), "nats/token", damage, None, damage, interval, 123, 4.2, {"note": note})
    text = plan.to_yaml()
    back = Plan.parse(text)
    assert back == plan and back.to_yaml() == text and list(back.choices) == list(plan.choices)
    assert set(yaml.safe_load(text)["sites"]) == set(plan.choices)


def test_the_file_is_made_to_be_read(tmp_path: Path) -> None:
    plan = Plan.of(
        small(), {"b0.attention": (DROP,), "embedding": (Q4,), "head": (Q4,)}, Budget(bytes=99), allocator="greedy", seed=0
    )
    plan.save(tmp_path / "plan.yaml", small())
    text = (tmp_path / "plan.yaml").read_text()
    assert text.splitlines()[1:] == [
        "version: 1",
        "unit: nats/token",
        "budget: {bytes: 99}",
        "predicted: 0.5",
        "bytes: 26",
        "avg_bits: 10.4",
        "origin:",
        "  allocator: greedy",
        "  seed: 0",
        "sites:",
        "  embedding: quantize{bits=4}  # damage 0.1, 4 bytes",
        "  head: quantize{bits=4}  # damage 0.1, 4 bytes",
        "",
        "  b0.attention: drop  # damage 0.3, 0 bytes",
    ]
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def edited(tmp_path: Path, *lines: str) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(["version: 1", "sites:", *(f"  {line}" for line in lines)]))
    return Plan.load(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["head: drop", "b0.attn: drop"], ":4: unknown site 'b0.attn'; did you mean 'b0.attention'?"),
        (
            ["embedding: quantize{bits=5}"],
            ":3: site 'embedding' is not offered quantize{bits=5}; it is offered keep, quantize{bits=4}, quantize{bits=2}",
        ),
        (
            ["b0.mlp.up: quantize{bits=2}"],
            ":3: site 'b0.mlp.up' cannot carry quantize{bits=2}: the backend has no 2-bit embedding",
        ),
        (
            ["b0.attention.q: quantize{bits=4}", "", "b0.attention.k: quantize{bits=2}"],
            ":5: site 'b0.attention.k' carries quantize{bits=2} and 'b0.attention.q' carries quantize{bits=4}, but they run as "
            "one matrix (group 'qk'): give both the same option",
        ),
        (
            ["embedding: quantize{bits=2}"],
            ":3: site 'head' carries keep and 'embedding' carries quantize{bits=2}, but they read one tensor (group 'tied')",
        ),
    ],
)
def test_an_error_names_file_line_and_what_to_do(tmp_path: Path, lines: list[str], message: str) -> None:
    plan = edited(tmp_path, *lines)
    with pytest.raises(BadPlan) as raised:
        plan.validate(small())
    assert f"plan.yaml{message}" in str(raised.value)


def test_a_broken_group_shows_both_lines(tmp_path: Path) -> None:
    plan = edited(tmp_path, "b0.attention.q: quantize{bits=4}", "b0.attention.k: quantize{bits=2}")
    with pytest.raises(BadPlan, match=r"plan\.yaml:4: site .*\(see \S*plan\.yaml:3\)"):
        plan.validate(small())
    edited(tmp_path, "b0.attention.q: quantize{bits=4}", "b0.attention.k: quantize{bits=4}").validate(small())


def test_validation_without_scores(tmp_path: Path) -> None:
    plan = edited(tmp_path, "a.q: quantize{bits=4}", "a.k: quantize{bits=4}", "b: anything{x=1}")
    offered = {"a.q": [Q4, Q2], "a.k": [Q4, Q2], "b": None}
    plan.validate(offered, [Group("qk", ("a.q", "a.k"))])
    with pytest.raises(BadPlan, match=r"plan.yaml:5: unknown site 'b'"):
        plan.validate({"a.q": [Q4], "a.k": [Q4]})
    with pytest.raises(BadPlan, match=r"plan.yaml:3: site 'a.q' is not offered .*; 1 more such errors follow"):
        plan.validate({"a.q": [Q2], "a.k": [Q2], "b": None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nsits: {}", "plan.yaml:2: unknown key 'sits' (did you mean 'sites'?)"),
        ("version: 2", "plan.yaml:1: version 2, and this lwcompile reads 1"),
        ("sites:\n  a: quantize{bits=}", "plan.yaml:2: cannot read the spec 'quantize{bits=}': expected a value at column 15"),
        ("sites:\n  a: 4", "plan.yaml:2: site 'a' wants an option such as quantize{bits=4}, and got 4"),
        ("sites:\n  a: x + y + z", "plan.yaml:2: site 'a' takes one structural option and one numeric one"),
        ("sites:\n  a: drop\n  b: drop\n  a: keep", "plan.yaml:4: 'a' is given twice, first at line 2"),
        ("sites:\n  3: drop", "plan.yaml:2: 3 is no site id"),
        ("sites: [a]", "plan.yaml:1: sites wants `key: value` lines"),
        ("budget:\n  avg_bits: 4\n  drops: 1", "plan.yaml:3: unknown key 'drops'"),
        ("predicted: high", "plan.yaml:1: predicted wants a number, and got 'high'"),
        ("interval: [1]", "plan.yaml:1: interval wants [low, high]"),
        ("- a", "plan.yaml:1: expected `key: value` lines"),
        ("sites:\n\ta: drop", "plan.yaml:2: not YAML"),
        ("sites: {a: quantize{bits=4}}", "put a spec such as quantize{bits=4} in quotes"),
        ("origin: !!python/object:os.system {}\nsites: &a\n  b: *a", "contains itself"),
        ("unit: !!python/name:os.system x", "plan.yaml:1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(BadPlan) as raised:
        Plan.parse(text)
    assert message in str(raised.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*none\.yaml: No such file"):
        Plan.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not text in UTF-8"):
        Plan.load(tmp_path / "binary.yaml")
    with pytest.raises(BadInput, match=r"cannot write the plan .*nowhere"):
        Plan({}).save(tmp_path / "nowhere" / "plan.yaml")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    Plan({"a": (DROP,)}).save(path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lwcompile.plans.os.fsync", full)
    with pytest.raises(BadInput, match="No space left on device"):
        Plan({"b": (DROP,)}).save(path)
    assert list(Plan.load(path).choices) == ["a"] and [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_diff_and_digest() -> None:
    before = Plan({"a": (Q4,), "b": (DROP,)})
    after = Plan({"b": (DROP,), "a": (Q2,), "c": (Spec.of("lowrank", rank=4), Q4)}, unit="nats/token")
    changes = before.diff(after)
    assert changes == [Change("a", (Q4,), (Q2,)), Change("c", (), (Spec.of("lowrank", rank=4), Q4))]
    assert [str(c) for c in changes] == [
        "a: quantize{bits=4} -> quantize{bits=2}",
        "c: keep -> lowrank{rank=4} + quantize{bits=4}",
    ]
    assert before.digest() != after.digest()
    assert before.digest() == Plan({"b": (DROP,), "a": (Q4,), "z": (KEEP,)}, predicted=3.0).digest()
    assert before["nowhere"] == () and before.replace(measured=1.0).measured == 1.0


def test_stated_defaults_do_not_tell_plans_apart(tmp_path: Path) -> None:
    plan = edited(tmp_path, "embedding: quantize{bits=4,group_size=64}", "head: quantize{bits=4}")
    normal = plan.normalize(lambda spec: Spec(spec.name, tuple(a for a in spec.args if a != ("group_size", 64))))
    normal.validate(small())
    assert normal["embedding"] == (Q4,) and normal.where("head") == plan.where("head") != ""


def test_none_of_this_imports_torch() -> None:
    code = "import sys, lwcompile.plans, lwcompile.recipe, lwcompile.budget, lwcompile.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_by_hand_may_say_an_option_in_other_words(tmp_path):
    offered, same = "quantize{bits=3,group_size=16,solver=rtn}", "quantize{solver=rtn,bits=3,symmetric=false,group_size=16}"
    recipe = Recipe.parse(
        f"analyses: ['fisher{{tokens=32}}']\noptions: {{linear: '{offered}'}}\n"
        "calibration: {dataset: random, samples: 4}\nevaluation: {samples: 4}"
    )
    run = Session(llama_program(), recipe, tmp_path / "run")
    site = "block0.mlp.down_proj"
    adopted = run.adopt(Plan({site: (Spec.parse(same),)}, Budget()))
    assert adopted.choices == {site: (Spec.parse(offered),)} and adopted.bytes == run.table.evaluate(adopted.choices).bytes
    with pytest.raises(BadPlan, match="bits=5"):
        run.adopt(Plan({site: (Spec.parse(same.replace("bits=3", "bits=5")),)}, Budget()))
