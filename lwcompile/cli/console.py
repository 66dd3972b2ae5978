"""Where output goes: results to stdout, everything else to stderr. Of several processes only the first says anything."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, RenderableType

from lwcompile import ranks


def out() -> Console:
    return Console()


def err() -> Console:
    return Console(stderr=True)


def show(renderable: RenderableType) -> None:
    """Print a result. In a pipe lines are as long as they are: cutting them to 80 columns would lose text."""
    if ranks.rank():
        return
    console = out()
    if not console.is_terminal:
        console = Console(width=max(console.width, 160))
    console.print(renderable)


def show_json(value: Any) -> None:
    """One JSON document, and nothing else, on stdout."""
    from lwcompile.report import finite

    if ranks.rank():
        return
    sys.stdout.write(json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """One line beside the results: where a run is kept, what was assumed."""
    if ranks.rank():
        return
    err().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
