"""Registers, spilled bytes and shared memory of every Triton kernel, compiled for real GPUs on a machine without one.

python -m benchmarks.triton_aot --bits 2 3 4 5 6 8
"""

from __future__ import annotations

import argparse
import logging
import warnings

TARGETS = {80: "sm_80", 90: "sm_90", 100: "sm_100"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from lwcompile.backends.triton.aot import table

    rows = table(given.targets, given.bits)
    print("registers and bytes spilled a thread, KiB of shared memory a program\n")
    print("| kernel |" + "".join(f" {TARGETS.get(t, f'sm_{t}')} |" for t in given.targets))
    print("|---|" + "---|" * len(given.targets))
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.target: row for row in rows if row.case == case}
        cells = (f"{r.registers}, {r.spilled}, {r.shared / 1024:.1f}" if r else "" for r in map(found.get, given.targets))
        print(f"| {case} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
