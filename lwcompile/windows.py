"""From texts to token windows: equal lengths, contiguous, no two overlapping, the same bytes for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from lwcompile.errors import BadInput

PIECE_CHARACTERS = 1 << 18
"""Long texts are cut (at a line's end) into pieces of this size, so that only what is sampled is tokenised."""


def token_windows(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int = 0,
    order: str = "random",
    source: str = "the text",
) -> Tensor:
    """`samples` windows of `seqlen` contiguous tokens, int64 [samples, seqlen], no two overlapping.

    Texts are joined by the tokeniser's end-of-text token, where it has one that it does not add itself. The special
    tokens that it puts around a text ([CLS] ... [SEP], <s> ...) stand around each window and count in `seqlen`.
    At random, texts are drawn until there are four times as many tokens as needed, then windows among those.
    """
    before, after = special_tokens(tokenizer)
    body = seqlen - len(before) - len(after)
    if body < 1:
        raise BadInput(f"seqlen {seqlen} leaves no room beside the {len(before) + len(after)} special tokens of a text")
    end = getattr(tokenizer, "eos_token_id", None)
    separator = [end] if isinstance(end, int) and end not in after else []
    pieces = [(piece, number == 0) for text in texts for number, piece in enumerate(cut(text))]
    shuffled = random.Random(seed)
    if order == "random":
        pieces = [(piece, True) for piece, _ in shuffled.sample(pieces, len(pieces))]
    enough = samples * body * (4 if order == "random" else 1)
    ids: list[int] = []
    for piece, opens_text in pieces:
        if len(ids) >= enough:
            break
        ids.extend(separator if ids and opens_text else ())
        ids.extend(encode(tokenizer, piece))
    available = len(ids) // body
    if available < samples:
        raise BadInput(
            f"{source} holds {available} windows of {seqlen} tokens, and {samples} were asked for: lower --samples or "
            "--seqlen, or give more text"
        )
    chosen = shuffled.sample(range(available), samples) if order == "random" else range(samples)
    return torch.tensor([[*before, *ids[i * body : (i + 1) * body], *after] for i in chosen], dtype=torch.int64)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return list(tokenizer(text))


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a Hugging Face tokeniser puts before and after a text; nothing for a plain callable."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [], []
    plain, whole = encode(tokenizer, "a b"), list(tokenizer("a b")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def describe_tokenizer(tokenizer: Any) -> str:
    """Kind, vocabulary size and a hash of the tokeniser: equal strings cut texts equally."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(encode(tokenizer, "The quick brown fox, 1984."))
    name = getattr(tokenizer, "__name__", type(tokenizer).__name__)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    return f"{name}, {size} tokens, {xxhash.xxh3_64_hexdigest(whole.encode())}"


def render_chat(messages: list[dict[str, Any]], tokenizer: Any, source: str) -> str:
    """One conversation as the text that the tokeniser's chat template makes of it."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(f"{source} holds conversations, and this tokenizer has no chat template: give plain texts")
    return tokenizer.apply_chat_template(messages, tokenize=False)


def cut(text: str) -> Iterator[str]:
    """The text in pieces of about `PIECE_CHARACTERS`, cut behind a line's end."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.find("\n", end) + 1 or len(text)
        yield text[start:end]
        start = end
