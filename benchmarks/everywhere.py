"""What one structural option costs where every site carries it, before any healing: looped stacks and latent caches on SmolLM2.

    python -m benchmarks.texts texts && python -m benchmarks.everywhere --texts texts

Bytes are those of all that is stored, in float32, the embedding that the head shares among them; the cache is what one more token
takes in it. Damage is KL to the dense model in nats a token, at windows of 256 tokens of one text; factors are fitted on the Debian
Reference, all of its tokens alike.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import texts as texts_of
from benchmarks.models import program
from lwcompile.choices import offer
from lwcompile.context import Context
from lwcompile.damage import DamageMeter
from lwcompile.data import load_dataset
from lwcompile.decode import cache_bytes_per_token
from lwcompile.metric import Kl
from lwcompile.prefix import PrefixCache
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.spec import Spec

OPTIONS = ("loop{init=lower}", "loop{init=stepwise}", "loop", "loop{ratio=0.5,importance=0.0}",
           "latent{ratio=0.75,importance=0.0}", "latent{importance=0.0}", "latent{joint=false,importance=0.0}",
           "latent{ratio=0.25,importance=0.0}")  # fmt: skip
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "twin"))
    texts_of.arguments(parser)
    parser.add_argument("--text", default="tutorial", choices=texts_of.EVALUATIONS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--fitted", type=int, default=2048, help="tokens that factors are fitted on")
    parser.add_argument("--options", nargs="*", default=OPTIONS)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    dense = program(options.model)
    tokenizer, rows = dense.tokenizer(), list[dict[str, Any]]()
    sizes = {"tokenizer": tokenizer, "seqlen": LENGTH}
    fitted = load_dataset(texts_of.calibration(options.texts), samples=options.fitted // LENGTH, **sizes)
    text = texts_of.evaluations(options.texts)[options.text]
    judged = load_dataset(text, samples=options.tokens // LENGTH, order="sequential", **sizes)
    ctx, metric = Context(calibration=fitted, program=dense, batch_size=2, device=options.device), Kl()
    structure = ctx.find_structure(dense)
    batches = list(judged.batches(1, [i.name for i in dense.main.inputs]))
    keep = lambda outputs, batch: metric.keep(outputs, batch, torch.float32)  # noqa: E731
    cache = PrefixCache(dense, batches, device=options.device, keep=keep)
    print(f"dense: {dense.nbytes() / 1e6:.1f} MB, {cache_bytes_per_token(dense.main)} bytes of cache a token", flush=True)
    for spec in map(Spec.parse, options.options):
        started, kind = time.perf_counter(), make("passes", spec).kinds[0]
        sites = list(offer(dense, structure, Recipe().with_(options={kind: [spec]})).options)
        edited = ctx.edited(dense, sites, [spec])
        meter = DamageMeter(metric, 0)
        for i, outputs in enumerate(cache.suffix_outputs(edited)):
            meter.update(cache.kept(i), outputs, cache.batches[i])
        found, per_token = meter.result(), cache_bytes_per_token(edited.main)
        size = sum(edited.main.store[key].nbytes for key in set(edited.main.tensors.values()))
        row = {"option": str(spec), "sites": len(sites), "bytes": size, "cache": per_token, **found.to_json()}
        rows.append(row | {"seconds": time.perf_counter() - started})
        print(f"| `{spec}` | {len(sites)} | {size / 1e6:.1f} MB | {per_token} | {found.mean:.4g} ({found.low:.4g} to {found.high:.4g}) |",
              flush=True)  # fmt: skip
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
