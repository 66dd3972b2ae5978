"""torch.compile on SmolLM2-135M-Instruct: eager, Inductor and layerwise, alternated in one process.

    python -m benchmarks.compile [--rounds 15] [--plan FOLDER]

Prefill is one pass over 128 tokens; decode is one token behind 128 in a static cache of 256. Each round times every variant once,
in turn, so that whatever else the machine does meets all of them. Prints medians, ratios to eager, the largest difference
from eager's logits, seconds to the first result and the number of graphs, each as a row of Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from benchmarks.models import smollm2
from lwcompile.manager import relative_error

STEPS = 8
"""Tokens decoded one by one in each round."""


@dataclass
class Variant:
    """A model to call, and what was seen of it."""

    name: str
    model: Callable[..., Any]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    logits: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    graphs: int = 0


def prefill(variant: Variant, ids: Tensor) -> float:
    started = time.perf_counter()
    made = variant.model(input_ids=ids, use_cache=False).logits
    taken = time.perf_counter() - started
    variant.logits["prefill"] = made
    return taken


def decode(variant: Variant, ids: Tensor, eager: Any) -> float:
    """Seconds a token."""
    from transformers import StaticCache

    cache = StaticCache(config=eager.config, max_cache_len=256)
    eager(input_ids=ids, past_key_values=cache)
    token = ids[:, :1]
    started = time.perf_counter()
    for _ in range(STEPS):
        made = variant.model(input_ids=token, past_key_values=cache).logits
    taken = time.perf_counter() - started
    variant.logits["decode"] = made.clone()
    return taken / STEPS


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plan", help="a folder that lwcompile compress wrote: one more variant")
    parser.add_argument(
        "--codegen", action="append", default=[], help="one more variant by this codegen (of the plan, if there is one)"
    )
    given = parser.parse_args()

    model: Any = smollm2().model
    ids = torch.randint(5, 20000, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    options: dict[str, dict[str, Any]] = {"layerwise": {}}
    if given.plan:
        options["layerwise, plan"] = {"plan": given.plan}
    for codegen in given.codegen:
        options[f"layerwise, {codegen}"] = {"codegen": codegen, **({"plan": given.plan} if given.plan else {})}
    variants = [Variant("eager", model), Variant("inductor", torch.compile(model))]
    variants += [Variant(name, torch.compile(model, backend="layerwise", options=o)) for name, o in options.items()]
    work: dict[str, Callable[[Variant], float]] = {
        "prefill": lambda v: prefill(v, ids),
        "decode": lambda v: decode(v, ids, model),
    }
    with torch.no_grad():
        for name, run in work.items():
            for variant in variants:
                before, started = graphs(), time.perf_counter()
                run(variant)
                run(variant)
                variant.first[name] = time.perf_counter() - started
                variant.graphs += graphs() - before
            for _ in range(given.rounds):
                for variant in variants:
                    variant.seconds[name].append(run(variant))
            report(name, variants)


def report(name: str, variants: list[Variant]) -> None:
    eager = variants[0]
    for v in variants:
        middle, least = statistics.median(v.seconds[name]), min(v.seconds[name])
        ratio = statistics.median(e / s for e, s in zip(eager.seconds[name], v.seconds[name]))
        error = relative_error(eager.logits[name], v.logits[name])
        numbers = f"{1e3 * middle:.1f} | {1e3 * least:.1f} | {ratio:.2f} | {error:.1e} | {v.first[name]:.0f} | {v.graphs}"
        row = f"| {name} | {v.name} | {numbers} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
