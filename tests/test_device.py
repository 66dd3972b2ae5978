"""What `device_pretended` tests, in a process where the pretended device is known before the first backward pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_passes_run_on_another_device() -> None:
    file = str(Path(__file__).parent / "device_pretended.py")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "19 passed" in done.stdout and "skipped" not in done.stdout, done.stdout
