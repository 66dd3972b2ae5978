"""What attention costs by sequence length, and from which length on another form of it pays.

    softmax   every key so far                    FLOPs grow with the length, and so does the cache
    window    the last `size` keys and the sinks  both stop growing
    linear    a window, and a state for the rest  both stop growing; the state and the feature maps cost from the start
    latent    every key so far, made anew         the cache grows more slowly, and FLOPs faster
    both ways no cache; a window reaches to both sides, and its sinks read all; ReLU maps have no window, and a convolution

Counted for one sequence in one layer: products of queries with keys and of weights with values, feature maps, the state's update
and its reading; a multiplication and an addition are two FLOPs. Projections are the same in all three and not counted, and
neither are softmaxes. These are the method's figures: a runtime that computes a window as a mask over all keys saves its cache,
and its FLOPs only while decoding from a cache that rolls. ONNX files compute near keys only (a block of queries at a time), but
for windows to both sides with sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LONGEST = 1 << 24
"""Tokens; a form that pays from nowhere up to here does not pay."""


@dataclass(frozen=True)
class AttentionCost:
    """One attention layer.

    heads, kv_heads: of queries; of keys and values. key_width, value_width: a head's.
    window: keys that each query reads, itself among them; None for all. sinks: first keys that all read beside these.
    features: of the linear part, 0 without one. causal: each reads what is before it, else all read all.
    taps: of a convolution of the values.
    latent: numbers cached for each token in the place of its keys and values, 0 for those. revived: products that make a cached
        token's keys and values of them.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None = None
    sinks: int = 0
    features: int = 0
    causal: bool = True
    taps: int = 0
    latent: int = 0
    revived: int = 0

    @property
    def token_numbers(self) -> int:
        """Numbers that one token takes in the cache."""
        return self.latent or self.kv_heads * (self.key_width + self.value_width)

    @property
    def capacity(self) -> int | None:
        """Cached tokens beside the one that asks; None without a bound."""
        return None if self.window is None else self.window - 1 + self.sinks

    def state_numbers(self) -> int:
        """Numbers in the linear part's state: for each feature a sum of values, and the normaliser."""
        return self.kv_heads * self.features * (self.value_width + 1)

    def cache_bytes(self, length: int, itemsize: int = 4) -> int:
        """What decoding keeps behind `length` tokens."""
        kept = length if self.capacity is None else min(length, self.capacity)
        return itemsize * (kept * self.token_numbers + self.state_numbers())

    def decode_flops(self, length: int) -> int:
        """One more token behind `length`."""
        keys = length + 1 if self.capacity is None else min(length, self.capacity) + 1
        pairs = 2 * keys * self.heads * (self.key_width + self.value_width) + 2 * (keys - 1) * self.revived
        maps = (self.heads + self.kv_heads) * self.key_width * (self.features // 2)
        return pairs + 2 * maps + 2 * (self.heads + self.kv_heads) * self.features * (self.value_width + bool(self.features))

    def prefill_flops(self, length: int) -> int:
        """`length` tokens at once, each reading those before it, or all."""
        each = 2 * self.heads * (self.key_width + self.value_width)
        fixed = self.decode_flops(0) - (each if self.window != 0 else 0) + 2 * self.taps * self.kv_heads * self.value_width
        return self._pairs(length) * each + length * fixed

    def _pairs(self, length: int) -> int:
        if not self.causal:
            bound = length if self.window is None else min(length, self.window)
            beyond = range(self.window, self.window + self.sinks) if self.window is not None else ()
            near = length + (bound - 1) * (2 * length - bound) if bound else 0
            return near + 2 * sum(max(0, length - start) for start in beyond)
        bound = length if self.capacity is None else min(length, self.capacity + 1)
        return bound * (bound + 1) // 2 + (length - bound) * bound


def pays_from(new: Callable[[int], int], old: Callable[[int], int]) -> int | None:
    """The least length at which `new` costs less than `old`, once it stays so; None if there is none up to `LONGEST`."""
    if new(LONGEST) >= old(LONGEST):
        return None
    low, high = 0, LONGEST  # new(low) >= old(low) or low is 0, new(high) < old(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if new(middle) < old(middle) else (middle, high)
    return high


def say(new: AttentionCost, old: AttentionCost, length: int = 2048) -> tuple[str, dict[str, float]]:
    """A sentence and its figures: from which lengths `new` pays, and, if causal, its cache behind `length` tokens in float32."""
    lengths = {"prefill": pays_from(new.prefill_flops, old.prefill_flops)}
    if new.causal:
        caches = {"cache": pays_from(new.cache_bytes, old.cache_bytes), "decode": pays_from(new.decode_flops, old.decode_flops)}
        lengths = caches | lengths
    parts = [f"{name} {'nowhere' if n is None else f'from {n} tokens'}" for name, n in lengths.items()]
    text = f"pays in {', '.join(parts)} on"
    numbers = {f"{name}_pays_from": float(n) for name, n in lengths.items() if n is not None}
    if not new.causal:
        return text, numbers
    before, after = old.cache_bytes(length), new.cache_bytes(length)
    text += f"; its cache behind {length} tokens is {after:,} bytes instead of {before:,}"
    each = {"cache_per_token": 4 * new.token_numbers} if new.latent else {}
    return text, {**numbers, "cache_before": before, "cache_after": after, **each}
