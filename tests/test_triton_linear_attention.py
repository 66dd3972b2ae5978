"""The Triton kernels of linear attention, in the interpreter: a process of its own, as in `test_triton_kernels`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's: install lwcompile[triton]")

from test_triton_kernels import HERE, interpreted


def test_linear_attention_computes_what_its_definition_says() -> None:
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "triton_linear_attention.py"))
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
