"""Artifacts: the directory a compressed model lives in, and loading it back.

model.onnx | program.json + weights.safetensors     the model
config.json, tokenizer files                        as the source had them
plan.yaml                                           what was chosen where
manifest.json                                       hashes, versions, sizes, measured quality, how it was made
LICENSE, README.md                                  the source's licence, and a model card that names the changes
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwcompile.budget import format_size
from lwcompile.errors import BadInput, Refused
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.rundir import versions, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from lwcompile.report import Report
    from lwcompile.session import Session

MANIFEST = "manifest.json"


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def model_files(model: Path) -> list[Path]:
    """The files of a lowered model: the main one with those beside it that carry its name, or all in its folder."""
    found = model.rglob("*") if model.is_dir() else model.parent.glob(f"*{model.name}*")
    return sorted(f for f in found if f.is_file() and "__pycache__" not in f.parts)


def write_artifact(folder: Path, run: Session, program: Program | None, plan: Plan, model: Path | None, report: Report) -> None:
    """Complete a folder around a lowered `model` file, or around the compressed `program` itself.

    The manifest comes last: a folder that has one is whole.
    """
    written: list[Path] = []
    if program is not None:
        program.save(folder)
        written += [folder / "program.json", folder / "weights.safetensors"]
    if model is not None:
        written += [*model_files(model), *(folder / name for name in run.backend.writes)]
    for asset in run.program.assets:
        own = ("README.md", "LICENSE", *(run.backend.writes if model is not None else ()))
        if asset.resolve() != (folder / asset.name).resolve() and asset.name not in own:
            shutil.copyfile(asset, folder / asset.name)
            written.append(folder / asset.name)
    plan.save(folder / "plan.yaml")
    write_atomic(folder / "LICENSE", _license_text(run.program).encode())
    write_atomic(folder / "README.md", _model_card(run.program, plan, report).encode())
    written += [folder / name for name in ("plan.yaml", "LICENSE", "README.md")]
    manifest = {
        "format": 1,
        "backend": None if model is None else run.backend.name,
        "model": None if model is None else model.name,
        "base": {"name": run.program.name, "program": run.digest, "license": run.program.license},
        "task": run.program.task,
        "unit": plan.unit,
        "predicted": plan.predicted,
        "measured": report.data.get("measured"),
        "evaluation": report.data.get("evaluation"),
        "parity": report.data.get("parity"),
        "speed": report.data.get("speed"),
        "versions": versions(),
        "files": {
            f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": file_hash(f)}
            for f in sorted(set(written))
            if f.is_file()
        },
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _license_text(program: Program) -> str:
    for asset in program.assets:
        if asset.name in ("LICENSE", "LICENSE.txt"):
            return asset.read_text(encoding="utf-8")
    said = f"is under {program.license}" if program.license else "states no licence that could be found"
    return f"The base model {program.name} {said}. This compressed form of it is under the same terms.\n"


def _model_card(program: Program, plan: Plan, report: Report) -> str:
    counts = Counter(str(spec) for options in plan.choices.values() for spec in options)
    changes = "\n".join(f"- {count} x `{spec}`" for spec, count in counts.most_common())
    measured = report.data.get("measured") or {}
    figures = f"{measured.get('value', float('nan')):.4g} {plan.unit}"
    interval = f"95 % interval {measured.get('low', float('nan')):.4g} to {measured.get('high', float('nan')):.4g}"
    size = report.data.get("bytes", {}).get("file") or plan.bytes or 0
    front = f"---\nlicense: {program.license or 'other'}\nbase_model: {program.name}\ntags: [lwcompile, quantized]\n---\n\n"
    return (
        f"{front}# {program.name}, compressed layer by layer\n\n"
        f"Base model: {program.name} ({report.data['model']['parameters']:,} parameters). This form takes {format_size(size)}.\n\n"
        f"Measured damage against the base model: {figures} ({interval}), on held-out samples.\n\n"
        f"## Changes\n\n{changes or '- none'}\n\n`plan.yaml` says which site carries what; `manifest.json` holds hashes and figures.\n"
    )


@dataclass
class Artifact:
    """A loaded model directory. `program` is the compressed graph where the directory holds one."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def plan(self) -> Plan:
        return Plan.load(self.folder / "plan.yaml")

    @cached_property
    def program(self) -> Program:
        if not (self.folder / "program.json").is_file():
            raise BadInput(f"{self.folder} holds a lowered model and no program; `lwcompile compress` writes one")
        return Program.load(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        from lwcompile.program import load_tokenizer_from

        return load_tokenizer_from(self.folder)

    @cached_property
    def step(self) -> Any:
        """What advances generation by some tokens: the backend's runtime, or the decode graph of the program."""
        if self.manifest.get("model") is not None:
            from lwcompile.registry import make

            backend = make("backends", self.manifest["backend"])
            if not hasattr(backend, "decode_step"):
                raise Refused(f"the backend {self.manifest['backend']} cannot generate")
            return backend.decode_step(self.folder / self.manifest["model"])
        return program_step(self.program)

    def generate(
        self, prompt: str | Tensor, max_new_tokens: int = 64, on_token: Callable[[str], None] | None = None, **options: Any
    ) -> Any:
        """Continue a prompt. A string gives a string back, ids [batch, sequence] give ids. Options as `lwcompile.generate` has them."""
        return generate_with(self.step, self.tokenizer, prompt, max_new_tokens, on_token, **options)

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """One forward pass; outputs by name."""
        if self.manifest.get("model") is not None:
            from lwcompile.registry import make

            backend = make("backends", self.manifest["backend"])
            return backend.run(self.folder / self.manifest["model"], inputs)
        from lwcompile.executor import run

        return run(self.program, inputs)


def program_step(program: Program) -> Any:
    """A decode step over a program's graph; `Refused` says why it cannot generate."""
    from lwcompile.decode import derive_decode
    from lwcompile.generate import GraphStep

    if "decode" in program.entries:
        return GraphStep(program.entries["decode"])
    return GraphStep(derive_decode(program.main, check=False))  # checked when the program was compressed


def generate_with(step: Any, tokenizer: Any, prompt: Any, max_new_tokens: int, on_token: Any = None, **options: Any) -> Any:
    from lwcompile.generate import generate

    if not isinstance(prompt, str):
        return generate(step, prompt, max_new_tokens=max_new_tokens, **options)
    if tokenizer is None:
        raise BadInput("this model came without a tokenizer; give token ids instead of text")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    shown: list[int] = []

    def show(tokens: Any) -> None:
        """Hand on what the text gained; a token may end inside a character, which waits for the rest."""
        before = tokenizer.decode(shown, skip_special_tokens=True)
        shown.append(int(tokens[0]))
        after = tokenizer.decode(shown, skip_special_tokens=True)
        if on_token is not None and not after.endswith("\ufffd"):
            on_token(after[len(before.rstrip("\ufffd")) :])

    produced = generate(step, ids, max_new_tokens=max_new_tokens, eos=tokenizer.eos_token_id, on_token=show, **options)
    return tokenizer.decode(produced[0, ids.shape[1] :], skip_special_tokens=True)


def load(folder: str | Path) -> Artifact:
    """A directory that `compress` or `export` wrote. `BadInput` if it is not whole, or a file is not what the manifest says."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"{folder} holds no {MANIFEST}; name a folder that `lwcompile compress` or `export` wrote")
    try:
        manifest: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error}); write the model again") from error
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise BadInput(f"{folder / name} is missing or not whole ({size} bytes expected); write the model again")
    return Artifact(folder, dict(manifest))
