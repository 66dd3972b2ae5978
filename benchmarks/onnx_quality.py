"""The ONNX file on its real bytes: ours at a size, and onnxruntime's own 4-bit quantizer beside it, both run by onnxruntime.

    python -m benchmarks.texts texts && python -m benchmarks.onnx_quality --max-size 80MB --texts texts

onnxruntime's quantizer (round to nearest, blocks of 64, asymmetric) gets the same dense file that ours starts from; it leaves an
embedding that the head shares in float32. Damage is KL(dense || file) over windows of 256 tokens, the dense model run by torch in float32.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import Tensor

from benchmarks import texts as texts_of
from lwcompile import pipeline
from lwcompile.budget import parse_size
from lwcompile.damage import Estimate, evaluate
from lwcompile.demo import demo_model
from lwcompile.executor import Executor
from lwcompile.pipeline import Settings, folder_bytes, session
from lwcompile.program import Program
from lwcompile.progress import terminal_progress

BLOCK = 64


def quantized_by_onnxruntime(dense: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)  # two lines a node
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, accuracy_level=4, bits=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(dense), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
    return path


def outputs(path: Path, batches: list[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    run = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {i.name: [d if isinstance(d, int) else 0 for d in i.shape] for i in run.get_inputs()}
    for batch in batches:
        feeds = {name: batch[name].numpy() for name in inputs if name in batch}
        rows = next(iter(feeds.values())).shape[0]
        for name, shape in inputs.items():  # a decoder's empty cache
            if name not in feeds:
                feeds[name] = np.zeros([rows, *shape[1:]], dtype=np.float32)
        yield {"logits": torch.from_numpy(np.asarray(run.run(["logits"], feeds)[0]))}


def measure(dense: Program, path: Path, evaluation: Mapping[str, Any], recipe: str) -> Estimate:
    run = session(dense, Settings(recipe=recipe))
    run.recipe = run.recipe.with_(evaluation=evaluation)
    executor = Executor(dense)
    batches = list(run.evaluation.batches(run.context.batch_size, executor.inputs()))

    def reference() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            with torch.no_grad():
                made = executor.run(batch)
            yield made

    return evaluate(run.metric, reference(), outputs(path, batches), batches, 0)["damage"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-size", default="80MB")
    parser.add_argument("--recipe", default="quality")
    texts_of.arguments(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=Path("lwcompile-runs/onnx-quality"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dense, folder = pipeline.capture(demo_model()), options.folder
    plain = folder / "dense" / "model.onnx"
    plain.parent.mkdir(parents=True, exist_ok=True)
    run = session(dense, Settings(recipe=options.recipe, backend="onnx", run_dir=folder / "run"))
    run.backend.lower(dense, plain, run.context)
    files = {"onnxruntime's own, 4 bits": quantized_by_onnxruntime(plain, folder / "ort" / "model.onnx")}
    started = time.perf_counter()
    ours = pipeline.export(
        dense, folder / "ours" / "model.onnx", recipe=options.recipe, max_bytes=parse_size(options.max_size),
        dataset=texts_of.calibration(options.texts), samples=64, seqlen=256, run_dir=folder / "run", progress=terminal_progress(),
    )  # fmt: skip
    assert ours.path is not None
    files[f"lwcompile at {options.max_size}"] = ours.path
    print(f"exported in {time.perf_counter() - started:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for text, path in texts_of.evaluations(options.texts).items():
        data = {"dataset": path, "samples": max(options.tokens // 256, 1), "seqlen": 256, "order": "sequential"}
        for name, file in files.items():
            found = measure(dense, file, data, options.recipe)
            rows.append({"text": text, "file": name, "bytes": folder_bytes(file), **found.to_json()})
            print(f"{text:12} {name:36} {folder_bytes(file) / 1e6:7.2f} MB  KL {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]",
                  flush=True)  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
