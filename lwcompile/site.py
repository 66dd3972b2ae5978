"""Sites: the places of a program where there is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["block", "attention", "mlp", "moe", "sublayer", "linear", "embedding", "norm"]

SUBLAYER_KINDS: tuple[SiteKind, ...] = ("attention", "mlp", "moe", "sublayer")


@dataclass(frozen=True)
class Site:
    """One place with a choice. Sites form a tree: block > sublayer > weight.

    Attributes:
        id: stable over traces, from the structure: `block3`, `block3.attention`, `block3.attention.q_proj`, `embedding`,
            `head`, `final_norm`; with the entry point or stream before it where there are several.
        kind: what stands there.
        parent: the id of the site above, None at the top.
        entry: the entry point of the program that holds it.
        path: the module path as the tracer kept it, `""` if it kept none.
        node: the name of its main node: the call of a linear, embedding or norm; the output of a sublayer's branch; the end of
            a block.
        skip, end: of sublayers and blocks: the residual stream's nodes before and after it.
        weight: the name of its main weight in the graph, None if it has none of its own.
        shape: of that weight, `[out, in]` for a linear, `[vocabulary, width]` for an embedding; `()` if none.
        parameters: numbers stored at or below this site.
    """

    id: str
    kind: SiteKind
    parent: str | None = None
    entry: str = "forward"
    path: str = ""
    node: str = ""
    skip: str = ""
    end: str = ""
    weight: str | None = None
    shape: tuple[int, ...] = ()
    parameters: int = 0
