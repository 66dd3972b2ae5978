"""The flags that commands share: dataclasses of typer options, and `flags`, which lets a command take them as they are.

    @flags
    def export(path: Path, source: Source, budget: Budgets, run: Run) -> None: ...

is a command with every field of the three dataclasses as an option of its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option


@dataclass(frozen=True)
class Source:
    """What is compiled."""

    model: Annotated[
        str | None,
        Option(help="A Hugging Face folder, .gguf, .pt2, folder of `compress`, or module:function. Without it: the demo model."),
    ] = None


@dataclass(frozen=True)
class Budgets:
    """What it may cost."""

    recipe: Annotated[str, Option(help="The name of a shipped recipe, or a YAML file.")] = "balanced"
    plan: Annotated[Path | None, Option(help="Use this plan (YAML, may be edited by hand) instead of making one.")] = None
    avg_bits: Annotated[
        float | None, Option("--avg-bits", "--bits", help="At most this many bits per weight, everything stored counted.")
    ] = None
    max_size: Annotated[str | None, Option(help="At most this size, such as 80MB, '45 MB' or 1.2GB.")] = None
    drop_sublayers: Annotated[int | None, Option(help="Drop exactly this many attention and MLP sublayers.", min=0)] = None
    max_kl: Annotated[
        float | None,
        Option(help="At most this damage on held-out samples, its 95 % interval included; once healed, with --heal.", min=0.0),
    ] = None


@dataclass(frozen=True)
class Healing:
    """Whether what the plan changed is trained afterwards."""

    heal: Annotated[
        str | None, Option(help="Train what the plan changed against the dense model, such as 'distill{steps=200}'.")
    ] = None
    no_heal: Annotated[bool, Option("--no-heal", help="Train nothing, whatever the recipe says.")] = False


@dataclass(frozen=True)
class Data:
    """The samples that it runs on (to calibrate, or for `eval` to judge), the unit of damage, and where that runs."""

    dataset: Annotated[
        str | None,
        Option(
            help="Samples to run on: a file or folder (txt, jsonl, parquet, images, npz, safetensors), module:function, "
            "topics, docstrings or random."
        ),
    ] = None
    samples: Annotated[int | None, Option(help="How many of them.", min=1)] = None
    seqlen: Annotated[int | None, Option(help="Tokens per sample.", min=2)] = None
    metric: Annotated[str | None, Option(help="Unit of damage: kl, feature_kl, or your own module:function.")] = None
    device: Annotated[str, Option(help="cpu, cuda or cuda:1.")] = "cpu"
    seed: Annotated[int | None, Option(help="Of sampling and of everything random.")] = None


@dataclass(frozen=True)
class HeldOut:
    """What the result is judged on."""

    eval_dataset: Annotated[
        str | None,
        Option(help="Held-out samples that damage is measured on; named as --dataset is, and sharing nothing with it."),
    ] = None


@dataclass(frozen=True)
class Run:
    """How the run is kept and shown."""

    backend: Annotated[str | None, Option(help="What writes the file; by default its suffix decides.")] = None
    run_dir: Annotated[Path | None, Option(help="Where finished steps are kept, so that a stopped run goes on.")] = None
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what it would take: minutes, memory, disk.")] = False
    json: Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")] = False


Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: typer sees their fields, the command gets the objects."""
    signature = inspect.signature(command, eval_str=True)
    annotations = {name: p.annotation for name, p in signature.parameters.items()}
    groups: dict[str, Any] = {name: kind for name, kind in annotations.items() if dataclasses.is_dataclass(kind)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters[name] = parameter
            continue
        hints = typing.get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters[field.name] = inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])

    def wrapper(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    ordered = sorted(parameters.values(), key=lambda p: p.kind == inspect.Parameter.KEYWORD_ONLY)
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in ordered} | {"return": None}
    return wrapper


def settings(
    budget: Budgets | None = None,
    data: Data | None = None,
    run: Run | None = None,
    healing: Healing | None = None,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """The keyword arguments of the pipeline that flags stand for. `BadInput` for a device or a size that cannot be."""
    from lwcompile.budget import parse_size
    from lwcompile.errors import BadInput, BadPlan

    made: dict[str, Any] = {}
    if budget is not None:
        try:
            size = None if budget.max_size is None else parse_size(budget.max_size)
        except BadPlan as error:
            raise BadInput(f"--max-size: {error}") from None
        if budget.avg_bits is not None and not budget.avg_bits > 0:
            raise BadInput(f"--avg-bits must be above 0, and is {budget.avg_bits:g}")
        if budget.plan is not None and any(v is not None for v in (budget.avg_bits, size, budget.drop_sublayers, budget.max_kl)):
            raise BadInput("--plan says what every site carries, so it takes no budget beside it; leave one of the two out")
        made |= {
            "recipe": budget.recipe, "plan": budget.plan, "avg_bits": budget.avg_bits, "max_bytes": size,
            "drop_sublayers": budget.drop_sublayers, "max_kl": budget.max_kl,
        }  # fmt: skip
    if data is not None:
        made |= dataclasses.asdict(data) | {"device": device(data.device)}
    if run is not None:
        made |= {"backend": run.backend, "run_dir": run.run_dir}
    if healing is not None:
        if healing.no_heal and healing.heal is not None:
            raise BadInput("--heal and --no-heal say opposite things; leave one of the two out")
        made |= {"heal": False if healing.no_heal else healing.heal}
    if held_out is not None:
        made |= {"eval_dataset": held_out.eval_dataset}
    return made


def device(name: str) -> str:
    """`cpu`, or a CUDA device that this machine has; `BadInput` says what is missing. Under torchrun `cuda` is each process's own."""
    from lwcompile.errors import BadInput

    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise BadInput(f"--device is cpu, cuda or cuda:N, and not {name!r}")
    if kind == "cpu":
        return name
    import torch

    if not torch.cuda.is_available():
        raise BadInput(f"--device {name}: torch sees no CUDA device here; use --device cpu, or install a CUDA build of torch")
    if int(index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    return name
