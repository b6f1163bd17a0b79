"""The floor of a training step on a card, part by part, before it has run: FLOPs, bytes, launches, time.

A kernel's floor is the larger of its FLOPs over the card's rate of matrix products and its bytes over
the rate of its memory; a part's is the sum of its kernels'. FLOPs, bytes and launches are counted
(`floor_parts`, `floor_dense`). What is `expected` is guessed: the floor over a judged share of it, at
least 3 µs a kernel, and what the card waits for the host.
"""

import argparse
import json
import math
from typing import Any, NamedTuple

import torch

from bench import common
from bench.floor_dense import dense_step
from bench.floor_parts import C, F, Kernels, Size, fast_step
from bench.problem import SHAPES, draft_of, turns
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import contributing_rows
from eagle3fn.specforge.recipe import align_mask


class Card(NamedTuple):
    """Measured on random data; a copy counts what it reads and what it writes."""

    products: float  # FLOP/s in bf16
    memory: float  # bytes/s


CARDS = {"h100": Card(790e12, 3.0e12), "h200": Card(790e12, 4.3e12)}
LEAST = 3e-6  # seconds of a kernel, its launch gap included
# Guessed: seconds that a card waits in each unroll step, on an H100 and on an H200. Ours: the host, which under
# `torch.func` takes longer for the forward's small kernels than the card. SpecForge: `empty_cache`, copies waited for.
WAITS = {"fast": (2.0e-3, 2.3e-3), "SpecForge": (3.4e-3, 3.4e-3)}
SIDES = {"fast": fast_step, "SpecForge": dense_step}
# Guessed: what a part reaches of its floor, on an H100 and on an H200; 0.9 and 0.85 where none is named.
JUDGED = {
    "projection": (0.75, 0.75),
    "embedding": (0.7, 0.7),
    "step-0 keys and values": (0.6, 0.6),  # 1,024 columns fill the card once
    "queries and output": (0.6, 0.6),  # 1,072 rows, 3,584 columns: 126 tiles for 132 processors
    "queries, keys, values, output": (0.7, 0.7),
    "attention, flash": (0.38, 0.38),  # the second-generation kernel: 300 to 350 TFLOP/s, causal
    "attention": (0.35, 0.35),
    "attention, own keys": (0.6, 0.55),  # sums over 128 and over 4 to 7 elements
    "MLP": (0.78, 0.78),  # 1,072 rows are 8.4 tiles of 128
    "head and loss": (0.7, 0.65),  # the scores' gathers read whole sectors, for each step anew
    "teacher": (0.75, 0.72),
    "AdamW": (1.3, 1.05),  # blocks of 16 MiB stay in the card's cache between passes
}
FOREACH = {"AdamW": (0.9, 0.85)}  # SpecForge's passes go over whole lists of leaves
OVERHEAD = (
    3 << 30
)  # a process's context, libraries' workspaces, the benchmark's own products, holes of the allocator


def floor(kernels: Kernels, card: Card) -> float:
    """Seconds that these kernels take at least."""
    return max(kernels.flops / card.products, (kernels.read + kernels.written) / card.memory)


def parts(side: str, size: Size, card_name: str) -> dict[str, dict[str, float]]:
    """FLOPs, bytes, launches, floor and expected seconds of each part of a side's step, and of `total`."""
    card, place = CARDS[card_name], list(CARDS).index(card_name)
    judged = JUDGED | (FOREACH if side == "SpecForge" else {})
    by_part: dict[str, dict[str, float]] = {}
    row: dict[str, float] = {}
    for kernels in SIDES[side](size):
        least = floor(kernels, card)
        share = judged.get(kernels.part, (0.9, 0.85))[place]
        row = by_part.setdefault(kernels.part, {})
        for name, value in (
            ("flops", kernels.flops),
            ("read", kernels.read),
            ("written", kernels.written),
            ("launches", kernels.count),
            ("floor", least),
            ("expected", max(least / share, kernels.count * LEAST)),
        ):
            row[name] = row.get(name, 0) + value
    by_part["waiting"] = dict.fromkeys(row, 0) | {"expected": size.k * WAITS[side][place]}
    total = {
        name: math.fsum(row[name] for row in by_part.values())
        for name in next(iter(by_part.values()))
    }
    return by_part | {"total": total}


def size_of(
    draft: DraftConfig, batch: int, seq: int, masked: float, k: int, seed: int = 0
) -> tuple[Size, torch.Tensor]:
    """The bench's batch: its rows and labels counted, and its aligned mask `(B, S)`."""
    source = torch.Generator().manual_seed(1000 * seed)
    mask = torch.stack([align_mask(turns(seq, masked, source)) for _ in range(batch)])
    rows, labels = (len(contributing_rows(mask, steps)) for steps in (k, 1))
    return Size(draft, batch, seq, k, rows, labels), mask


def new_bytes(size: Size, side: str) -> int:
    """What a side's step holds at its peak beyond weights, masters and moments; from above, by up to a third.

    "fast": what the unroll keeps of each row, then the larger of a chunk of the head beside its fp32 gradient, three of
    the MLP's weight gradients (two to be added, their sum), and all gradients in fp32. "legacy" and "SpecForge": what
    each of K steps keeps of every row, the teacher's distributions and logits, and for "legacy" attention's squares and
    what its norms keep in fp32.
    """
    d, k, m, t = size.draft, size.k, size.places, size.rows
    h, i, n, v, c = (
        d.hidden_size,
        d.intermediate_size,
        d.num_attention_heads,
        d.vocab_size,
        d.draft_vocab_size,
    )
    q, w = n * d.head_dim, (n + 2 * d.num_key_value_heads) * d.head_dim
    gradients, wide = size.weights * C, size.weights * F
    if side == "fast":
        kept = (
            k * t * C * (2 * i + 6 * h + 3 * q) + (2 * i * h + 2 * w * h) * C + 4 * m * C * (h + q)
        )
        head = 2 * k * t * h * C + (256 << 20) + c * h * (F + C)
        backward = (k * t * h + c * h + 3 * 2 * i * h + 2 * i * h + 6 * t * i) * C
        return max(kept + head, kept + backward, gradients + wide)
    step = m * (C * (4 * i + 7 * h + 3 * q) + c * (C + F))
    target = m * (v * C + 8 * c * F)
    if side == "SpecForge":
        return max(k * step + target, gradients + 2 * wide)
    squares = size.batch * n * size.seq * (size.seq + k) * (F + C)
    return k * (step + squares + m * h * 4 * F) + squares + target + m * v * F


def bytes_needed(draft: DraftConfig, batch: int, seq: int, k: int) -> int:
    """Bytes of a card's memory for the bench's sides together in one process: fast, legacy, SpecForge, one batch.

    Every side holds its own weights, masters and moments; frozen tensors and batch are shared; on top lies the step
    that needs most, on all rows. An estimate, rather too high: 15% and 3 GiB are added to the count.
    """
    size = Size(draft, batch, seq, k, batch * seq, batch * seq)
    state = 3 * size.weights * (C + 3 * F)
    frozen = draft.vocab_size * (draft.hidden_size + draft.target_hidden_size) * C
    given = size.places * 4 * draft.target_hidden_size * C
    drawn = (
        draft.vocab_size * draft.target_hidden_size * (2 * F)
    )  # while the frozen tensors are made
    step = max(new_bytes(size, side) for side in ("fast", "plain", "SpecForge"))
    return int(1.15 * (max(state + step, drawn) + frozen + given)) + OVERHEAD


def result(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape on the cards asked for."""
    if not 0 <= options.masked < 1:
        raise UserError(f"--masked {options.masked}: the share must be in [0, 1); give 0.5")
    if min(options.seq, options.batch, options.k) < 1:
        raise UserError(
            f"--seq {options.seq} --batch {options.batch} --k {options.k}: all must be at least 1"
        )
    draft = draft_of(options.shape, None, options.seq)
    size, mask = size_of(draft, options.batch, options.seq, options.masked, options.k)
    state = size.weights * (C + 3 * F)
    return {
        "settings": {
            name: getattr(options, name) for name in ("shape", "seq", "batch", "masked", "k")
        },
        "rows": size.rows,
        "labels": size.labels,
        "weights": size.weights,
        "needed_flops": common.flops(draft, mask, options.k)._asdict(),
        "dense_flops": common.flops(draft, mask, options.k, dense=True)._asdict(),
        "cards": {
            name: {side: parts(side, size, name) for side in SIDES}
            for name in ([options.card] if options.card else CARDS)
        },
        "state_bytes": state,
        "step_bytes": {side: state + new_bytes(size, side) for side in ("fast", "SpecForge")},
        "bytes_needed": bytes_needed(draft, options.batch, options.seq, options.k),
    }


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{found['rows']} rows, {found['labels']} labels, {found['weights']:,} trained values"]
    for card, each in found["cards"].items():
        for side, rows in each.items():
            lines.append(f"\n{card}, {side:<21} TFLOP      GB launches floor ms  expected  share")
            whole = rows["total"]["expected"]
            for name, row in rows.items():
                moved = (row["read"] + row["written"]) / 1e9
                lines.append(
                    f"{name:<29} {row['flops'] / 1e12:6.2f} {moved:7.2f} {row['launches']:8.0f} "
                    f"{row['floor'] * 1e3:8.2f} {row['expected'] * 1e3:9.2f} {row['expected'] / whole:6.1%}"
                )
        fast, dense = (each[side]["total"]["expected"] for side in SIDES)
        tokens = found["settings"]["batch"] * found["settings"]["seq"]
        needed = sum(found["needed_flops"].values()) / CARDS[card].products
        lines.append(
            f"{card}: {tokens / fast:,.0f} and {tokens / dense:,.0f} tokens/s, {dense / fast:.2f} times; "
            f"fast: {needed / fast:.0%} of the matmul rate on the needed rows"
        )
    peak = {side: value / 2**30 for side, value in found["step_bytes"].items()}
    lines.append(
        f"\npeak of a step: fast {peak['fast']:.1f} GiB, SpecForge {peak['SpecForge']:.1f} GiB, both with "
        f"{found['state_bytes'] / 2**30:.1f} of weights, masters, moments; bench in one process: "
        f"{found['bytes_needed'] / 2**30:.0f} GiB"
    )
    return "\n".join(lines)


def main() -> None:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add(
        "--shape",
        choices=SHAPES,
        default="qwen2.5-7b",
        help="the draft's shape (default qwen2.5-7b)",
    )
    add("--seq", type=int, default=2048, help="tokens of a sample (default 2048)")
    add("--batch", type=int, default=1, help="samples of a step (default 1)")
    add("--masked", type=float, default=0.5, help="share of masked tokens (default 0.5)")
    add("--k", type=int, default=7, help="unroll steps (default 7)")
    add("--card", choices=CARDS, help="one card (default: all)")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = result(options)
    print(json.dumps(found) if options.json else table(found))


if __name__ == "__main__":
    common.guarded(main)
