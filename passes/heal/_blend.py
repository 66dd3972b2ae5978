"""What a plan froze, on its way there: each reader reads share * (what stands there now) + (1 - share) * (what stood there)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lwcompile.context import Context
from lwcompile.former import formers
from lwcompile.program import Program


@dataclass(eq=False)
class Between:
    """The call that stands between the two. At 0 and at 1 it is one of them, to the bit."""

    value: Callable[[Tensor], Tensor]
    share: float = 1.0

    def __call__(self, now: Tensor, read: Tensor) -> Tensor:
        if self.share == 1:
            return now
        former = self.value(read)
        return former if self.share == 0 else former + self.share * (now - former)


class Blend:
    """`program`: a copy of the given one with its formers (`lwcompile.former`) blended in. Nodes and tensors keep their names."""

    def __init__(self, program: Program, over: int = 0, ctx: Context | None = None) -> None:
        """over: the steps in which the parts go all the way; 0: they are there from the start."""
        self.program, self.over, self.parts = program.copy(), over, list[Between]()
        for graph in self.program.entries.values():
            for former, now, readers in list(formers(graph)):
                made = Between(former.value)
                with graph.graph.inserting_before(min(readers)):
                    read = graph.node(former.read)
                    node = graph.graph.create_node("call_function", made, (now, read), name=f"{former.name}_between")
                for reader in readers:
                    reader.replace_input_with(now, node)
                self.parts.append(made)

        if over and not self.parts and ctx is not None:
            ctx.note("blend", "", "there is nothing to blend: no norm was frozen in this run")

    def at(self, step: int) -> None:
        """Be as far as after so many steps."""
        self.set(min(1.0, step / self.over) if self.over else 1.0)

    def set(self, share: float) -> None:
        """Of the way to go, all parts together."""
        for part in self.parts:
            part.share = share
