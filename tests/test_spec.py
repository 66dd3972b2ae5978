"""One-line specs: what is printed reads back as what it was, and what cannot be read names its column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwcompile.contract import Pass, configure
from lwcompile.errors import BadPlan
from lwcompile.spec import KEEP, Spec, Value

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-/]{0,8}", fullmatch=True)
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(("inf", "True", "none", "-1", "1e5", "nan"))
    | names
)


def specs_of(values: st.SearchStrategy[Value]) -> st.SearchStrategy[Spec]:
    arguments = st.lists(st.tuples(keys, values), max_size=3, unique_by=lambda item: item[0])
    return st.builds(lambda name, args: Spec(name, tuple(args)), names, arguments)


values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple) | specs_of(inner), max_leaves=6)


@given(specs_of(values))
def test_what_is_printed_reads_back(spec: Spec) -> None:
    again = Spec.parse(str(spec))
    assert again == spec
    assert str(again) == str(spec)
    assert [type(v) for _, v in again.args] == [type(v) for _, v in spec.args], "1, 1.0 and true stay apart"


@given(specs_of(scalars))
def test_a_printed_spec_is_one_line(spec: Spec) -> None:
    assert str(spec).splitlines() == [str(spec)]


@given(st.text(max_size=20))
def test_no_text_does_worse_than_a_bad_plan(text: str) -> None:
    try:
        spec = Spec.parse(text)
    except BadPlan as error:
        assert "at column" in str(error)
    else:
        assert Spec.parse(str(spec)) == spec


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.lists(st.booleans(), min_size=1, max_size=2))
def test_lists_are_grids(bits: list[int], flags: list[bool]) -> None:
    spec = Spec.of("quantize", bits=list(bits), symmetric=list(flags), group_size=64)
    grid = spec.expand()
    assert [(s.get("bits"), s.get("symmetric")) for s in grid] == [(b, f) for b in bits for f in flags]
    assert all(s.get("group_size") == 64 for s in grid)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("keep", KEEP),
        ("drop{}", Spec("drop")),
        (" quantize { bits = 4 , group_size=none } ", Spec.of("quantize", bits=4, group_size=None)),
        ("a{b=true,c=False,d=-1.5e-3,e=[1,[x,2.0]]}", Spec.of("a", b=True, c=False, d=-0.0015, e=(1, ("x", 2.0)))),
        ('a{x=-inf,y=inf,z="inf",w=infinite}', Spec.of("a", x=-float("inf"), y=float("inf"), z="inf", w="infinite")),
        ('share{source="block 3"}', Spec.of("share", source="block 3")),
        ("a{s=hqq{p=0.7}}", Spec.of("a", s=Spec.of("hqq", p=0.7))),
        ("a{s=hqq{}}", Spec.of("a", s=Spec("hqq"))),
        ('a{x="true",y="",z="{,}"}', Spec.of("a", x="true", y="", z="{,}")),
        ("a{path=block3.attention/x-1}", Spec.of("a", path="block3.attention/x-1")),
    ],
)
def test_lines_that_people_write(text: str, wanted: Spec) -> None:
    assert Spec.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a name at column 1"),
        ("quantize{bits}", "expected '=' after 'bits' at column 14"),
        ("quantize{bits=}", "expected a value at column 15"),
        ("quantize{bits=4", "expected ',' or '}' at column 16"),
        ("quantize{bits=4}x", "expected the end of the line at column 17"),
        ("quantize{bits=4,bits=3}", "'bits' is repeated"),
        ('a{s="open}', 'a closed "string" at column 5'),
        ("a{b=[1,2}", r"expected ',' or '\]' at column 9"),
        ("4bit", "expected a name at column 1"),
    ],
)
def test_errors_name_the_column(text: str, words: str) -> None:
    with pytest.raises(BadPlan, match=words):
        Spec.parse(text)


# --- passes as specs


@dataclass(frozen=True)
class Options(Pass):
    """One option of each type that specs hold."""

    name: ClassVar[str] = "options"

    count: int = 1
    share: float = 0.5
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    text: str = ""
    size: int | None = 64
    several: tuple[int, ...] = ()
    inner: Spec | None = field(default=Spec("rtn"))


configured = st.builds(
    Options,
    count=st.integers(),
    share=st.floats(allow_nan=False),
    on=st.booleans(),
    mode=st.sampled_from(("fast", "slow")),
    text=st.text(max_size=10),
    size=st.none() | st.integers(1, 512),
    several=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    inner=st.none() | specs_of(scalars),
)


@given(configured)
def test_a_pass_reads_back_from_its_own_line(made: Options) -> None:
    assert configure(Options, Spec.parse(str(made.spec()))) == made


def test_defaults_are_left_out() -> None:
    assert str(Options().spec()) == "options"
    assert str(Options(count=2, inner=None).spec()) == "options{count=2,inner=none}"


def test_whole_numbers_are_good_enough_for_real_ones_and_not_the_other_way() -> None:
    made = configure(Options, Spec.parse("options{share=1}"))
    assert made.share == 1.0 and isinstance(made.share, float)
    with pytest.raises(BadPlan, match=r"option 'count' wants int, and got 1\.0"):
        configure(Options, Spec.parse("options{count=1.0}"))
    with pytest.raises(BadPlan, match="option 'count' wants int, and got True"):
        configure(Options, Spec.parse("options{count=true}"))


@pytest.mark.parametrize("option", ["mode=medium", "on=1", "size=big", "several=[1,x]", "share=x"])
def test_a_value_of_the_wrong_type_is_refused(option: str) -> None:
    with pytest.raises(BadPlan, match="options: option"):
        configure(Options, Spec.parse(f"options{{{option}}}"))


def test_a_word_that_is_no_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(BadPlan, match="option 'mode' wants one of fast, slow, and got 'medium'"):
        configure(Options, Spec.parse("options{mode=medium}"))
