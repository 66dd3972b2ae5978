"""What each form of attention costs at single layers of a model, before any healing, and at which length its cache and work pay.

    python -m benchmarks.texts texts && python -m benchmarks.attention --texts texts       # SmolLM2
    python -m benchmarks.attention --texts texts --model minilm --layers 0 3 5             # or dinov2: attention that reads both ways
    python -m benchmarks.attention --files onnx        # ONNX files instead, timed: dropped, windowed and linear ones beside the dense

Damage is KL to the dense model in nats a token, at windows of 512 tokens of one text that the feature maps have not been fitted on;
of MiniLM and DINOv2 the KL of features in nats a sample, over 64 pieces of 64 tokens, or 64 handwritten digits. One layer is changed
at a time, and in the last rows all are. Feature maps are fitted on the Debian Reference, or on other digits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import texts as texts_of
from benchmarks.models import digits, program
from lwcompile.attention import attentions_at
from lwcompile.attention_cost import AttentionCost, say
from lwcompile.context import Context
from lwcompile.damage import DamageMeter, Estimate
from lwcompile.data import CalibrationSet, load_dataset
from lwcompile.decode import derive_decode
from lwcompile.metric import FeatureKl, Kl
from lwcompile.prefix import PrefixCache
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.site import Site
from lwcompile.spec import Spec

FORMS = {
    "smollm2": ("window{size=128}", "window{size=64}", "linear{steps=0}", "linear", "drop"),
    "minilm": ("window{size=16}", "linear_relu{steps=0}", "linear_relu", "drop"),
    "dinov2": ("window{size=8,sinks=1}", "linear_relu{steps=0}", "linear_relu", "drop"),
}
EVERYWHERE = {"smollm2": FORMS["smollm2"][:3], "minilm": FORMS["minilm"][:3], "dinov2": FORMS["dinov2"][:3]}
FILES = {
    "softmax": ("", slice(None)),
    "dropped at every third": ("drop", slice(1, None, 3)),
    "window of 128, 4 sinks": ("window{size=128}", slice(None)),
    "linear outside 64": ("linear{steps=0}", slice(None)),
}
"""What is written into a file: the option, and the layers that take it."""

LENGTH = 512


class Trial:
    """Edits of the dense model, measured from their first difference on."""

    def __init__(self, dense: Program, options: argparse.Namespace) -> None:
        self.dense = dense
        fitted, judged, size = _data(dense, options)
        self.ctx = Context(calibration=fitted, program=dense, batch_size=1 if size == 1 else 4, device=options.device)
        self.structure = self.ctx.find_structure(dense)
        self.metric = Kl() if size == 1 else FeatureKl(batch=size)
        batches = list(judged.batches(size, [i.name for i in dense.main.inputs]))
        keep = lambda outputs, batch: self.metric.keep(outputs, batch, torch.float32)  # noqa: E731
        self.cache = PrefixCache(dense, batches, device=options.device, keep=keep)

    def edited(self, form: str, layers: list[int]) -> Program:
        return self.ctx.edited(self.dense, [f"block{i}.attention" for i in layers], [Spec.parse(form)])

    def damage(self, edited: Program) -> Estimate:
        meter = DamageMeter(self.metric, 0)
        for i, outputs in enumerate(self.cache.suffix_outputs(edited)):
            meter.update(self.cache.kept(i), outputs, self.cache.batches[i])
        return meter.result()


def _data(dense: Program, options: argparse.Namespace) -> tuple[CalibrationSet, CalibrationSet, int]:
    """What maps are fitted on, what is judged by, and how many samples of it are compared together."""
    if options.model == "dinov2":
        with tempfile.TemporaryDirectory() as folder:
            fitted, judged = (load_dataset(str(path), samples=n) for path, n in zip(digits(Path(folder)), (128, 64)))
        return fitted, judged, 32
    samples, length = (8, LENGTH) if options.model == "smollm2" else (64, 64)
    tokenizer, count = dense.tokenizer(), options.tokens // LENGTH if options.model == "smollm2" else 64
    texts = texts_of.calibration(options.texts), texts_of.evaluations(options.texts)[options.text]
    fitted = load_dataset(texts[0], tokenizer=tokenizer, samples=samples, seqlen=length)
    judged = load_dataset(texts[1], tokenizer=tokenizer, samples=count, seqlen=length, order="sequential")
    return fitted, judged, 1 if options.model == "smollm2" else 32


def costs(dense: Program, site: Site, forms: tuple[str, ...], image: bool) -> None:
    a = attentions_at(dense.main, site)[0]
    old = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width, causal=a.mask is not None and a.mask.causal)
    for form in forms:
        made: Any = make("passes", Spec.parse(form))
        if made.name not in ("window", "linear", "linear_relu") or getattr(made, "steps", 1) == 0:
            continue
        window = made.size if made.name == "window" else getattr(made, "window", 0)
        features = 0 if made.name == "window" else 2 * a.key_width
        taps = getattr(made, "taps", 0) ** (2 if image else 1)
        new = dataclasses.replace(old, window=window, sinks=getattr(made, "sinks", 0), features=features, taps=taps)
        print(f"{form:18} {say(new, old)[0]}")


def by_layer(options: argparse.Namespace) -> list[dict[str, Any]]:
    dense, rows, forms = program(options.model), [], FORMS[options.model]
    trial = Trial(dense, options)
    blocks = [site.id for site in trial.structure.of_kind("attention")]
    costs(dense, trial.structure.sites[blocks[0]], forms, options.model == "dinov2")
    everywhere = [(f, list(range(len(blocks)))) for f in EVERYWHERE[options.model]]
    for form, layers in [(f, [i]) for i in options.layers for f in forms] + everywhere:
        started = time.process_time()
        trial.ctx.remarks.clear()
        edited = trial.edited(form, layers)
        found = trial.damage(edited)
        error = trial.ctx.remarks[-1].numbers.get("error") if trial.ctx.remarks else None
        where = str(layers[0]) if len(layers) == 1 else "all"
        rows.append({"layer": where, "form": form, **found.to_json(), "error": error, "seconds": time.process_time() - started})
        beside = "" if error is None else f"  output {error:.3f} away"
        print(f"{where:>4} {form:18} {found}  {rows[-1]['seconds']:.1f} s{beside}", flush=True)
    return rows


def files(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill of some tokens, and one token behind as many, by onnxruntime in float32: least processor time of one thread."""
    from lwcompile.backends.onnx.backend import Onnx
    from lwcompile.backends.onnx.parity import open_session
    from lwcompile.backends.onnx.runtime import speed

    rows, sessions = [], {}
    for label, (form, which) in FILES.items():
        if label not in options.forms:
            continue
        path = options.files / f"{label.replace(' ', '-').replace(',', '')}.onnx"
        if not path.is_file():
            dense = program("smollm2")
            ctx = Context(program=dense)
            sites = [site.id for site in ctx.find_structure(dense).of_kind("attention")][which]
            made = ctx.edited(dense, sites, [Spec.parse(form)] if form else [])
            both = dataclasses.replace(made, entries={"forward": made.main, "decode": derive_decode(made.main)})
            print(f"{label}: parity {Onnx().lower(both, path, ctx).worst:.1e}", flush=True)
        rows.append({"form": label, "ms": {n: {} for n in options.lengths}})
        sessions[label] = open_session(path, threads=1)
    for n in options.lengths:
        for _ in range(options.rounds):  # in turn, so that whatever else the machine does meets every form
            for row in rows:
                took = speed(sessions[row["form"]], n, options.seconds, time.process_time, warm=options.seconds > 0)
                row["ms"][n] = {kind: min(ms, row["ms"][n].get(kind, ms)) for kind, ms in took.items()}
    for row in rows:
        said = []
        for kind, n in [(kind, n) for kind in ("prefill", "decode") for n in options.lengths]:
            dense, ms = (r["ms"][n][f"{kind}_ms"] for r in (rows[0], row))
            said.append(f"{n} {kind}: {ms:.0f} ms ({dense / ms:.2f}x)")
        print(f"{row['form']:24} {'  '.join(said)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts_of.arguments(parser)
    parser.add_argument("--model", default="smollm2", choices=FORMS)
    parser.add_argument("--text", default="tutorial", choices=texts_of.EVALUATIONS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 7, 14, 21, 28])
    parser.add_argument("--files", type=Path, help="write ONNX files into this folder and time them, instead of measuring damage")
    parser.add_argument("--forms", nargs="*", default=list(FILES), choices=FILES, help="with --files: which")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048], help="with --files: tokens")
    parser.add_argument("--seconds", type=float, default=5.0, help="with --files: of repetition for each time")
    parser.add_argument("--rounds", type=int, default=3, help="with --files: of every form in turn, the least of which counts")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = files(options) if options.files is not None else by_layer(options)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
