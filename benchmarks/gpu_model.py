"""Whole-model decode and prefill of an 8B-shaped random model against bf16 under Inductor, on one GPU.

    python -m benchmarks.gpu_model --write model.json
    python -m benchmarks.gpu_model --bits 4 3 4/3 --batches 1 16 --write model.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu_model --check          correctness on a tiny shape, anywhere

Llama-3-8B's shape (`--layers` shrinks it): 32 layers of width 4096, MLPs of 14336, 32 heads over 8 key-value heads, a vocabulary of
128256, untied. Ours is what the Triton backend writes for it: the model is traced with weights that take no memory, each matrix
becomes packed codes of which only the shapes are known, and the package's source is loaded with random codes and scales made on the
device. Every matrix is packed, embedding and head included. `--bits 4/3` gives the MLPs 3 bits and the rest 4.

The peer is transformers' LlamaForCausalLM in bf16 under Inductor, with a static cache. Its layers are compiled once for all, since
Inductor takes minutes for 32 of them as one graph; what that loses, a sum fused with the next layer's norm, `--whole` has. It holds the
values of our packed weights, so the logits of every timed call are compared with ours before anything is timed.

A decode step has one new token a sequence behind `--context` cached ones, and is repeated at that length: our cache grows, so a
captured step is of one length; the peer writes the last position of its cache anew. Prefill has no cache, and both sides give the
logits of all tokens. Each call is timed as it is and replayed from a CUDA graph, which takes Python's launches off both; what is
compared is the peer's faster way. "generate" is what a user of the package gets: `--new` tokens from its own `generate`, which
replays a CUDA graph, behind a prompt of `--context`, without the time of the prompt and the first of them; its caches are written in
place, as the peer's are, where the decode step alone copies them. Beside it is the peer's decode step, whose tokens nobody picks. The
sides alternate, and a time is the median over rounds of the median between CUDA events. Bandwidth is the bytes of weights that a step
reads (the embedding's rows and the cache left out) a second, over that of a copy. What cannot be run is listed with the reason, and
the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.gpu_kernels import copy_bandwidth
from benchmarks.packed_llama import PEER, Ours, Peer, Step, captured

SHAPE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Of logits, relative to the largest. 32 layers of random weights lose 0.05 to bf16's rounding; another function is off by 1."""


@dataclass(frozen=True)
class Timing:
    """One side's step. bandwidth: bytes of weights read a second over a copy's. memory: of weights and one call, at its peak, in bytes.
    speedup: the peer's time, the less of its two, over this one's. error: of the logits. Both None if the peer did not run.
    """

    what: str
    kind: str
    batch: int
    tokens: int
    graph: bool
    milliseconds: float
    per_second: float
    weights: int
    bandwidth: float
    memory: int
    speedup: float | None
    error: float | None


# --- timing


def difference(ours: Ours, peer: Peer, mine: Callable[[], Tensor], others: Callable[[], Tensor]) -> float:
    """How far the logits are from the peer's, which takes our weights, relative to the largest.

    Raises:
        ValueError: past what rounding explains.
    """
    peer.fill(ours)
    wanted = others().float()
    found = float((mine().float() - wanted).abs().max() / wanted.abs().max())
    if not found <= TOLERANCE[ours.dtype]:
        raise ValueError(f"logits are wrong by {found:.2g} of the largest")
    return found


def same_tokens(ours: Ours, step: Step, new: int) -> None:
    """Nothing, if `generate` makes the tokens that the same kernels make step by step.

    Raises:
        ValueError: it does not.
    """
    found, wanted = ours.generate(step, new)(), ours.stepwise(step, new)
    if not torch.equal(found, wanted):
        first = int((found != wanted).any(0).nonzero()[0]) - step.tokens
        raise ValueError(f"generated tokens differ from those of growing caches from number {first} on")


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """What replays a call that has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def working_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call takes beyond what is held before it, at its peak."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_of(call: Callable[[], Any], repeats: int, warm: int) -> float:
    """Median milliseconds of a call, launched as a user would, after `warm` of them."""
    for _ in range(warm):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


class Bench:
    """The sides, timed in turn; what cannot be run is in `missing`."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.missing = rounds, {}
        self.decoded: dict[tuple[int, int], float | None] = {}  # the peer's seconds by batch and cached tokens
        self.peer: Peer | None = None
        self.ours: list[Ours] = []

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """A part that fails is a row with the reason, and the rest goes on."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no reason given"]
            self.missing[what] = f"{type(error).__name__}: {lines[0]}"
            print(f"{what}: {self.missing[what]}", flush=True)
        else:
            print(f"{what}: {time.perf_counter() - started:.1f} s", flush=True)

    def run(self, step: Step, bandwidth: float) -> Iterator[Timing]:
        label = f"{step.kind}, batch {step.batch}, {step.tokens} tokens"
        sides: list[Ours | Peer] = [*([] if self.peer is None else [self.peer]), *self.ours]
        calls: dict[tuple[str, bool], Callable[[], Any]] = {}
        memory, errors, milli = {}, {}, {}
        for side in sides:
            plain, replayed = (side.name, False), (side.name, True)
            with self.noted(f"{label}: {side.name}, compiling"):
                call = side.call(step)
                call()
                memory[side.name] = side.stored + working_memory(call)
                calls[plain] = call
            if isinstance(side, Ours) and self.peer is not None and {plain, (PEER, False)} <= calls.keys():
                with self.noted(f"{label}: {side.name}, compared"):
                    errors[side.name] = difference(side, self.peer, calls[plain], calls[PEER, False])
            if plain in calls:
                with self.noted(f"{label}: {side.name}, CUDA graph"):
                    calls[replayed] = graphed(calls[plain])
        warm, repeats = (2, 5) if step.kind == "prefill" else (5, 30)
        with self.noted(f"{label}: timing"):
            for key in [*calls] * self.rounds:
                milli.setdefault(key, []).append(time_of(calls[key], repeats, warm))
        seconds = {key: statistics.median(found) * 1e-3 for key, found in milli.items()}
        peer = min((taken for (name, _), taken in seconds.items() if name == PEER), default=None)
        if step.kind == "decode":
            self.decoded[step.batch, step.tokens] = peer
        for side in sides:
            for key in ((side.name, False), (side.name, True)):
                if (taken := seconds.get(key)) is None:
                    continue
                yield Timing(
                    side.name, step.kind, step.batch, step.tokens, key[1], 1000 * taken, step.made / taken, side.read,
                    side.read / taken / bandwidth, memory[side.name], peer and peer / taken, errors.get(side.name),
                )  # fmt: skip

    def generation(self, step: Step, new: int, bandwidth: float) -> Iterator[Timing]:
        """A token of each sequence, of those that `generate` makes; each side alone, since it holds its caches between calls."""
        peer = self.decoded.get((step.batch, step.tokens))
        for side in self.ours:
            with self.noted(f"generate, batch {step.batch}, {step.tokens} tokens: {side.name}"):
                prompt, whole = side.generate(step, 1), side.generate(step, 1 + new)
                prompt()
                memory = side.stored + working_memory(whole)  # the first time, when caches are made
                same_tokens(side, step, 8)
                found = [(time_of(whole, 3, 1) - time_of(prompt, 5, 1)) * 1e-3 / new for _ in range(self.rounds)]
                taken = statistics.median(found)
                yield Timing(
                    side.name, step.kind, step.batch, step.tokens, True, 1000 * taken, step.made / taken, side.read,
                    side.read / taken / bandwidth, memory, peer and peer / taken, None,
                )  # fmt: skip


def check(given: argparse.Namespace, folder: Path, device: str) -> None:
    """Every step of every plan against the peer, in float32 on a tiny shape. `ValueError` where one is wrong."""
    config = LlamaConfig(**TINY, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=False)
    graph, peer = captured(config), Peer(config, device, torch.float32)
    for plan in given.bits:
        ours = Ours(graph, config, plan, 16, folder, device, torch.float32)
        for step in (Step("decode", 1, 12), Step("decode", 2, 5), Step("prefill", 1, 9)):
            found = difference(ours, peer, ours.call(step), peer.call(step))
            print(f"{ours.name} bits, {step.kind}, batch {step.batch}, {step.tokens} tokens: error {found:.1e}")
        same_tokens(ours, Step("generate", 2, 7), 3)
        print(f"{ours.name} bits, generate, batch 2, 7 tokens: the same tokens")


def measure(given: argparse.Namespace, folder: Path, device: str) -> dict[str, Any]:
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=given.layers, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    bench = Bench(given.rounds)
    names = ("torch", "triton", "transformers", "lwcompile")
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "layers": given.layers,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "group": given.group, "timings": [], "missing": bench.missing,
    }  # fmt: skip
    with bench.noted("dense model in bf16"):
        bench.peer = Peer(config, device, torch.bfloat16)
        bench.peer.compile(given.whole)
    decode = [Step("decode", batch, given.context) for batch in given.batches]
    generation = [Step("generate", batch, given.context) for batch in given.batches if given.new]
    prefill = [Step("prefill", 1, tokens) for tokens in given.prefill]
    steps = [*decode, *prefill[:1], *generation, *prefill[1:]]
    if given.hold is not None and bench.peer is not None:
        for step in decode + prefill:
            with bench.noted(f"{step.kind}, batch {step.batch}, {step.tokens} tokens: {PEER}, compiling"):
                bench.peer.call(step)()
        torch.cuda.synchronize()
        given.hold.with_suffix(".ready").touch()
    with bench.noted("tracing"):
        graph = captured(config)
        for plan in given.bits:
            with bench.noted(f"lwcompile {plan}"):
                bench.ours.append(Ours(graph, config, plan, given.group, folder, device, torch.bfloat16, given.hold))
    bandwidth = result["copy_bytes_per_second"] = copy_bandwidth()
    for step in steps:
        timings = bench.generation(step, given.new, bandwidth) if step.kind == "generate" else bench.run(step, bandwidth)
        for made in timings:
            result["timings"].append(asdict(made))
            print(row(made), flush=True)
        if given.write is not None:  # after each step: what is known by then outlives what comes
            given.write.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def row(t: Timing) -> str:
    how = "CUDA graph" if t.graph else "call by call"
    what = f"{t.what:16} {t.kind} batch {t.batch:2} tokens {t.tokens:5} {how:12} {t.milliseconds:9.3f} ms {t.per_second:10.1f} tokens/s"
    weights = f"{t.weights / 1e9:6.2f} GB of weights, {t.bandwidth:5.1%} of a copy  {t.memory / 1e9:6.2f} GB at the peak"
    speedup = "" if t.speedup is None else f"  {t.speedup:5.2f} x {PEER}"
    return f"{what}  {weights}{speedup}" + ("" if t.error is None else f"  logits within {t.error:.1e}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["4"], help="widths of our weights; 4/3 for 3 in the MLPs and 4 elsewhere")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="sequences that decode together")
    parser.add_argument("--context", type=int, default=512, help="cached tokens of each sequence that decodes")
    parser.add_argument("--new", type=int, default=64, help="tokens that the package's own `generate` makes; 0: none")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="tokens of a prompt")
    parser.add_argument("--whole", action="store_true", help="compile the peer as one graph: a minute or more for each step")
    parser.add_argument(
        "--hold", type=Path, help="with the peer compiled it makes PATH.ready, and uses the GPU no more before PATH is there"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a JSON file for the results")
    parser.add_argument("--check", action="store_true", help="only compare with the peer on a tiny shape, in float32")
    given = parser.parse_args(arguments)
    for plan in given.bits:
        widths = plan.split("/")
        if len(widths) > 2 or not all(width in {"2", "3", "4", "5", "6", "7", "8"} for width in widths):
            parser.error(f"--bits takes 2 to 8, or two of them as in 4/3, not {plan}")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.check:
        print("there is no GPU here; --check compares with the peer anywhere, with TRITON_INTERPRET=1", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        sys.path.insert(0, name)  # the written packages are imported from here
        if given.check:
            check(given, Path(name), device)
            return 0
        result = measure(given, Path(name), device)
    return 1 if result["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
