# ruff: noqa: E501, RUF005
"""A report as a 30-block language model would leave it: numbers from a seed, not from a model."""

from __future__ import annotations

import math
import random

from lwcompile.budget import Budget
from lwcompile.plans import Plan
from lwcompile.report import Report
from lwcompile.spec import KEEP, Spec
from lwcompile.table import Choice, Group, OptionTable, SiteRow

LINEARS = {
    "attention": {"q_proj": 1.0, "k_proj": 0.4, "v_proj": 1.6, "o_proj": 1.2},
    "mlp": {"gate_proj": 0.9, "up_proj": 1.1, "down_proj": 2.4},
}
SHAPES = {
    "q_proj": 576 * 576,
    "k_proj": 192 * 576,
    "v_proj": 192 * 576,
    "o_proj": 576 * 576,
    "gate_proj": 1536 * 576,
    "up_proj": 1536 * 576,
    "down_proj": 1536 * 576,
}
WIDTHS = ((2, 64), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 64), (8, 64))


def _numeric(parameters: int, weight: float, rng: random.Random, odd_refused: bool = False) -> tuple[Choice, ...]:
    made = []
    for bits, group in WIDTHS:
        stored = math.ceil(parameters * bits / 8) + parameters // group * 3
        damage = weight * 4e-3 * 4.2 ** (3 - bits) * (group / 64) ** 0.4 * rng.uniform(0.7, 1.4)
        refused = (
            "the runtime has no 5-bit product, and two supported widths cost more than 6 bits"
            if odd_refused and bits == 5
            else None
        )
        made.append(Choice(Spec.of("quantize", bits=bits, group_size=group), damage, stored, damage / 12, refused))
    return tuple(made)


def fake_table(blocks: int = 30, seed: int = 0) -> OptionTable:
    rng = random.Random(seed)
    rows: dict[str, SiteRow] = {}
    groups = []
    embedding = 49152 * 576
    rows["embedding"] = SiteRow("embedding", None, "embedding", embedding, embedding * 4, _numeric(embedding, 9.0, rng))
    for b in range(blocks):
        depth = 1.0 + 4.0 * math.exp(-b / 2) + 2.0 * math.exp(-(blocks - 1 - b) / 1.5)
        block = f"block{b}"
        rows[block] = SiteRow(
            block, None, "block", 0, 0, (Choice(Spec("drop"), 0.35 * depth * rng.uniform(0.8, 1.2), 0, silences=True),)
        )
        for sub, linears in LINEARS.items():
            name = f"{block}.{sub}"
            refused = "its branch is read by an output of the model" if b == 0 else None
            rows[name] = SiteRow(
                name,
                block,
                sub,
                0,
                0,
                (Choice(Spec("drop"), 0.11 * depth * rng.uniform(0.4, 1.9), 0, 0.01, refused, silences=True),),
            )
            for linear, weight in linears.items():
                id, count = f"{name}.{linear}", SHAPES[linear]
                rows[id] = SiteRow(
                    id, name, "linear", count, count * 4, _numeric(count, weight * depth, rng, odd_refused=b % 7 == 3)
                )
        groups.append(Group(f"{block}.qkv", tuple(f"{block}.attention.{p}_proj" for p in "qkv")))
        groups.append(Group(f"{block}.gate_up", (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")))
    rows["head"] = SiteRow("head", None, "linear", embedding, embedding * 4, tuple(c for c in _numeric(embedding, 14.0, rng)))
    groups.append(Group("embedding+head", ("embedding", "head"), "tied"))
    parameters = sum(row.parameters for row in rows.values()) - embedding
    return OptionTable("nats/token", parameters, rows, tuple(groups), fixed_bytes=160_000)


def fake_plan(table: OptionTable, price: float, drops: tuple[str, ...] = ()) -> Plan:
    """What costs least when a byte costs `price`: good enough to look at."""
    choices = {site: (Spec("drop"),) for site in drops}
    for unit in table.units:
        if table.sites[unit.sites[0]].parameters:
            cost = {
                options: sum(
                    table.sites[s].choice(options).predicted + price * table.sites[s].choice(options).bytes for s in unit.sites
                )
                for options in unit.options
                if options != (KEEP,)
            }
            best = min(cost, key=cost.__getitem__)
            choices |= {site: best for site in unit.sites}
    return Plan.of(table, choices, Budget(avg_bits=4.25))


def fake_report(blocks: int = 30, name: str = "SmolLM2-135M-Instruct") -> Report:
    rng = random.Random(1)
    table = fake_table(blocks)
    drops = tuple(f"block{b}.attention" for b in (blocks // 2, blocks * 2 // 3)) + (f"block{blocks * 5 // 6}",)
    plan = fake_plan(table, 7e-9, drops)
    curve = sorted(
        (
            fake_plan(
                table,
                10 ** (-10 + 0.17 * k),
                tuple(f"block{b}.attention" for b in range(blocks * 2 // 5, min(blocks, blocks * 2 // 5 + k // 3))),
            )
            for k in range(20)
        ),
        key=lambda p: p.bytes or 0,
    )
    damages = [(s, c) for s, row in table.sites.items() for c in row.choices if c.damage > 0 and c.refused is None]
    pairs = [
        {"site": s, "option": str(c.option), "measured": c.damage, "predicted": c.damage * math.exp(rng.gauss(-0.1, 0.45))}
        for s, c in rng.sample(damages, min(60, len(damages)))
    ]
    weak = [{**p, "predicted": p["measured"] ** 0.7 * math.exp(rng.gauss(-1, 0.9))} for p in pairs[:40]]
    predicted = plan.predicted or 0.1
    return Report.build(
        name=name, table=table, plan=plan, curve=curve, license="Apache-2.0",
        recipe={"name": "balanced", "allocator": "integer_program", "solver": "gptq"},
        measured={"value": predicted * 1.18, "low": predicted * 1.08, "high": predicted * 1.29, "samples": 96},
        evaluation={
            "dense": {"perplexity": {"mean": 22.51, "low": 21.3, "high": 23.8, "n": 12288, "unit": "perplexity"}},
            "compressed": {
                "perplexity": {"mean": 25.02, "low": 23.6, "high": 26.5, "n": 12288, "unit": "perplexity"},
                "agreement": {"mean": 0.871, "low": 0.862, "high": 0.880, "n": 12288, "unit": "of argmax"},
            },
        },
        remarks=[
            {"pass": "drop", "site": drops[0], "kind": "did", "text": "removed, with its four projections and its norm", "numbers": {"parameters": 884736}},
            *(
                {"pass": "quantize", "site": f"block{b}.attention.q_proj", "kind": "did", "text": "solved by gptq, error against round-to-nearest", "numbers": {"ratio": 0.61}}
                for b in range(blocks)
            ),
            {"pass": "fuse_norms", "site": None, "kind": "note", "text": "61 norms folded into the linears after them <b>not markup</b>", "numbers": {"norms": 61}},
        ],
        analyses=[
            {"name": "fisher", "seconds": 41.2, "spearman": 0.93, "plan_predicted": 0.21, "plan_measured": 0.24, "pairs": pairs},
            {"name": "block_influence", "seconds": 3.9, "spearman": 0.58, "plan_predicted": 0.18, "plan_measured": 0.41, "pairs": weak},
            {"name": "zd", "seconds": 0.7, "spearman": 0.31, "plan_predicted": 0.2, "plan_measured": 0.55},
        ],
        speed={
            "before": {"prefill_ms": 110.2, "decode_ms": 15.5, "file_bytes": 538_091_264},
            "after": {"prefill_ms": 84.9, "decode_ms": 8.3, "file_bytes": 74_310_220},
        },
        parity={"errors": {"logits": 3.1e-6}, "tolerance": 1e-4, "note": "float32 activations"},
        bytes={"file": 74_310_220, "graph": 412_000},
        seconds={"capture": 7.1, "structure": 0.4, "damage": 512.0, "fisher": 41.2, "plan": 2.2, "quantize": 171.0, "lower": 14.1, "verify": 9.3},
        versions={"python": "3.11.9", "torch": "2.13.0", "onnxruntime": "1.31.0", "lwcompile": "0.1.0"},
        calibration={"source": "topics", "samples": 64, "seqlen": 256, "hash": "5f1c9e"},
        seed=0,
    )  # fmt: skip
