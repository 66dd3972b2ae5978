"""An operator of your own: weights as signs, eight to a byte, in a graph that saves, compiles and says who runs it.

    python examples/own_operator.py [--codegen inductor]

`docs/operators.md` says what each step is for, and how a device's own kernel joins in.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import lwcompile as lw
from lwcompile.contract import who_runs
from lwcompile.manager import relative_error
from lwcompile.ops import unpacks
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.tiny import Decoder, token_ids

aten = torch.ops.aten


@torch.library.custom_op("acme::signs", mutates_args=())
def signs(bits: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, 8 * B]: `scale` [N, 1] where a bit of `bits` uint8 [N, B] is set, minus that where it is not."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (((bits[..., None] >> places) & 1).flatten(1) * 2.0 - 1) * scale


@signs.register_fake
def _(bits: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((bits.shape[0], 8 * bits.shape[1]))


unpacks(torch.ops.acme.signs.default)  # it makes a weight of stored tensors and reads nothing else


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    places = 2 ** torch.arange(8)
    return ((weight > 0).unflatten(1, (-1, 8)) * places).sum(-1).to(torch.uint8), weight.abs().mean(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codegen", default="eager")
    given = parser.parse_args()

    torch.manual_seed(0)
    ids = token_ids(2, 9)
    program = lw.capture(Decoder().eval(), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
    graph, before = program.main, program.main.nbytes()

    bits, scale = packed(torch.randn(4, 16))
    torch.library.opcheck(signs, (bits, scale))
    print("opcheck: clean")

    for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
        name = str(node.args[1].target)
        bits, scale = packed(graph.tensor(name))
        with graph.graph.inserting_before(node):
            stored = graph.get_attr(f"{name}_bits", bits), graph.get_attr(f"{name}_scale", scale)
            node.update_arg(1, graph.graph.call_function(torch.ops.acme.signs.default, stored))
    graph.prune()
    graph.propagate()
    print(f"level {graph.level()}: {before} bytes -> {graph.nbytes()}")

    wanted = graph.module()(ids)[0]
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder))
        found = Program.load(Path(folder)).main.module()(ids)[0]
    print(f"saved and loaded: {relative_error(wanted, found):.1g}")

    compiled = torch.compile(graph.module(), backend="layerwise", dynamic=True, options={"codegen": given.codegen})
    with torch.no_grad():
        print(f"compiled: {relative_error(wanted, compiled(ids)[0]):.1g}")
    for line in who_runs(graph, make("codegens", given.codegen).executors(graph)):
        print(f"  {line}")


if __name__ == "__main__":
    main()
