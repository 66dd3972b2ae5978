"""The documents say what the code says: generated pages are up to date, quoted files are the files, links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lwcompile.catalogue import catalogue
from lwcompile.recipe import Recipe
from lwcompile.registry import make, plugins

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"(?:<!-- (?P<file>\S+) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)```", re.S)


def blocks(page: Path) -> list[tuple[str | None, str, str]]:
    return [(m["file"], m["language"], m["body"]) for m in FENCE.finditer(page.read_text(encoding="utf-8"))]


def test_the_catalogue_is_up_to_date() -> None:
    written = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert written == catalogue(), "run: python -m lwcompile.catalogue > docs/passes.md"


def test_the_catalogue_is_written_by_its_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lwcompile.catalogue"], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == catalogue()


def test_the_catalogue_names_every_plugin_and_every_option() -> None:
    text = catalogue()
    for plugin in plugins():
        if plugin.distribution == "lwcompile":
            assert f"### {plugin.name}\n" in text
    assert "| `group_size` | int \\| None | 64 |" in text
    assert "Exact" in text or "Lossy" in text


def test_quoted_files_are_the_files() -> None:
    quoted = [(file, body) for page in DOCS for file, _, body in blocks(page) if file is not None]
    assert {file for file, _ in quoted} >= {
        "tests/plugin/pyproject.toml",
        "tests/plugin/lwcompile_example_plugin/kurtosis.py",
        "tests/plugin/lwcompile_example_plugin/half.py",
    }
    for file, body in quoted:
        assert body == (ROOT / file).read_text(encoding="utf-8"), f"paste {file} into the page again"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_the_pages_is_python(page: Path) -> None:
    for _, language, body in blocks(page):
        if language == "python":
            ast.parse(body)
    assert page.read_text(encoding="utf-8").count("```") % 2 == 0, "an open block"


def test_recipes_in_the_pages_are_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {p.name for p in plugins()}
    found = 0
    for page in PAGES:
        for _, language, body in blocks(page):
            if language == "yaml" and ("options:" in body or "analyses:" in body):
                recipe = Recipe.parse(body, page.name)
                for _, spec, where in recipe.references():
                    if spec.name in known:
                        assert [make("passes", s) for s in spec.expand()] if spec.name in ("quantize", "drop") else True, where
                    else:
                        assert spec.name in ("kurtosis", "half", "onnx"), f"{where}: {spec.name}"
                found += 1
    assert found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), f"{page.name} links to {target}"
        assert path or anchor in anchors, f"{page.name} has no heading {anchor}"


def test_no_page_names_a_place_on_this_machine() -> None:
    for page in PAGES:
        for word in ("/work/", "/opt/", "/tmp/"):
            assert word not in page.read_text(encoding="utf-8"), f"{page.name} names {word}"
