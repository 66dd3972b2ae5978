"""The interpreter: runs a program's calls in order, from any position to any other, and frees values after their last use.

Passes need more than a module's `forward`: the inputs of a layer, gradients at it, outputs after an edit without paying
for what comes before it. All of these are one loop over the calls (`Executor.advance`) with a dictionary of live values.

Entries of a program run one after another, linked: an input `encoder_hidden_states` that the sample lacks is the first
output of the entry `encoder`, and `encoder_attention_mask` that entry's input `attention_mask`.

Values are keyed by node names, with `entry/` before where there are several entries. `ModelGraph.copy` keeps names, which
is what makes values of one program usable in an edited copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.errors import BadInput, InternalError
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.site import Site

Values = dict[str, Any]
Tap = Callable[[Any], Any]

CONSTANTS_LIMIT = 8 << 30
"""Bytes of tensors read from disk, moved or dequantized that an executor keeps; past it they are made anew per use."""


@dataclass
class Step:
    """One call, or the link of an entry's input to an earlier entry's value (`source`)."""

    key: str
    node: fx.Node
    graph: ModelGraph
    source: str | None = None
    last_uses: list[str] = field(default_factory=list)


class Executor:
    """Runs a program or a single graph. Arithmetic on stored tensors alone, such as dequantizing, happens once."""

    def __init__(self, program: Program | ModelGraph, device: str | torch.device = "cpu") -> None:
        entries = {"forward": program} if isinstance(program, ModelGraph) else program.entries
        self.device = torch.device(device)
        self.calls = 0
        self.steps: list[Step] = []
        self.outputs: dict[str, str | fx.Node | None] = {}
        self._keys: dict[fx.Node, str] = {}
        self._entries = entries
        self._constant: dict[fx.Node, ModelGraph] = {}
        self._held: dict[Any, Tensor] = {}
        self._held_bytes = 0
        self._inputs: dict[str, str] = {}
        seen: dict[str, tuple[dict[str, str], str]] = {}  # entry -> its inputs' keys, the key of its first output
        for entry, graph in entries.items():
            prefix = f"{entry}/" if len(entries) > 1 else ""
            inputs = self._add(graph, prefix, seen)
            values = list(graph.output_node.args[0])  # type: ignore[arg-type,call-overload]
            self.outputs = {name: self._keys.get(value, value) for name, value in zip(graph.outputs, values)}
            seen[entry] = inputs, next(iter(self.outputs.values()), "")  # type: ignore[assignment]
        self.index = {step.key: i for i, step in enumerate(self.steps)}
        self._find_last_uses()

    def _add(self, graph: ModelGraph, prefix: str, earlier: Mapping[str, tuple[dict[str, str], str]]) -> dict[str, str]:
        inputs: dict[str, str] = {}
        for node in graph.graph.nodes:
            key = prefix + node.name
            sources = node.all_input_nodes
            if node.op == "placeholder":
                self._keys[node] = inputs[str(node.target)] = key
                self._inputs[key] = str(node.target)
                if (source := _link(str(node.target), earlier)) is not None:
                    self.steps.append(Step(key, node, graph, source))
            elif node.op == "get_attr" or (sources and all(s in self._constant for s in sources) and node.op == "call_function"):
                self._constant[node] = graph
            elif node.op == "call_function":
                self._keys[node] = key
                self.steps.append(Step(key, node, graph))
        return inputs

    def _find_last_uses(self) -> None:
        seen = {value for value in self.outputs.values() if isinstance(value, str)}
        for step in reversed(self.steps):
            for key in [*self.reads(step), step.key]:
                if key not in seen:
                    seen.add(key)
                    step.last_uses.append(key)

    # --- reading

    def reads(self, step: Step) -> list[str]:
        """The keys of the values that a step reads; stored tensors are none."""
        if step.source is not None:
            return [step.source]
        return [self._keys[n] for n in step.node.all_input_nodes if n in self._keys]

    def key(self, site: Site) -> str:
        """The key of a site's main node."""
        return site.node if site.node in self.index else f"{site.entry}/{site.node}"

    def position(self, key: str) -> int:
        if key not in self.index:
            raise InternalError(f"the program has no call named {key!r}")
        return self.index[key]

    def input_of(self, key: str) -> str:
        """The key of what a layer is fed: the first argument of its call that is not a stored tensor."""
        return self.reads(self.steps[self.position(key)])[0]

    def constant_input(self, site: Site) -> Tensor | None:
        """What a layer is fed that reads stored tensors alone, such as one over relative positions, and is no step; else None."""
        graph = self._entries.get(site.entry)
        calls = (n for n, g in self._constant.items() if n.name == site.node and g is graph and n.op == "call_function")
        call = next(calls, None)
        return None if call is None else self.constant(call.args[0])  # type: ignore[arg-type]

    def inputs(self) -> list[str]:
        """Names of the inputs that a sample must give: all but those an earlier entry feeds."""
        fed = {step.key for step in self.steps if step.source is not None}
        return list(dict.fromkeys(name for key, name in self._inputs.items() if key not in fed))

    def needed(self, position: int) -> set[str]:
        """Keys of the values that the steps from `position` on, and the outputs, need from before it."""
        made: set[str] = set()
        needs = set()
        for step in self.steps[position:]:
            needs.update(key for key in self.reads(step) if key not in made)
            made.add(step.key)
        return needs | {key for key in self.outputs.values() if isinstance(key, str) and key not in made}

    def constant(self, node: fx.Node) -> Tensor:
        """The value of a stored tensor or of arithmetic on stored tensors, on the device."""
        graph = self._constant[node]
        token: Any = node if node.op == "call_function" else graph.tensors[str(node.target)]
        if token in self._held:
            return self._held[token]
        if node.op == "get_attr":
            value = graph.store[token].to(self.device)
        else:
            with torch.no_grad():
                value = self._call(node, self.constant)
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        if self._held_bytes + size <= CONSTANTS_LIMIT:
            self._held[token], self._held_bytes = value, self._held_bytes + size
        return value

    def release(self) -> None:
        """Let go of the constants held. Graphs are cyclic, so without this they wait for the garbage collector."""
        self._held.clear()
        self._held_bytes = 0

    def signature(self, step: Step) -> Any:
        """What a step computes and from what: equal in two programs only where the values are equal."""
        args = fx.map_arg((step.node.args, step.node.kwargs), self._signature)
        return step.key, step.source, step.node.target, args

    def _signature(self, node: fx.Node) -> Any:
        if node in self._keys:
            return self._keys[node]
        if node.op == "get_attr":
            return f"stored {self._constant[node].tensors[str(node.target)]}"
        return f"{node.target} {fx.map_arg((node.args, node.kwargs), self._signature)}"

    # --- running

    def start(self, inputs: Mapping[str, Tensor]) -> Values:
        """The live values before the first step."""
        fed = {step.key for step in self.steps if step.source is not None}
        missing = [name for key, name in self._inputs.items() if name not in inputs and key not in fed]
        if missing:
            raise BadInput(f"the model takes {', '.join(missing)}, and the sample gives {', '.join(inputs)}")
        return {key: inputs[name].to(self.device) for key, name in self._inputs.items() if name in inputs}

    def advance(self, values: Values, start: int = 0, stop: int | None = None, taps: Mapping[str, Tap] | None = None) -> Values:
        """Run steps [start, stop) on `values`, in place. taps: key -> function that sees the value and returns it, or another."""
        taps = taps or {}
        for step in self.steps[start:stop]:
            if step.source is not None:
                value = values.get(step.key, values.get(step.source))
            else:
                value = self._call(step.node, lambda n: self._value(n, values))
                self.calls += 1
            values[step.key] = taps[step.key](value) if step.key in taps else value
            for key in step.last_uses:
                values.pop(key, None)
        return values

    def _call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """What a call makes. Graphs are captured on the CPU: what they make anew is made on the device that runs them."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if "device" in kwargs or _makes_anew(node.target):
            kwargs = {**kwargs, "device": self.device}
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, node: fx.Node, values: Values) -> Any:
        if node in self._constant:
            return self.constant(node)
        return values[self._keys[node]]

    def results(self, values: Values) -> dict[str, Tensor]:
        """The outputs of the last entry by name, once every step has run."""
        found: dict[str, Any] = {}
        for name, output in self.outputs.items():
            found[name] = self.constant(output) if isinstance(output, fx.Node) else values[output] if output else None
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def run(
        self, inputs: Mapping[str, Tensor], watch: Collection[str] = (), taps: Mapping[str, Tap] | None = None
    ) -> dict[str, Tensor]:
        """The outputs by name, and the watched values by key."""
        seen: dict[str, Tensor] = {}
        taps = {**(taps or {}), **{key: _recorder(seen, key) for key in watch}}
        for key in watch:
            self.position(key)
        return {**self.results(self.advance(self.start(inputs), taps=taps)), **seen}


def _recorder(seen: dict[str, Tensor], key: str) -> Tap:
    def record(value: Tensor) -> Tensor:
        seen[key] = value
        return value

    return record


@cache
def _makes_anew(target: Any) -> bool:
    """Whether an operator makes a tensor from none, such as `arange`."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    arguments = target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def _link(name: str, earlier: Mapping[str, tuple[dict[str, str], str]]) -> str | None:
    for entry, (inputs, output) in earlier.items():
        if name.startswith(f"{entry}_"):
            return inputs.get(name.removeprefix(f"{entry}_"), output)
    return None


@torch.no_grad()
def run(program: Program | ModelGraph, inputs: Mapping[str, Tensor], watch: Collection[str] = ()) -> dict[str, Tensor]:
    """One run without gradients: outputs by name, and the values of the watched nodes by key."""
    return Executor(program).run(inputs, watch)
