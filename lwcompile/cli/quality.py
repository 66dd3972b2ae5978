"""`eval` measures a compressed model against the dense one; `chat` talks to it, or to both side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lwcompile.cli.console import note, out, show, show_json
from lwcompile.cli.flags import Data, Json, Source, flags, settings
from lwcompile.cli.make import open_model, progress

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

    from lwcompile.artifact import Artifact
    from lwcompile.damage import Estimate
    from lwcompile.session import Session


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
    app.command()(chat)


@flags
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `compress` or `export` wrote: the folder or its file.")],
    source: Source, data: Data,
    recipe: Annotated[str, typer.Option(help="Whose metric and samples are used where no flag says otherwise.")] = "balanced",
    json: Json = False,
) -> None:  # fmt: skip
    """Measure damage, agreement and perplexity against the dense model, each with its 95 % interval."""
    from lwcompile import pipeline
    from lwcompile.recipe import Recipe

    words = settings(data=data)
    artifact = pipeline.load(folder_of(folder))
    held_out = {"dataset": words.pop("dataset"), "samples": words.pop("samples"), "seqlen": words["seqlen"]}
    words["recipe"] = Recipe.find(recipe).with_(evaluation=held_out)
    session = pipeline.session(open_model(source.model), pipeline.Settings(**words), progress())
    base = artifact.manifest.get("base", {})
    if base.get("program") not in (None, session.digest):
        note(f"{folder} was made from {base.get('name', 'another model')}, which is not the model it is compared with here")
    found = measure(session, artifact)
    if json:
        rows = {name: estimate.to_json() for name, estimate in found.items()}
        return show_json({"unit": session.metric.unit, "dataset": session.evaluation.describe(), **rows})
    show(estimates_table(found))


def measure(session: Session, artifact: Artifact) -> dict[str, Estimate]:
    """The artifact's program in this process, or its file in its own runtime, against the dense model."""
    if artifact.manifest.get("model") is None:
        return session.measure(artifact.program)
    import torch

    from lwcompile.damage import evaluate as compare
    from lwcompile.executor import Executor

    dense = Executor(session.dense, session.device)
    batches = list(session.evaluation.batches(session.context.batch_size, dense.inputs()))
    with session.progress.task("measuring", len(batches)) as task:

        def outputs(run: Callable[[dict[str, Tensor]], Any], steps: int) -> Iterator[Any]:
            for batch in batches:
                with torch.no_grad():  # not around the yield: interleaved generators would leave gradients off
                    made = run(batch)
                yield made
                task.advance(steps)

        theirs = outputs(lambda batch: artifact.run(**batch), 1)
        return compare(session.metric, outputs(dense.run, 0), theirs, batches, session.recipe.seed)


def estimates_table(found: dict[str, Estimate]) -> Any:
    from rich.table import Table

    drawn = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("", "mean", "95 % interval", "", "values"):
        drawn.add_column(heading, justify="right" if heading in ("mean", "values") else "left")
    for name, e in found.items():
        drawn.add_row(name, f"{e.mean:.4g}", f"{e.low:.4g} to {e.high:.4g}", e.unit, f"{e.n:,}")
    return drawn


def folder_of(path: Path) -> Path:
    return path.parent if path.is_file() else path


# --- chat


def chat(
    model: Annotated[str, typer.Argument(metavar="DIR", help="What `compress` or `export` wrote, or any model.")],
    compare: Annotated[str | None, typer.Option(metavar="DENSE", help="Answer with this model too, side by side.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and leave, instead of asking for lines.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    json: Json = False,
) -> None:
    """Talk to a compressed model; with --compare beside the dense one, the first token that differs marked."""
    from lwcompile.errors import BadInput

    if json and prompt is None:
        raise BadInput("--json needs --prompt: a conversation is no JSON document")
    speakers = [open_speaker(model, raw)] + ([open_speaker(compare, raw)] if compare is not None else [])
    if json:
        return show_json(as_json(speakers, [speaker.reply(prompt or "", max_tokens) for speaker in speakers]))
    if prompt is not None:
        return answer(speakers, prompt, max_tokens)
    note("an empty line or Ctrl-D ends the conversation")
    while line := ask():
        answer(speakers, line, max_tokens)


def ask() -> str:
    try:
        return out().input("[bold]> [/]").strip()
    except EOFError:
        return ""


@dataclass
class Speaker:
    """A model that answers. Each keeps its own conversation: what it said itself is what it is reminded of."""

    name: str
    step: Any
    tokenizer: Any
    raw: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str, max_tokens: int, say: Callable[[str], None] | None = None) -> list[int]:
        """The tokens of the answer, greedily, without the end token; `say` gets its text piece by piece."""
        from lwcompile.generate import stream

        self.messages.append({"role": "user", "content": text})
        eos, made, said = self.tokenizer.eos_token_id, [], ""
        for tokens in stream(self.step, self._ids(text), max_new_tokens=max_tokens, eos=eos):
            if (token := int(tokens[0])) == eos:
                break
            made.append(token)
            whole = self.text(made)
            if say is not None and not whole.endswith("\ufffd"):  # half of a character comes with the next token
                say(whole[len(said) :])
                said = whole
        self.messages.append({"role": "assistant", "content": self.text(made)})
        return made

    def _ids(self, text: str) -> Tensor:
        if self.raw or not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer(text, return_tensors="pt")["input_ids"]
        whole = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def open_speaker(source: str, raw: bool) -> Speaker:
    """A loaded artifact, or any model that can be captured and continued."""
    from lwcompile import pipeline
    from lwcompile.artifact import MANIFEST, program_step
    from lwcompile.errors import BadInput

    folder = folder_of(Path(source))
    if (folder / MANIFEST).is_file():
        artifact = pipeline.load(folder)
        step, tokenizer = artifact.step, artifact.tokenizer
    else:
        program = pipeline.capture(source)
        step, tokenizer = program_step(program), program.tokenizer()
    if tokenizer is None:
        raise BadInput(f"{source} has no tokenizer, so there is nothing to chat with; put its tokenizer files beside it")
    return Speaker(source, step, tokenizer, raw)


def as_json(speakers: list[Speaker], replies: list[list[int]]) -> dict[str, Any]:
    from lwcompile.generate import divergence

    rows = [{"model": s.name, "text": s.text(ids), "tokens": ids} for s, ids in zip(speakers, replies)]
    if len(rows) == 1:
        return rows[0]
    return {"replies": rows, "diverges_at": divergence(*replies)}


def answer(speakers: list[Speaker], text: str, max_tokens: int) -> None:
    """One model's answer as it comes; two models' as columns, the first token that differs in reverse."""
    from rich.table import Table
    from rich.text import Text

    from lwcompile.generate import divergence

    if len(speakers) == 1:
        speakers[0].reply(text, max_tokens, lambda piece: typer.echo(piece, nl=False))
        return typer.echo()
    replies = [speaker.reply(text, max_tokens) for speaker in speakers]
    at = divergence(*replies)
    drawn = Table(expand=True)
    for speaker in speakers:
        drawn.add_column(Text(speaker.name), ratio=1)
    drawn.add_row(*(marked(speaker, ids, at) for speaker, ids in zip(speakers, replies)))
    out().print(drawn)
    same = f"the same {len(replies[0])} tokens" if at is None else f"the same up to token {at}"
    note(same)


def marked(speaker: Speaker, ids: list[int], at: int | None) -> Text:
    """The answer, with the token at `at` in reverse (in brackets where there is no colour)."""
    from rich.text import Text

    if at is None:
        return Text(speaker.text(ids))
    before, upto, whole = speaker.text(ids[:at]), speaker.text(ids[: at + 1]), speaker.text(ids)
    token = upto[len(before) :] or "(end)"
    plain = out().color_system is None
    return Text.assemble(before, (f"[{token}]" if plain else token, "bold reverse"), whole[len(upto) :])
