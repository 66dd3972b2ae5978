"""What a pass is tried in: a report of clauses, and a run's context made of random samples, plain prices and every option."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import Backend, Pass, StoredTensor, TransformPass
from lwcompile.data import CalibrationSet, load_dataset
from lwcompile.errors import LwError, Refused, VerificationError
from lwcompile.executor import Executor
from lwcompile.metric import default_metric
from lwcompile.program import Program
from lwcompile.registry import make, plugins
from lwcompile.spec import Spec
from lwcompile.structure import Structure
from lwcompile.tiny import token_ids

SEED = 0


class Report:
    """Lines for clauses that hold; a clause that does not raises with its name."""

    def __init__(self, given: Pass | type[Pass]) -> None:
        self.cls = given if isinstance(given, type) else type(given)
        self.lines: list[str] = []

    @contextmanager
    def clause(self, name: str, holds: str = "") -> Iterator[None]:
        """Whatever is raised inside breaks the clause `name`; if nothing is, `holds` goes into the report."""
        label = getattr(self.cls, "name", self.cls.__name__)
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, LwError | Broken) else f"{type(error).__name__}: "
            raise VerificationError(f"{label} breaks the clause {name!r}: {kind}{error}") from error
        if holds:
            self.lines.append(f"{name}: {holds}")


class Broken(Exception):
    """A clause that does not hold; `Report.clause` says which."""


def require(holds: object, reason: str) -> None:
    if not holds:
        raise Broken(reason)


@dataclass(frozen=True)
class Plain(Backend):
    """Prices what is stored and nothing else, so that analyses that ask for bytes get some."""

    name: ClassVar[str] = "plain"

    def price(self, tensor: StoredTensor) -> int:
        if tensor.format is not None:
            return tensor.format.stored_bytes(tensor.shape)
        return math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize


class Memory:
    """A run directory in memory; results go through JSON, as they do on disk."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return json.loads(self.texts[key]) if key in self.texts else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        self.texts[key] = json.dumps(value)

    def get_tensors(self, key: str) -> dict[str, Tensor] | None:
        return self.tensors.get(key)

    def put_tensors(self, key: str, value: dict[str, Tensor]) -> None:
        self.tensors[key] = value


def calibration(program: Program, rows: int = 8, length: int = 12, seed: int = SEED) -> CalibrationSet:
    wanted = Executor(program).inputs()
    if wanted == ["input_ids"]:
        return CalibrationSet({"input_ids": token_ids(rows, length, seed)}, "random", "random")
    examples = {i.name: graph.example(i.name) for graph in program.entries.values() for i in graph.inputs}
    return load_dataset("random", samples=rows, seed=seed, examples={k: v for k, v in examples.items() if k in wanted})


def context(program: Program, structure: Structure, rundir: Memory | None = None) -> Context:
    """What a run gives a pass: samples, a metric, prices, and every installed transform on offer at its default options."""
    metric = default_metric("logits" if "logits" in program.main.outputs else "features")
    ctx = Context(calibration=calibration(program), metric=metric, backend=Plain(), structure=structure, program=program)
    ctx.rundir, ctx.seed = rundir, SEED
    return ctx


def offers(program: Program, structure: Structure) -> Mapping[str, list[Spec]]:
    offered: dict[str, list[Spec]] = defaultdict(list)
    for plugin in plugins("passes"):
        try:
            transform = make("passes", Spec(plugin.name))
        except LwError:  # a plugin that is broken, or that needs options, offers nothing here
            continue
        for site in transform.sites(structure.sites.values()) if isinstance(transform, TransformPass) else ():
            try:
                transform.check(program.entries[site.entry], site)
            except Refused:
                continue
            offered[site.id].append(transform.spec())
    return offered


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Another state of torch's global generator, which a pass must not depend on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
