"""Plugins by name: listed without an import, loaded one at a time, and a bad one breaks only itself and is named.

Distributions are faked by what pip writes: a `.dist-info` folder with entry points, and a module, on the path.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lwcompile import registry
from lwcompile.contract import AnalysisPass, TransformPass
from lwcompile.errors import BadPlan, PluginError
from lwcompile.registry import GROUPS, load, make, plugins, providers
from lwcompile.spec import Spec

GOOD = '''
from dataclasses import dataclass
from typing import ClassVar
from lwcompile import registry
from lwcompile.contract import AnalysisPass

@dataclass(frozen=True)
class Found(AnalysisPass):
    """Cost: none."""
    name: ClassVar[str] = "found"
    provides: ClassVar[tuple[str, ...]] = ("finding",)
    depth: int = 1

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}")
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """install(distribution, entries, module source): what pip would leave on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make_distribution(name: str, entries: dict[str, str], source: str, group: str = "lwcompile.passes") -> None:
        module = name.replace("-", "_")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        rows = "".join(f"{key} = {module}:{attribute}\n" for key, attribute in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{rows}")
        (tmp_path / f"{module}.py").write_text(source)
        registry._points.cache_clear()

    yield make_distribution
    registry._points.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


def test_every_built_in_plugin_is_listed_under_its_own_name() -> None:
    named = {(p.group, p.name) for p in plugins() if p.distribution == "lwcompile"}
    assert {("passes", "quantize"), ("passes", "drop"), ("solvers", "gptq"), ("metrics", "kl")} <= named
    assert {group for group, _ in named} == set(GROUPS)


def test_listing_imports_no_plugin(install) -> None:
    install("acme-broken", {"broken": "Broken"}, "raise ImportError('acme is not here')")
    assert [p.distribution for p in plugins("passes") if p.name == "broken"] == ["acme-broken"]
    assert "acme_broken" not in sys.modules


def test_listing_does_not_import_torch() -> None:
    code = "import sys, lwcompile.registry as r; assert r.plugins(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_plugin_is_loaded_and_configured_from_its_line(install) -> None:
    install("acme", {"found": "Found"}, GOOD)
    assert issubclass(load("passes", "found"), AnalysisPass)
    made = make("passes", "found{depth=3}")
    assert made.depth == 3 and made.spec() == Spec.of("found", depth=3)
    assert providers("finding") == ["found"]


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(BadPlan, match=r"no pass is named 'quantise'; installed are .*drop.*quantize"):
        load("passes", "quantise")


def test_a_plugin_that_does_not_import_breaks_only_itself(install) -> None:
    install("acme-broken", {"broken": "Broken"}, "raise ImportError('acme is not here')")
    install("acme", {"found": "Found"}, GOOD)
    with pytest.raises(PluginError, match=r"pass 'broken' of acme-broken .* does not load: ImportError: acme is not here"):
        load("passes", "broken")
    assert load("passes", "found").name == "found"
    assert issubclass(load("passes", "drop"), TransformPass)
    assert providers("finding") == ["found"], "the broken one is passed over"


@pytest.mark.parametrize("source", ["def broken(:", "import nothing_of_the_kind", "1 / 0", "x = 1"])
def test_whatever_a_module_raises_is_a_plugin_error(install, source: str) -> None:
    install("acme-broken", {"broken": "Broken"}, source)
    with pytest.raises(PluginError, match="'broken' of acme-broken"):
        load("passes", "broken")


def test_something_that_is_no_class_is_named(install) -> None:
    install("acme-function", {"function": "function", "found": "Found"}, "def function(): ...\n" + GOOD)
    with pytest.raises(PluginError, match=r"'function' of acme-function .* is a function, not a class"):
        load("passes", "function")
    assert providers("finding") == ["found"]


def test_a_class_that_raises_when_it_is_configured_is_named(install) -> None:
    source = GOOD + "        raise RuntimeError('no luck')\n"
    install("acme", {"found": "Found"}, source)
    with pytest.raises(PluginError, match=r"the pass 'found' \(acme\) cannot be configured: no luck"):
        make("passes", "found")


def test_a_value_that_the_class_refuses_is_a_bad_plan(install) -> None:
    install("acme", {"found": "Found"}, GOOD)
    with pytest.raises(BadPlan, match=r"found\{depth=0\}: depth must be at least 1, not 0"):
        make("passes", "found{depth=0}")
    with pytest.raises(BadPlan, match="found has no option 'width'; it has depth"):
        make("passes", "found{width=2}")
    with pytest.raises(BadPlan, match="option 'depth' wants int, and got 'deep'"):
        make("passes", "found{depth=deep}")


def test_another_version_of_the_contract_is_named(install) -> None:
    install("acme-old", {"found": "Found"}, GOOD.replace("depth: int", "api: ClassVar[int] = 7\n    depth: int"))
    message = "'found' of acme-old was written for version 7 of the pass contract, and this is version 1; install a matching"
    with pytest.raises(PluginError, match=message):
        load("passes", "found")


def test_a_clash_names_both_distributions_and_chooses_neither(install) -> None:
    install("acme", {"found": "Found"}, GOOD)
    install("acme-rival", {"found": "Found"}, GOOD)
    assert [p.distribution for p in plugins("passes") if p.name == "found"] == ["acme", "acme-rival"]
    with pytest.raises(PluginError, match=r"offered by acme \(acme:Found\) and acme-rival \(acme_rival:Found\); uninstall one"):
        load("passes", "found")


def test_a_clash_with_a_built_in_pass_names_both(install) -> None:
    install("acme", {"drop": "Found"}, GOOD)
    with pytest.raises(PluginError, match=r"'drop' is offered by acme \(.*\) and lwcompile \(.*\)"):
        load("passes", "drop")
    assert load("passes", "quantize").name == "quantize"


def test_one_name_in_two_groups_is_no_clash(install) -> None:
    install("acme", {"rtn": "Found"}, GOOD)
    assert load("passes", "rtn").name == "found"
    assert load("solvers", "rtn").name == "rtn"


def test_a_plugin_s_operator_counts_as_packed_storage(install):
    """Its module is found by the namespace of a saved graph; the graph is `quantized`, and folds to a dense one."""
    install(
        "acme-codes",
        {"acme": "decode"},
        """
import torch
from lwcompile.ops import unpacks

@torch.library.custom_op("acme::decode", mutates_args=())
def decode(codes: torch.Tensor, step: float) -> torch.Tensor:
    return codes.float() * step

@decode.register_fake
def _(codes, step):
    return torch.empty(codes.shape)

unpacks(torch.ops.acme.decode.default)
""",
        "lwcompile.operators",
    )
    import torch

    from lwcompile.graph import ModelGraph
    from lwcompile.store import ParameterStore

    codes = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    store = ParameterStore()
    data = {
        "inputs": [{"name": "x", "shape": [2, 5], "dtype": "float32", "dynamic": {}}],
        "outputs": ["y"],
        "nodes": [
            {"name": "x", "op": "placeholder", "target": "x"},
            {"name": "codes", "op": "get_attr", "target": "codes"},
            {"name": "w", "op": "call_function", "target": "acme.decode.default", "args": [{"node": "codes"}, 0.5]},
            {"name": "y", "op": "call_function", "target": "aten.linear.default", "args": [{"node": "x"}, {"node": "w"}]},
            {"name": "output", "op": "output", "target": "output", "args": [[{"node": "y"}]]},
        ],
        "tensors": {"codes": store.put(codes)},
    }
    graph, x = ModelGraph.from_json(data, store), torch.randn(2, 5)
    assert graph.level() == "quantized" and graph.folded().level() == "captured"
    for dense in (False, True):
        torch.testing.assert_close(graph.module(dense=dense)(x)[0], x @ (codes * 0.5).T)
