"""The device table: what pieces of work take on this machine, measured once and remembered in a file in the user's cache.

    <cache>/timings.json    {"AMD EPYC, AVX2, torch 2.13.0, 1 thread: packed 576x576, 4 bits, ...": 2.7e-05, ...}

Whoever measures says in the key what the time depends on beside the machine. A file that is damaged, or cannot be written, costs
measuring again and nothing else.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from lwcompile.demo import cache_root
from lwcompile.errors import BadInput
from lwcompile.rundir import write_atomic

log = logging.getLogger("lwcompile")


class DeviceTable:
    """Seconds by key, for the machine, torch and number of threads at hand."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = cache_root() / "timings.json" if path is None else path
        self.seconds = self._read()

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The seconds kept under `key`, or what `measure` gives, which is then kept."""
        full = f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads: {key}"
        if full not in self.seconds:
            self.seconds[full] = measure()
            self._write()
        return self.seconds[full]

    def _read(self) -> dict[str, float]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.info("the device table %s is measured again: %s", self.path, error)
            return {}

    def _write(self) -> None:
        self.seconds = self._read() | self.seconds  # others may have written meanwhile
        try:
            write_atomic(self.path, json.dumps(self.seconds, indent=1, sort_keys=True).encode())
        except BadInput as error:
            log.info("the device table is not kept: %s", error)


@cache
def machine() -> str:
    """The processor's name, and which of its vector instructions torch uses."""
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def least_seconds(call: Callable[[], object], budget: float = 0.02) -> float:
    """The least time of one call, after one to warm up, over at least two calls and for about `budget` seconds."""
    call()
    times: list[float] = []
    ends = time.perf_counter() + budget
    while len(times) < 2 or time.perf_counter() < ends:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
