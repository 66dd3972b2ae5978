"""What activations in int8 do to SmolLM2 in 4 bits: the same weights with products in float32, with ours in int8, and onnxruntime's.

    python -m benchmarks.texts texts && python -m benchmarks.int8_quality --texts texts [--file ours/model.onnx] [--windows 8]

4 bits, groups of 64, round to nearest, embedding and head included, as in `cpu_decode`. KL is in nats a token, over windows of 256
tokens, from what the same weights give with float32 activations, and beside it what those differ from the dense model by; `most` is how
far a logit moves at most, over the largest one. `--file` is the file of ours that `cpu_decode` wrote, run by onnxruntime. Last come the
ids 5 to 132, which are no text, beside what rounding activations to bf16 does there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import texts as texts_of
from benchmarks.cpu_decode import packed
from benchmarks.models import program, smollm2
from benchmarks.onnx_quality import outputs
from lwcompile.backends.inductor import packed as operators
from lwcompile.backends.inductor.codegen import in_place
from lwcompile.backends.inductor.lower import lowered
from lwcompile.backends.inductor.products import products
from lwcompile.backends.inductor.ways import BY_PARTS, INT8, Choice
from lwcompile.graph import ModelGraph
from lwcompile.manager import relative_error

WINDOW = 256

Logits = Callable[[Tensor], Tensor]


def given_for(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}


def by_graph(graph: ModelGraph) -> Logits:
    module, names = in_place(graph, {}), [i.name for i in graph.inputs]

    def run(ids: Tensor) -> Tensor:
        given = given_for(ids)
        return module(*[given[name] for name in names])[0][0]

    return run


class InBf16(TorchDispatchMode):
    """The inputs of packed products, rounded to bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.lwcompile.packed_linear.default:
            args = (args[0].bfloat16().float(), *args[1:])
        return func(*args, **(kwargs or {}))


def by_bf16(graph: ModelGraph) -> Logits:
    run = by_graph(lowered(graph, [(product, Choice(BY_PARTS)) for product in products(graph)]))

    def rounded(ids: Tensor) -> Tensor:
        with InBf16():
            return run(ids)

    return rounded


def by_file(path: Path) -> Logits:
    return lambda ids: next(outputs(path, [given_for(ids)]))["logits"][0]


def windows(path: str, count: int) -> list[Tensor]:
    tokenizer = smollm2().tokenizer()
    ids = tokenizer(Path(path).read_text(encoding="utf-8")[: 12 * WINDOW * count], return_tensors="pt").input_ids[0]
    return [ids[None, at : at + WINDOW] for at in range(0, WINDOW * count, WINDOW)]


def divergence(wanted: Tensor, made: Tensor) -> Tensor:
    """KL of each token, in nats."""
    a, b = (F.log_softmax(logits.double(), -1) for logits in (wanted, made))
    return (a.exp() * (a - b)).sum(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    texts_of.arguments(parser)
    options = parser.parse_args()
    dense = program("smollm2")
    small = packed(dense).main
    assert operators.unavailable() is None
    ways = {"ours, int8": by_graph(lowered(small, [(product, Choice(INT8)) for product in products(small)]))}
    if options.file is not None:
        ways["ours in onnxruntime, int8"] = by_file(options.file)
    whole, exact = by_graph(dense.main), by_graph(small)
    print("| text | activations | KL from float32 ones | KL of 4 bits, float32 | with these | most |\n|---|---|---|---|---|---|")
    texts = {name: windows(path, options.windows) for name, path in texts_of.evaluations(options.texts).items()}
    for text, given in {**texts, "ids 5 to 132": [torch.arange(5, 133)[None]]}.items():
        before, wanted = [whole(ids) for ids in given], [exact(ids) for ids in given]
        for name, way in {**ways, "bf16": by_bf16(small)}.items() if text not in texts else ways.items():
            made = [way(ids) for ids in given]
            pairs = [
                torch.cat([divergence(a, b) for a, b in zip(*two)]).mean()
                for two in ((wanted, made), (before, wanted), (before, made))
            ]
            most = max(relative_error(a, b) for a, b in zip(wanted, made))
            print(f"| {text} | {name} | {pairs[0]:.5f} | {pairs[1]:.4f} | {pairs[2]:.4f} | {most:.1%} |", flush=True)


if __name__ == "__main__":
    main()
