"""Self-contained HTML pages: a template with its style, script and data inline, and a policy that forbids everything else."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any


def page(template: str, title: str, data: Any, body: str = "") -> str:
    """The page `template` (`report`, `inspect`), with `data` as its JSON and `body` as ready-made HTML.

    The script reads the data as text and builds nodes from it, so a site's name cannot become markup.
    """
    folder = files(__name__)
    text = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", f"{template}.css", f"{template}.js")
    }
    inline = json.dumps(data, ensure_ascii=False, allow_nan=False, default=str, separators=(",", ":"))
    parts = {
        "TITLE": escape(title),
        "STYLE": text["page.css"] + text[f"{template}.css"],
        "BODY": body,
        "DATA": inline.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        "SCRIPT": text[f"{template}.js"],
    }
    pieces = text["page.html"].split("@@")  # @@NAME@@ in the template; replaced in one go, so data that holds @@ stays data
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))
