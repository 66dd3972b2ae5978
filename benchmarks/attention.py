"""What each form of attention costs at single layers of SmolLM2, before any healing, and at which length its cache and work pay.

    python -m benchmarks.texts texts && python -m benchmarks.attention --texts texts
    python -m benchmarks.attention --files onnx        # ONNX files instead, timed: dropped, windowed and linear ones beside the dense

Damage is KL to the dense model in nats a token, at windows of 512 tokens of one text that the feature maps have not been fitted on;
one layer is changed at a time, and in the last rows all are. Feature maps are fitted on the Debian Reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import texts as texts_of
from benchmarks.models import program
from lwcompile.attention import attentions_at
from lwcompile.attention_cost import AttentionCost, say
from lwcompile.context import Context
from lwcompile.damage import DamageMeter, Estimate
from lwcompile.data import load_dataset
from lwcompile.decode import derive_decode
from lwcompile.metric import Kl
from lwcompile.prefix import PrefixCache
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.spec import Spec

FORMS = ("window{size=128}", "window{size=64}", "linear{steps=0}", "linear", "drop")
EVERYWHERE = FORMS[:3]
LENGTH = 512


class Trial:
    """Edits of the dense model, measured from their first difference on."""

    def __init__(self, dense: Program, options: argparse.Namespace) -> None:
        self.dense, tokenizer = dense, dense.tokenizer()
        fitted = load_dataset(texts_of.calibration(options.texts), tokenizer=tokenizer, samples=8, seqlen=LENGTH)
        judged = load_dataset(
            texts_of.evaluations(options.texts)[options.text], tokenizer=tokenizer, samples=options.tokens // LENGTH, seqlen=LENGTH,
            order="sequential",
        )  # fmt: skip
        self.ctx = Context(calibration=fitted, program=dense, batch_size=1)
        self.structure = self.ctx.find_structure(dense)
        self.metric = Kl()
        batches = list(judged.batches(1, [i.name for i in dense.main.inputs]))
        self.cache = PrefixCache(dense, batches, keep=lambda outputs, batch: self.metric.keep(outputs, batch, torch.float32))

    def edited(self, form: str, layers: list[int]) -> Program:
        return self.ctx.edited(self.dense, [f"block{i}.attention" for i in layers], [Spec.parse(form)])

    def damage(self, edited: Program) -> Estimate:
        meter = DamageMeter(self.metric, 0)
        for i, outputs in enumerate(self.cache.suffix_outputs(edited)):
            meter.update(self.cache.kept(i), outputs, self.cache.batches[i])
        return meter.result()


def costs(dense: Program, trial_site: Any) -> None:
    a = attentions_at(dense.main, trial_site)[0]
    old = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width)
    for form in ("window{size=128}", "window{size=64}", "linear"):
        made: Any = make("passes", Spec.parse(form))
        window = getattr(made, "size", None) or made.window
        features = 2 * a.key_width if made.name == "linear" else 0
        new = dataclasses.replace(old, window=window, sinks=getattr(made, "sinks", 0), features=features)
        print(f"{form:18} {say(new, old)[0]}")


def by_layer(options: argparse.Namespace) -> list[dict[str, Any]]:
    dense, rows = program("smollm2"), []
    trial = Trial(dense, options)
    blocks = [site.id for site in trial.structure.of_kind("attention")]
    costs(dense, trial.structure.sites[blocks[0]])
    for form, layers in [(f, [i]) for i in options.layers for f in FORMS] + [(f, list(range(len(blocks)))) for f in EVERYWHERE]:
        started = time.perf_counter()
        trial.ctx.remarks.clear()
        edited = trial.edited(form, layers)
        found = trial.damage(edited)
        error = trial.ctx.remarks[-1].numbers.get("error") if trial.ctx.remarks else None
        where = str(layers[0]) if len(layers) == 1 else "all"
        rows.append({"layer": where, "form": form, **found.to_json(), "error": error, "seconds": time.perf_counter() - started})
        beside = "" if error is None else f"  output {error:.3f} away"
        print(f"{where:>4} {form:18} {found}  {rows[-1]['seconds']:.1f} s{beside}", flush=True)
    return rows


def files(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill of some tokens, and one token behind as many, run by onnxruntime in float32, beside the dense model in ratios."""
    from lwcompile.backends.onnx.backend import Onnx
    from lwcompile.backends.onnx.runtime import Runtime

    dense, rows = program("smollm2"), []
    ctx = Context(program=dense)
    every = [site.id for site in ctx.find_structure(dense).of_kind("attention")]
    for label, (form, sites) in {
        "softmax": (None, every), "dropped at every third": ("drop", every[1::3]), "window of 128, 4 sinks": ("window{size=128}", every),
        "linear outside 64": ("linear{steps=0}", every),
    }.items():  # fmt: skip
        path = options.files / f"{label.replace(' ', '-').replace(',', '')}.onnx"
        if not path.is_file():
            made = dense if form is None else ctx.edited(dense, sites, [Spec.parse(form)])
            both = dataclasses.replace(made, entries={"forward": made.main, "decode": derive_decode(made.main)})
            print(f"{label}: parity {Onnx().lower(both, path, ctx).worst:.1e}", flush=True)
        if not options.write_only:
            rows.append({"form": label, "ms": {n: Runtime.of(path).speed(n, options.seconds) for n in options.lengths}})
    steps = [(n, kind) for kind in ("prefill", "decode") for n in options.lengths] if rows else []
    for row in rows:
        times, least = ((r["ms"][n][f"{kind}_ms"] for n, kind in steps) for r in (row, rows[0]))
        said = [f"{n} {kind}: {ms:.0f} ms ({before / ms:.2f}x)" for (n, kind), ms, before in zip(steps, times, least)]
        print(f"{row['form']:24} {'  '.join(said)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts_of.arguments(parser)
    parser.add_argument("--text", default="tutorial", choices=texts_of.EVALUATIONS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 7, 14, 21, 28])
    parser.add_argument("--files", type=Path, help="write ONNX files into this folder and time them, instead of measuring damage")
    parser.add_argument("--write-only", action="store_true", help="with --files: do not time them yet")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048], help="with --files: tokens")
    parser.add_argument("--seconds", type=float, default=5.0, help="with --files: of repetition for each time")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = files(options) if options.files is not None else by_layer(options)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
