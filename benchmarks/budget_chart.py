"""Damage by size, drawn from the rows that `benchmarks.budget --out` wrote.

    python -m benchmarks.budget_chart benchmarks/h100/budget.jsonl docs/budget.svg

It needs matplotlib: `pip install matplotlib`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lwcompile.budget import parse_size

WAYS = {
    "drops on a 4-bit base": ("sublayers dropped, 4 bits", "tab:gray"),
    "quantization only": ("numeric formats alone", "tab:orange"),
    "all together": ("everything in one table", "tab:blue"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path, help="an .svg or .png file")
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the chart needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "budget", "svg.fonttype": "none"}
    )  # the same rows, the same bytes; letters as text
    from matplotlib import pyplot

    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for case, (label, color) in WAYS.items():
        mine = sorted((parse_size(row["size"]) / 1e6, row["damage"], row["healed"]) for row in rows if row["case"] == case)
        sizes = [size for size, _, _ in mine]
        after = [next(iter(healed.values())) for _, _, healed in mine]
        axes.plot(sizes, [damage["mean"] for _, damage, _ in mine], "o:", color=color, alpha=0.5, markersize=4)
        axes.plot(sizes, [damage["mean"] for damage in after], "o-", color=color, label=label)
        axes.fill_between(sizes, [d["low"] for d in after], [d["high"] for d in after], color=color, alpha=0.2, linewidth=0)
    axes.plot([], [], "o:", color="black", alpha=0.5, markersize=4, label="before healing")
    axes.set(xlabel="stored, MB (dense: 269 MB in bf16)", ylabel="KL from the dense model, nats a token", yscale="log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
