"""The texts of the benchmarks, from Debian's packages: to calibrate on, to train on, and three to judge by that share nothing with them.

    python -m benchmarks.texts texts        # needs apt-get (after an update) and dpkg-deb; nothing is installed

| file | what it is |
|---|---|
| debian-reference.txt | the Debian Reference, which the models are calibrated on |
| manual.txt | Python's library and language references, how-tos and FAQ: for longer training |
| gpl3.txt | the GNU General Public License, version 3 |
| tutorial.txt | the Python tutorial's sources |
| fortunes.txt | quotations on education, law, people, politics, science, wisdom and work |
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import tempfile
from pathlib import Path

PACKAGES = ("debian-reference-en", "python3.11-doc", "fortunes", "base-files")
CALIBRATION = "debian-reference.txt"
MANUAL = "manual.txt"
EVALUATIONS = ("gpl3", "tutorial", "fortunes")
QUOTATIONS = ("education", "law", "people", "politics", "science", "wisdom", "work")


def unpack(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], cwd=scratch, check=True)
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            unpack(package, Path(scratch))
        share = Path(scratch) / "usr" / "share"
        reference = gzip.decompress((share / "debian-reference" / "debian-reference.en.txt.gz").read_bytes())
        sources = share / "doc" / "python3.11" / "html" / "_sources"
        pages = lambda *names: "\n\n".join(  # noqa: E731
            page.read_text(encoding="utf-8") for name in names for page in sorted((sources / name).glob("*.rst.txt"))
        )
        texts = {
            CALIBRATION: reference.decode(),
            "gpl3.txt": (share / "common-licenses" / "GPL-3").read_text(encoding="utf-8"),
            MANUAL: pages("library", "reference", "howto", "faq"),
            "tutorial.txt": pages("tutorial"),
            "fortunes.txt": "\n".join((share / "games" / "fortunes" / n).read_text(encoding="utf-8") for n in QUOTATIONS),
        }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What benchmarks on texts share."""
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="folder that `python -m benchmarks.texts` wrote")
    parser.add_argument("--device", default="cpu", help="what the model runs on: cpu or cuda")


def calibration(folder: Path) -> str:
    return str(found(folder / CALIBRATION))


def evaluations(folder: Path) -> dict[str, str]:
    return {name: str(found(folder / f"{name}.txt")) for name in EVALUATIONS}


def found(path: Path) -> Path:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: write the texts with `python -m benchmarks.texts {path.parent}`")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
