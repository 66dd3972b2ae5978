"""Proof that a file computes what the graph does: both run on the same inputs, output by output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from lwcompile.errors import VerificationError
from lwcompile.memory import give_back

Cases = Sequence[tuple[Mapping[str, Tensor], Sequence[Tensor]]]


def open_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """A CPU session. `VerificationError` if the runtime does not take the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(f"onnxruntime does not load {path.name}: {str(error).splitlines()[0]}") from error
    give_back()  # loading folds constants, hundreds of MB for a model of 100 million weights
    return session


def run_session(session: ort.InferenceSession, feed: Mapping[str, Tensor]) -> list[np.ndarray]:
    """All outputs, for the inputs by name; a feed may hold more than the model takes."""
    wanted = {i.name for i in session.get_inputs()}
    outputs = session.run(None, {name: value.contiguous().numpy() for name, value in feed.items() if name in wanted})
    return [np.asarray(value) for value in outputs]


def errors(path: Path, outputs: Sequence[str], cases: Cases) -> dict[str, float]:
    """Per output, the largest error over all cases relative to the largest value; infinite where shapes or finiteness differ."""
    session, found = open_session(path), dict.fromkeys(outputs, 0.0)
    for feed, wanted in cases:
        try:
            got = run_session(session, feed)
        except Exception as error:
            raise VerificationError(f"{path.name} does not run: {str(error).splitlines()[0]}") from error
        for name, a, b in zip(outputs, wanted, got, strict=True):
            found[name] = max(found[name], relative_error(a, torch.from_numpy(b)))
    return found


def relative_error(wanted: Tensor, got: Tensor) -> float:
    """max |got - wanted| / max |wanted| over what is finite in `wanted`."""
    if wanted.shape != got.shape:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    wanted, got = wanted.double(), got.double()
    finite = torch.isfinite(wanted)
    if not torch.isfinite(got[finite]).all():
        return float("inf")
    scale = wanted[finite].abs().max().clamp(min=1e-30) if finite.any() else torch.tensor(1.0)
    return ((got - wanted)[finite].abs().max() / scale).item() if finite.any() else 0.0
