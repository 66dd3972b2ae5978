"""What one call of compiled code did, in an order that C++ can follow: kernels by their addresses, operators by their names.

Arguments are named by the memory that they lie in: what is stored, an input, what an operator returned, or else a buffer that the
code made for itself, which the tape keeps for all calls (but for buffers that leave a call as its outputs).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lwcompile.backends.inductor.libraries import is_kernel, library_of

SOURCE = Path(__file__).with_name("tape.cpp")

LIMIT, INPUTS = 64 << 20, 1 << 30
"""Bytes of buffers and outputs past which a tape is not kept, since calls that fill as many take longer than Python does; and of inputs
(caches), which are copied once to prove it."""

INTO = "into"
"""The overload of an operator that takes its result to write into, as its first argument: that is then a buffer like those of kernels."""

SMALL = 1 << 16
"""Bytes of a result up to which that is worth it. Larger ones take longer to fill than to allocate, and lie better where another was."""

KERNELS = "cpp_"
"""How Inductor's names of compiled kernels begin."""


class Tape(TorchDispatchMode):
    """What one call did. Where something is not understood, the call goes on as it was and `refused` says why."""

    def __init__(self, stored: Sequence[Tensor], inputs: Sequence[Any]) -> None:
        super().__init__()
        self.refused: str | None = None
        self.thread = threading.get_ident()
        self.kernels = self.operators = 0
        self.homes: dict[int, tuple[int, Tensor]] = {}  # memory -> the slot and the tensor by which it was met first
        self.buffers: dict[int, Tensor] = {}  # slot -> what all calls share
        self.views: dict[tuple[Any, ...], int] = {}
        self.alive: list[Any] = []  # so that no memory is met twice as another
        self.outputs: list[int] = []
        self.result: list[int | None] = []
        values = [*stored, *inputs]
        if not all(type(v) in (Tensor, Parameter) and v.is_cpu and v.layout is torch.strided for v in values):
            self.refused = "not all that it takes are tensors on the processor"
            return
        if (nbytes := sum(v.nbytes for v in inputs)) > INPUTS:
            self.refused = f"its inputs take {nbytes / 2**20:.0f} MB"
            return
        self.made = torch.classes.lwcompile.Tape(list(stored), list(inputs))  # type: ignore[attr-defined]
        for slot, value in enumerate(values):
            if slot >= len(stored) and _memory(value) in self.homes:
                self.refused = "two of its inputs share memory"
            self.homes.setdefault(_memory(value), (slot, value))

    def __str__(self) -> str:
        return f"{self.kernels} kernels, {self.operators} operators, {self.nbytes / 2**20:.1f} MB of buffers"

    @property
    def nbytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers.values())

    def record(self, call: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        with _kernels_seen_by(self), self:
            made = call()
        self._note(partial(self._finish, made))
        nbytes = self.nbytes + sum(value.nbytes for value in made if isinstance(value, Tensor))
        if self.refused is None and nbytes > LIMIT:
            self.refused = f"its buffers and outputs take {nbytes / 2**20:.0f} MB"
        self.alive.clear()
        self.homes.clear()
        self.views.clear()
        return made

    def run(self, inputs: Sequence[Tensor]) -> list[Any] | None:
        """The call again; None if it cannot take these."""
        found = self.made.run(inputs, self.outputs)
        if len(found) != len(self.outputs):
            return None
        return [None if at is None else found[at] for at in self.result]

    def spoil(self) -> None:
        """Put into the buffers that calls share what none of them computes: NaN, or the opposite of what the last one left."""
        constants = {_memory(v) for module in _modules() for v in vars(module).values() if isinstance(v, Tensor)}
        for buffer in self.buffers.values():
            if _memory(buffer) in constants:
                continue
            memory = torch.empty(0, dtype=buffer.dtype).set_(buffer.untyped_storage())
            if buffer.is_floating_point() or buffer.is_complex():
                memory.fill_(float("nan"))
            else:
                torch.bitwise_not(memory, out=memory)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._note(partial(self._operator, func, args, kwargs or {}, made))
        return made

    def kernel(self, function: Any, *args: Any) -> None:
        function(*args)
        if threading.get_ident() == self.thread:
            self._note(partial(self._kernel, function, args))

    def _note(self, what: Callable[[], None]) -> None:
        """Nothing here may stop the call."""
        if self.refused is not None:
            return
        try:
            what()
        except Exception as error:  # what torch raises for values that it has no type for
            self.refused = f"it cannot be recorded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"

    def _operator(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> None:
        results = list(made) if isinstance(made, tuple | list) else [made]
        if not all(isinstance(r, Tensor) for r in results):
            self.refused = f"{func} gives something else than tensors"
            return
        new = [_memory(r) not in self.homes for r in results]
        if not any(new) and not func._schema.is_mutable:
            return  # a view, which is made where it is used
        slots, given = [], []
        for value in _bound(func._schema, args, kwargs):
            if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
                self.refused = f"{func} takes a list of tensors"
                return
            slots.append(self._slot(value) if isinstance(value, Tensor) else -1)
            given.append(None if isinstance(value, Tensor) else "[]" if isinstance(value, list | tuple) and not value else value)
        self.operators += 1
        if INTO in func.overloadpacket.overloads() and new == [True] and results[0].nbytes <= SMALL:
            slots, given = [self._home(results[0])[0], *slots], [None, *given]
            self.made.operation(func._schema.name, INTO, given, slots, [], [])
            return
        made_in = self.made.operation(func._schema.name, func._schema.overload_name, given, slots, results, new)
        for result, slot in zip(results, made_in):
            if slot >= 0:
                self.homes[_memory(result)] = (slot, result)
        self.alive += results

    def _kernel(self, function: Any, args: Sequence[Any]) -> None:
        slots, numbers = [], []
        for arg in args:
            if isinstance(arg, Tensor):
                slot, first = self._home(arg)
                slots.append(slot)
                numbers.append(arg.data_ptr() - first.data_ptr())
            elif isinstance(arg, int):
                slots.append(-1)
                numbers.append(arg)
            else:
                self.refused = f"a kernel takes {type(arg).__name__}"
                return
        self.kernels += 1
        self.made.kernel(_address(str(library_of(function))), slots, numbers)

    def _home(self, tensor: Tensor) -> tuple[int, Tensor]:
        """The slot of its memory, and the tensor which that slot holds: memory that nobody gave or made is a buffer of the code's own."""
        if _memory(tensor) not in self.homes:
            slot = self.made.keep(tensor)
            self.buffers[slot] = tensor
            self.homes[_memory(tensor)] = (slot, tensor)
        return self.homes[_memory(tensor)]

    def _slot(self, tensor: Tensor) -> int:
        slot, first = self._home(tensor)
        form = (slot, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if form == (slot, first.storage_offset(), first.shape, first.stride(), first.dtype):
            return slot
        if tensor.dtype is not first.dtype:
            self.refused = "memory is read as two types"
            return slot
        if form not in self.views:
            self.views[form] = self.made.view(slot, tensor, tensor.storage_offset() - first.storage_offset())
        return self.views[form]

    def _finish(self, made: Sequence[Any]) -> None:
        for value in made:
            if value is not None and not isinstance(value, Tensor):
                self.refused = "it gives something else than tensors"
                return
            self.result.append(None if value is None else len(self.outputs))
            if value is not None:
                self.outputs.append(self._slot(value))
        for slot in {self._home(v)[0] for v in made if v is not None} & set(self.buffers):
            self.made.renew(slot)
            del self.buffers[slot]
        self.made.seal(list(self.buffers))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bound(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The value of every argument of an operator, in order."""
    rest = schema.arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]


@cache
def _address(library: str) -> int:
    found = ctypes.cast(ctypes.CDLL(library).kernel, ctypes.c_void_p).value
    assert found is not None
    return found


def _modules() -> list[Any]:
    """What Inductor generated in this process."""
    from torch._inductor.codecache import PyCodeCache

    return list(PyCodeCache.modules)


@contextmanager
def _kernels_seen_by(tape: Tape) -> Iterator[None]:
    """Every compiled kernel's calls pass by the tape. Kernels that are called in another way are none that it could follow."""
    named = [(vars(m), name, value) for m in _modules() for name, value in vars(m).items() if name.startswith(KERNELS)]
    found = [(names, name, value) for names, name, value in named if is_kernel(value)]
    if len(found) < len(named):
        tape.refused = "this version of torch calls kernels in a way that is not known"
    for names, name, value in found:
        names[name] = partial(tape.kernel, value)
    try:
        yield
    finally:
        for names, name, value in found:
            names[name] = value
