"""Whether things are still what they were, hundreds of them at a time: places in dictionaries, classes of objects, tensors.

By C++ (still.cpp) once that is built, which is done beside the calls; until then, and where there is no compiler, by functions of
Python's that loop in C. Where Python counts writes to dictionaries (to 3.12), a dictionary that was not written to is not looked into.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain, repeat
from operator import attrgetter, is_
from pathlib import Path
from typing import Any

from torch import Tensor

from lwcompile.backends.inductor import native

SOURCE = Path(__file__).with_name("still.cpp"), "-lc10"

Place = tuple[dict[Any, Any], Any]
"""A dictionary, and a key of it."""

MANY = 200
"""Of these and more, C++ looks at them: fewer are not worth a library, which the first to need it waits for when it ends."""

NOTHING = object()
"""What lies where no such key is."""

_version, _implementation = attrgetter("_version"), attrgetter("_cdata")


class Places:
    """What lies at some places."""

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self.holders: list[dict[Any, Any]] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self._known: set[tuple[int, Any]] = set()
        self._table: Any = None
        self._tags: Any = None
        for place in places:
            self.add(*place)

    def add(self, holder: dict[Any, Any], key: Any) -> bool:
        """Look at this place too; False if that was so already."""
        if (id(holder), key) in self._known:
            return False
        self._known.add((id(holder), key))
        self.holders.append(holder)
        self.keys.append(key)
        self.values.append(holder.get(key, NOTHING))
        self._table = None
        return True

    def now(self) -> list[Any]:
        """What lies there now."""
        return [*map(dict.get, self.holders, self.keys, repeat(NOTHING))]

    def same(self) -> bool:
        if (look := _looks("places", len(self.keys))) is None:
            return all(map(is_, map(dict.get, self.holders, self.keys, repeat(NOTHING)), self.values))
        if self._table is None:
            there = (0 if value is NOTHING else id(value) for value in self.values)
            self._table = _table(map(id, self.holders), map(id, self.keys), there)
            dicts = {id(holder) for holder in self.holders}
            self._tags = _table(dicts, repeat(0, len(dicts)))
        if (tags := _looks("tags", len(self.keys))) is not None and tags(self._tags, len(self._tags) // 2):
            return True  # none of the dictionaries was written to
        if not look(self._table, len(self.keys)):
            return False
        if (tag := _looks("tag", len(self.keys))) is not None:
            tag(self._tags, len(self._tags) // 2)
        return True

    def take(self, values: Sequence[Any]) -> None:
        """From now on these are what lies there."""
        self.values, self._table = list(values), None


class Typed:
    """Of which classes some objects are."""

    def __init__(self) -> None:
        self.objects: list[object] = []
        self.classes: list[type] = []
        self._table: Any = None

    def add(self, of: object) -> None:
        self.objects.append(of)
        self.classes.append(type(of))
        self._table = None

    def same(self) -> bool:
        if (look := _looks("types", len(self.objects))) is None:
            return [*map(type, self.objects)] == self.classes
        if self._table is None:
            self._table = _table(map(id, self.objects), map(id, self.classes))
        return look(self._table, len(self.objects))


class Unwritten:
    """Tensors, how often torch counted that they were written to, and where they lie."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.implementations = [*map(_implementation, tensors)]
        self.versions, self.addresses = [*map(_version, tensors)], [*map(Tensor.data_ptr, tensors)]
        self._table: Any = None

    def same(self) -> bool:
        if (look := _looks("tensors", len(self.tensors))) is None:
            return [*map(_version, self.tensors)] == self.versions and [*map(Tensor.data_ptr, self.tensors)] == self.addresses
        if self._table is None:
            self._table = _table(self.implementations, self.versions, self.addresses)
        if [*map(_implementation, self.tensors)] != self.implementations:  # swap_tensors: what the table names may be gone
            return False
        return look(self._table, len(self.tensors))


def _table(*columns: Iterable[int]) -> Any:
    """Rows of machine words."""
    words = list(chain.from_iterable(zip(*columns, strict=True)))
    return (ctypes.c_int64 * len(words))(*words)


_found: dict[str, Callable[[Any, int], bool]] = {}


def _looks(what: str, count: int) -> Callable[[Any, int], bool] | None:
    """The function of C++ that looks at so many; None where it is not worth it, or not there, or not yet."""
    if count < MANY:
        return None
    if not _found and native.beside(*SOURCE) is None:
        _found.update(_functions())
    return _found.get(what)


@cache
def _functions() -> dict[str, Any]:
    library = ctypes.PyDLL(str(native.library(SOURCE[0])))  # whose functions hold Python's lock
    found = {what: getattr(library, f"lwcompile_{what}") for what in ("places", "types", "tensors", "tags", "tag")}
    for function in found.values():
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_bool
    if not _counted(found["tags"], found["tag"]):
        del found["tags"], found["tag"]
    return found


def _counted(tags: Callable[[Any, int], bool], tag: Callable[[Any, int], bool]) -> bool:
    """Whether this Python counts writes to dictionaries, where `Dict` has it."""
    tried: dict[Any, Any] = {"a": 1}
    writes: list[Callable[[], object]] = [
        lambda: tried.update(a=2), lambda: tried.__setitem__("b", 1), lambda: tried.pop("a"), lambda: tried.setdefault("c"), tried.popitem,
        lambda: tried.__delitem__("b"), tried.clear, lambda: tried.__ior__({"d": 1}), lambda: exec("e = 1", tried),
    ]  # fmt: skip
    table = _table([id(tried)], [0])
    for write in writes:
        tag(table, 1)
        quiet = tags(table, 1) and tried.get("a") is not tried and tags(table, 1)
        write()
        if not quiet or tags(table, 1):
            return False
    owner = type("Owner", (), {})()
    table = _table([id(owner.__dict__)], [0])
    for value in range(100):  # after some, Python writes attributes in another way
        tag(table, 1)
        owner.a = value
        if tags(table, 1):
            return False
    return True
