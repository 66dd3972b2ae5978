"""Block sizes by device, and the launch itself. Tables are JSON files in `tuning/`; a device is asked for its kind at its first
launch, never at import.

A table maps a kernel to rules, read in order: the first whose limits (`m`, `n`, `k`, `bits`: at most) hold gives the block sizes.
`gemv`, `matmul` and `gated` may also say how: a rule with STAGES is for `gemv_kernel` (one row only), one with PARTS for `few_kernel`
(a few rows), one with WARPS for `several_kernel`, one with DENSE widens the weight and leaves the product to cuBLAS, all others
are for `matmul_kernel`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parent.parent / "tuning"
LIMITS = ("m", "n", "k", "bits")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def table_of(name: str) -> dict[str, list[dict[str, int]]]:
    """The table of a kind of device ("sm_90"), over the default one; the default for kinds without one."""
    path = TABLES / f"{name}.json"
    own = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else {}
    return own if name == "default" else {**table_of("default"), **own}


@cache
def kind_of(device: torch.device) -> str:
    """The name of a device's table."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def rule_for(table: Mapping[str, list[dict[str, int]]], kernel: str, **sizes: int) -> dict[str, int]:
    """The block sizes, warps and stages of the first rule that fits; tables end with a rule that always does."""
    for rule in table[kernel]:
        if all(sizes[limit] <= rule[limit] for limit in LIMITS if limit in rule):
            return {name: value for name, value in rule.items() if name not in LIMITS}
    raise KeyError(f"no rule of {kernel} fits {sizes}")


@lru_cache(maxsize=4096)  # scanning rules takes as long as a short kernel runs; what changes a table clears this
def config_for(kernel: str, device: torch.device, m: int, n: int, k: int, bits: int = 16) -> dict[str, int]:
    """The first rule that fits in the device's table; the dict is shared by all calls of these sizes."""
    return rule_for(table_of(kind_of(device)), kernel, m=m, n=n, k=k, bits=bits)


def launch(kernel: Any, grid: tuple[int, ...], config: Mapping[str, int], *args: Any, **constants: Any) -> None:
    """Run a kernel, whose first argument is a tensor, on that tensor's device; `config` holds its block sizes with `num_warps` and
    `num_stages`, `constants` its other compile-time values.
    """
    device = args[0].device
    if device.type != "cuda":
        if not INTERPRETED:
            raise RuntimeError("these kernels run on a GPU, or anywhere with TRITON_INTERPRET=1 set before Python starts")
        kernel[grid](*args, **constants, **config)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, config, *args, **constants)
        return
    kernel[grid](*args, **constants, **config, enable_fp_fusion=True)  # newer versions of triton leave it off


# triton's own functions for these take microseconds on the host, since kernels call them too.


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that is no less than `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()
