"""Running files: one session per model, empty caches where none are given, and timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from lwcompile.backends.onnx.parity import open_session, run_session
from lwcompile.decode import PAST
from lwcompile.errors import BadInput, Refused
from lwcompile.rolling import bound_of

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


class Runtime:
    """A model file, or an encoder's and a decoder's beside each other, ready to run."""

    def __init__(self, path: Path) -> None:
        names = [path] if path.is_file() else [path.with_name(f"{entry}_{path.name}") for entry in ("encoder", "decoder")]
        for name in names:
            if not name.is_file():
                raise BadInput(f"there is no model at {path}")
        self.sessions = [open_session(name) for name in names]

    @staticmethod
    def of(path: Path) -> Runtime:
        """The runtime of a file, kept open between calls as long as the file does not change."""
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        return _opened(path, stamp)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; a decoder finds its encoder's output among its inputs."""
        feed, outputs = dict(inputs), {}
        for session in self.sessions:
            outputs = self._step(session, feed)
            states = next(iter(outputs.values()))
            for item in session.get_inputs():
                feed.setdefault(f"encoder_{item.name}", feed.get(item.name, states))
            feed.setdefault("encoder_hidden_states", states)
            feed |= {name.removeprefix("decoder_"): feed[name] for name in list(feed) if name.startswith("decoder_")}
        return outputs

    def _step(self, session: ort.InferenceSession, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = dict(feed)
        batch = next(iter(feed.values())).shape[0]
        for item in session.get_inputs():
            if item.name not in given and item.name.startswith(PAST):
                given[item.name] = _empty(item, batch)
            elif item.name not in given:
                raise BadInput(f"the model takes {item.name!r}, which was not given")
        names = [o.name for o in session.get_outputs()]
        return {n: torch.from_numpy(v) for n, v in zip(names, run_session(session, given))}

    def speed(self, tokens: int = 128, seconds: float = 1.0) -> dict[str, float]:
        """Medians over about `seconds` each: a pass over `tokens` positions, and one position behind as many cached ones."""
        return speed(self.sessions[-1], tokens, seconds)


def speed(
    session: ort.InferenceSession, tokens: int, seconds: float, clock: Callable[[], float] = time.perf_counter, warm: bool = True
) -> dict[str, float]:
    """See `Runtime.speed`. clock: `time.process_time` counts what one thread worked, whatever else the machine does; a session that
    is not run once before (`warm=False`) pays for its allocations."""
    cached = any(i.name.startswith(PAST) for i in session.get_inputs())
    found = {"prefill_ms": _median(session, _feed(session, tokens, 0), seconds, clock, warm)}
    if cached:
        found["decode_ms"] = _median(session, _feed(session, 1, tokens), max(seconds, 1.0), clock, True)
    return found


class OnnxStep:
    """A `DecodeStep` (see `lwcompile.generate`) over a file; its cache is the runtime's own list of past keys and values.

    What one step puts out is the next one's input as it lies in memory. Binding inputs and outputs one by one instead was tried: its
    calls cost as much as they save.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.pasts = [i for i in session.get_inputs() if i.name.startswith(PAST)]
        if not self.pasts:
            raise Refused("the file has no inputs for cached keys and values, so it cannot continue a sequence")
        given = [i for i in session.get_inputs() if i not in self.pasts]
        self.padding = next((i.name for i in given if len(i.shape) > 1 and i.shape[1] == "total"), None)
        self.positions = next((i.name for i in given if i.name.endswith("position_ids")), None)
        rest = [i.name for i in given if i.name not in (self.padding, self.positions)]
        if len(rest) != 1:
            raise Refused(f"generation does not know how to fill the inputs {', '.join(rest)}")
        self.tokens = rest[0]
        logits, *others = [o.name for o in session.get_outputs()]
        self.outputs = [logits, *others[len(others) - len(self.pasts) :]]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if self.padding is None and not attention_mask.all():
            raise BadInput("this model has no attention mask, so it cannot take padded prompts; generate one at a time")
        given = {self.tokens: input_ids, self.padding: attention_mask, self.positions: position_ids}
        feed = {name: _shared(value) for name, value in given.items() if name is not None}
        feed |= zip((i.name for i in self.pasts), cache or [_shared(_empty(i, len(input_ids))) for i in self.pasts])
        logits, *presents = self.session.run_with_ort_values(self.outputs, feed)
        return torch.from_numpy(logits.numpy())[:, -1].float(), presents


def _shared(value: Tensor) -> ort.OrtValue:
    """A tensor as the runtime's own value; its memory is shared."""
    return ort.OrtValue.ortvalue_from_numpy(value.contiguous().numpy())


def _empty(item: Any, batch: int) -> Tensor:
    """A cache input of no position."""
    return torch.zeros([batch, *(d if isinstance(d, int) else 0 for d in item.shape[1:])], dtype=_DTYPES[item.type])


@lru_cache(maxsize=2)
def _opened(path: Path, stamp: int) -> Runtime:
    return Runtime(path)


def _feed(session: ort.InferenceSession, tokens: int, past: int) -> dict[str, Tensor]:
    """Inputs of one row: every free length is `tokens`, a cache's is `past`, a mask over both their sum."""
    made = {}
    for item in session.get_inputs():
        bounds = {d: bound for d in item.shape if isinstance(d, str) and (bound := bound_of(d)) is not None}
        lengths = {"past": past, "total": past + tokens, **{name: min(past, bound) for name, bound in bounds.items()}}
        free = [lengths.get(d, tokens) if i else 1 for i, d in enumerate(item.shape)]
        shape = [d if isinstance(d, int) else n for d, n in zip(item.shape, free)]
        dtype = _DTYPES[item.type]
        if dtype.is_floating_point:
            made[item.name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        elif "position" in item.name:
            made[item.name] = torch.arange(past, past + shape[-1]).expand(shape).contiguous().to(dtype)
        else:
            made[item.name] = torch.ones(shape, dtype=dtype)
    return made


def _median(
    session: ort.InferenceSession, feed: Mapping[str, Tensor], seconds: float, clock: Callable[[], float], warm: bool
) -> float:
    if warm:
        run_session(session, feed)
    times, end = [], clock() + seconds
    while not times or (clock() < end and len(times) < 200):
        start = clock()
        run_session(session, feed)
        times.append(clock() - start)
    return 1e3 * float(np.median(times))
