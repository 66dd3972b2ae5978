"""The layout that DESIGN promises: what packages there are, who imports whom, and what every pass's file looks like."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lwcompile.contract import AnalysisPass, TransformPass
from lwcompile.registry import Plugin, load, plugins

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLUGGED = {"passes", "backends"}
FRAMEWORK = [p for p in sorted((ROOT / "lwcompile").rglob("*.py")) if not PLUGGED & set(p.relative_to(ROOT).parts)]
BUILT_IN = [p for p in plugins() if p.distribution == "lwcompile"]
PASSES = [p for p in BUILT_IN if p.group in ("passes", "solvers", "allocators")]
PASS_FILES = sorted({p.value.partition(":")[0] for p in PASSES})


def packages_under(folder: str, name: str) -> Iterator[str]:
    for init in sorted((ROOT / folder).rglob("__init__.py")):
        parts = init.parent.relative_to(ROOT / folder).parts
        if folder != "lwcompile" or not PLUGGED & set(parts):
            yield ".".join([name, *parts])


def source_of(module: str) -> Path:
    """The file of `lwcompile.passes.x` in the folder at the top, symlinks or not."""
    parts = module.removeprefix("lwcompile.").split(".")
    inside = parts[0] in ("passes", "backends")
    return ROOT.joinpath(*([] if inside else ["lwcompile"]), *parts).with_suffix(".py")


def test_every_folder_is_a_listed_package() -> None:
    folders = {
        *packages_under("lwcompile", "lwcompile"),
        *packages_under("passes", "lwcompile.passes"),
        *packages_under("backends", "lwcompile.backends"),
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders), "each once"


def test_no_folder_of_modules_lacks_its_init() -> None:
    for top in ("lwcompile", "passes", "backends"):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} holds modules and no __init__.py"


def test_the_wheel_has_one_top_level_name() -> None:
    assert {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]} == {"lwcompile"}


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_symlinks_lead_static_tools_to_the_folders(name: str) -> None:
    link = ROOT / "lwcompile" / name
    written = str(link.readlink()) if link.is_symlink() else link.read_text(encoding="utf-8")  # text where git has no symlinks
    assert written.strip() == f"../{name}"
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"lwcompile.{name}"] == name


def imports_of(path: Path) -> Iterator[str]:
    """Everything that a file imports, inside functions too, and what it names to `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("lwcompile.passes.", "lwcompile.backends.")):
            yield str(node.value)


@pytest.mark.parametrize("path", FRAMEWORK, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_framework_imports_no_pass_and_no_backend(path: Path) -> None:
    found = [name for name in imports_of(path) if name.startswith(("lwcompile.passes", "lwcompile.backends"))]
    assert not found, f"{path.name} reaches past the registry: {found}"


def test_passes_import_no_backend_and_no_other_kind_of_pass() -> None:
    for path in sorted((ROOT / "passes").rglob("*.py")):
        own = f"lwcompile.passes.{path.parent.name}."
        for name in imports_of(path):
            assert not name.startswith("lwcompile.backends"), f"{path}: {name}"
            assert not name.startswith("lwcompile.passes.") or name.startswith(own), f"{path}: {name}"


@pytest.mark.parametrize("module", ["lwcompile", "lwcompile.cli", "lwcompile.registry", "lwcompile.spec", "lwcompile.errors"])
def test_torch_is_not_imported_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'onnx', 'onnxruntime'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda p: f"{p.group}.{p.name}")
def test_every_entry_point_resolves_to_a_class_of_its_name(plugin: Plugin) -> None:
    cls = load(plugin.group, plugin.name)
    assert cls.name == plugin.name


def test_the_installed_entry_points_are_the_ones_listed() -> None:
    listed = {
        (group.removeprefix("lwcompile."), name, value)
        for group, points in PROJECT["project"]["entry-points"].items()
        if group.startswith("lwcompile.")
        for name, value in points.items()
    }
    assert {(p.group, p.name, p.value) for p in BUILT_IN} == listed, "install the project again: pip install -e ."


@pytest.mark.parametrize("module", PASS_FILES)
def test_a_pass_is_one_readable_file(module: str) -> None:
    """At most 200 lines beside what it opens with; searches over whole plans may take more, and no file takes 300."""
    text = source_of(module).read_text(encoding="utf-8")
    opening = ast.parse(text).body[0].end_lineno or 0
    lines = text.count("\n")
    assert lines - opening <= 200 or ".allocate." in module, f"{module} has {lines - opening} lines"
    assert lines <= 300, f"{module} has {lines} lines"


@pytest.mark.parametrize("plugin", PASSES, ids=lambda p: p.name)
def test_a_pass_says_source_cost_and_what_it_refuses(plugin: Plugin) -> None:
    module = source_of(plugin.value.partition(":")[0])
    words = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    cls = load(plugin.group, plugin.name)
    for word in ("Source:", "Cost:", "Refuses:"):
        assert word in words, f"{module} opens without {word!r}"
    if issubclass(cls, TransformPass):
        assert "->" in words, f"{module} shows no before -> after"
    if issubclass(cls, AnalysisPass):
        assert cls.provides, f"{plugin.name} does not say what it provides"


def test_nothing_matches_on_class_names() -> None:
    """Structure comes from the graph: no pass and no backend looks at a model's classes or its `model_type`.

    Except for the backend whose format is an architecture's own: it must name the one that the source's configuration names.
    """
    for top in ("passes", "backends"):
        for path in (path for path in sorted((ROOT / top).rglob("*.py")) if path.parent.name != "hf"):
            text = path.read_text(encoding="utf-8")
            for word in ("model_type", "__class__.__name__", "architectures", "nn_module_stack"):
                assert word not in text, f"{path} mentions {word}"
    assert "model_type" not in (ROOT / "lwcompile" / "structure.py").read_text(encoding="utf-8")
