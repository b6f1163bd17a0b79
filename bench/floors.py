"""The least time of a training step on a card, part by part, counted before it has run.

    python -m bench.floors --shape llama-3-8b --card h200

A kernel's floor is the larger of its FLOPs over the card's rate of matrix products and its bytes
over the rate of its memory; a part's is the sum of its kernels'. FLOPs, bytes and launches are
counted (bench/floor_parts.py, bench/floor_dense.py). What is `expected` is guessed: the floor over
a judged share of it, at least 3 µs a kernel, and what the card waits for the host.

Printed are the parts of the fast step and of SpecForge's, tokens a second, the share of the matmul
rate, and memory. Nothing is measured here, and no card is needed.
"""

import argparse
import json
import math
import sys
from typing import Any, NamedTuple

import torch

from bench import common
from bench.floor_dense import dense_step
from bench.floor_parts import C, F, Kernels, Size, fast_step, planned, unmasked
from bench.problem import draft_of, survives_of, turns
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import RowPlan, over_steps, plan_rows, surviving
from eagle3fn.specforge import align_mask


class Card(NamedTuple):
    """Rates measured on random data; a copy counts what it reads and what it writes."""

    products: float  # FLOP/s in bf16
    memory: float  # bytes/s


class OnCards(NamedTuple):
    """A guess for each card."""

    h100: float
    h200: float


CARDS = {"h100": Card(790e12, 3.0e12), "h200": Card(790e12, 4.3e12)}
SIDES = {"fast": fast_step, "SpecForge": dense_step}
LEAST = 3e-6  # seconds of a kernel, its launch gap included

# Guessed: seconds that a card waits in each unroll step. Ours: the host, which under `torch.func`
# takes longer for the forward's small kernels than the card. SpecForge's: `empty_cache`, and copies
# that are waited for.
WAITS = {"fast": OnCards(2.0e-3, 2.3e-3), "SpecForge": OnCards(3.4e-3, 3.4e-3)}

# Guessed: what a part reaches of its floor.
JUDGED = {
    "projection": OnCards(0.75, 0.75),
    "embedding": OnCards(0.7, 0.7),
    # 1,024 columns fill the card once.
    "step-0 keys and values": OnCards(0.6, 0.6),
    # 1,065 rows, 3,584 columns: 126 tiles for 132 processors.
    "queries and output": OnCards(0.6, 0.6),
    "queries, keys, values, output": OnCards(0.7, 0.7),
    # The second-generation kernel: 300 to 350 TFLOP/s, causal.
    "attention, flash": OnCards(0.38, 0.38),
    "attention": OnCards(0.35, 0.35),
    # Sums over 128 and over 4 to 7 elements.
    "attention, own keys": OnCards(0.6, 0.55),
    # 1,065 rows are 8.3 tiles of 128.
    "MLP": OnCards(0.78, 0.78),
    # The scores' gathers read whole sectors, for each step anew.
    "head and loss": OnCards(0.7, 0.65),
    "teacher": OnCards(0.75, 0.72),
    # Blocks of 16 MiB stay in the card's cache between passes.
    "AdamW": OnCards(1.3, 1.05),
}
ELSEWHERE = OnCards(0.9, 0.85)
FOREACH = {"AdamW": OnCards(0.9, 0.85)}  # SpecForge's passes take whole lists of leaves

# A process's context, libraries' workspaces, the benchmark's own products, the allocator's holes.
OVERHEAD = 3 << 30
CHUNK_LOGITS = 256 << 20  # bytes of the logits of a chunk of the head


def floor(kernels: Kernels, card: Card) -> float:
    """Seconds that these kernels take at least."""
    return max(kernels.flops / card.products, (kernels.read + kernels.written) / card.memory)


def parts(side: str, size: Size, card_name: str) -> dict[str, dict[str, float]]:
    """FLOPs, bytes, launches, floor and expected seconds of each part of a step, and of `total`."""
    card = CARDS[card_name]
    judged = JUDGED | (FOREACH if side == "SpecForge" else {})
    by_part: dict[str, dict[str, float]] = {}
    row: dict[str, float] = {}
    for kernels in SIDES[side](size):
        least = floor(kernels, card)
        share = getattr(judged.get(kernels.part, ELSEWHERE), card_name)
        values = {
            "flops": kernels.flops,
            "read": kernels.read,
            "written": kernels.written,
            "launches": kernels.count,
            "floor": least,
            "expected": max(least / share, kernels.count * LEAST),
        }
        row = by_part.setdefault(kernels.part, dict.fromkeys(values, 0))
        for name, value in values.items():
            row[name] += value

    waiting: dict[str, float] = dict.fromkeys(row, 0)
    waiting["expected"] = size.k * getattr(WAITS[side], card_name)
    by_part["waiting"] = waiting
    total = {}
    for name in row:
        total[name] = math.fsum(each[name] for each in by_part.values())
    return by_part | {"total": total}


class Counted(NamedTuple):
    """The bench's batch."""

    size: Size
    row_mask: torch.Tensor  # (B, K, S)
    survives: torch.Tensor | None  # (B, S)
    plan: RowPlan

    @property
    def scored(self) -> torch.Tensor:
        """`(B, K, S)`: the row mask of the surviving rows."""
        return surviving(self.row_mask, self.survives)


def size_of(
    draft: DraftConfig,
    batch: int,
    seq: int,
    masked: float,
    k: int,
    survival: float = 1.0,
    seed: int = 0,
) -> Counted:
    """The bench's batch, its rows and pairs counted."""
    source = torch.Generator().manual_seed(1000 * seed)
    mask = torch.stack([align_mask(turns(seq, masked, source)) for _ in range(batch)])
    row_mask = over_steps(mask, k)
    survives = survives_of(batch, seq, k, survival)
    plan = plan_rows(row_mask, survives)
    return Counted(planned(draft, batch, seq, k, plan), row_mask, survives, plan)


def new_bytes(size: Size, side: str) -> int:
    """What a step holds at its peak beyond weights, masters and moments; too high by up to a third.

    Args:
        size: of the step.
        side: "fast", "plain" or "SpecForge".
    """
    return _fast_bytes(size) if side == "fast" else _dense_bytes(size, side)


def _fast_bytes(size: Size) -> int:
    """What the unroll keeps of each row, and on top of it the larger of two parts.

    A chunk of the head and its fp32 gradient, or three of the MLP's weight gradients (two that are
    added, and their sum). Or all gradients in fp32, if that is more.
    """
    draft = size.draft
    m = size.places
    states = size.states
    h = draft.hidden_size
    i = draft.intermediate_size
    c = draft.draft_vocab_size
    q = draft.num_attention_heads * draft.head_dim
    qkv = (draft.num_attention_heads + 2 * draft.num_key_value_heads) * draft.head_dim

    rows = states * C * (2 * i + 6 * h + 3 * q)
    joined = (2 * i * h + 2 * qkv * h) * C  # weights side by side
    kept = rows + joined + 4 * m * C * (h + q)
    head = 2 * states * h * C + CHUNK_LOGITS + c * h * (F + C)
    backward = (states * h + c * h + 3 * 2 * i * h + 2 * i * h + 6 * size.rows * i) * C
    gradients = size.weights * (C + F)
    return max(kept + head, kept + backward, gradients)


def _dense_bytes(size: Size, side: str) -> int:
    """What each of K steps keeps of every row, and the teacher's distributions and logits.

    "plain": also attention's squares, and what its norms keep in fp32.
    """
    draft = size.draft
    k = size.k
    m = size.places
    h = draft.hidden_size
    n = draft.num_attention_heads
    v = draft.vocab_size
    c = draft.draft_vocab_size
    q = n * draft.head_dim

    step = m * (C * (4 * draft.intermediate_size + 7 * h + 3 * q) + c * (C + F))
    target = m * (v * C + 8 * c * F)
    if side == "SpecForge":
        gradients = size.weights * (C + 2 * F)
        return max(k * step + target, gradients)
    squares = size.batch * n * size.seq * (size.seq + k) * (F + C)
    return k * (step + squares + m * h * 4 * F) + squares + target + m * v * F


def bytes_needed(draft: DraftConfig, batch: int, seq: int, k: int) -> int:
    """Bytes of a card's memory for fast, plain and SpecForge together in one process, one batch.

    Every side holds its own weights, masters and moments; frozen tensors and batch are shared; the
    step that needs most, on all rows, comes on top. An estimate, rather too high: 15% and 3 GiB are
    added to the count.
    """
    size = unmasked(draft, batch, seq, k)
    state = 3 * size.weights * (C + 3 * F)
    frozen = draft.vocab_size * (draft.hidden_size + draft.target_hidden_size) * C
    features = size.places * 4 * draft.target_hidden_size * C
    drawn = draft.vocab_size * draft.target_hidden_size * 2 * F  # while the frozen tensors are made
    step = max(new_bytes(size, side) for side in ("fast", "plain", "SpecForge"))
    return int(1.15 * (max(state + step, drawn) + frozen + features)) + OVERHEAD


def result(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape, on one card or on all.

    Raises:
        UserError: a share or a size out of range.
    """
    if not 0 <= options.masked < 1:
        raise UserError(f"--masked {options.masked}: the share must be in [0, 1); give 0.5")
    if min(options.seq, options.batch, options.k) < 1:
        raise UserError(
            f"--seq {options.seq} --batch {options.batch} --k {options.k}: all must be at least 1"
        )

    if not 0 < options.survival <= 1:
        raise UserError(f"--survival {options.survival}: the chance must be in (0, 1]; give 0.8")

    draft = draft_of(options.shape, None, options.seq)
    settings = (options.batch, options.seq, options.masked, options.k, options.survival)
    counted = size_of(draft, *settings)
    size = counted.size
    cards = [options.card] if options.card else list(CARDS)
    by_card = {}
    for card in cards:
        by_card[card] = {side: parts(side, size, card) for side in SIDES}

    named = ("shape", "seq", "batch", "masked", "k", "survival")
    state = size.weights * (C + 3 * F)
    return {
        "settings": {name: getattr(options, name) for name in named},
        "rows": size.sizes,
        "labels": size.labels,
        "pairs": size.pairs,
        "weights": size.weights,
        "needed_flops": common.flops(draft, counted.scored)._asdict(),
        "dense_flops": common.flops(draft, counted.scored, dense=True)._asdict(),
        "cards": by_card,
        "state_bytes": state,
        "step_bytes": {side: state + new_bytes(size, side) for side in ("fast", "SpecForge")},
        "bytes_needed": bytes_needed(draft, options.batch, options.seq, options.k),
    }


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    rows = " ".join(map(str, found["rows"]))
    lines = [
        f"{rows} rows, {found['labels']} labels, {found['pairs']} pairs, "
        f"{found['weights']:,} trained values"
    ]
    for card, each in found["cards"].items():
        for side, rows in each.items():
            lines.append(f"\n{card}, {side:<21} TFLOP      GB launches floor ms  expected  share")
            whole = rows["total"]["expected"]
            lines += [_line(name, row, whole) for name, row in rows.items()]

        fast = each["fast"]["total"]["expected"]
        dense = each["SpecForge"]["total"]["expected"]
        tokens = found["settings"]["batch"] * found["settings"]["seq"]
        needed = sum(found["needed_flops"].values()) / CARDS[card].products
        lines.append(
            f"{card}: {tokens / fast:,.0f} and {tokens / dense:,.0f} tokens/s, "
            f"{dense / fast:.2f} times; "
            f"fast: {needed / fast:.0%} of the matmul rate on the needed rows"
        )

    peak = {side: value / 2**30 for side, value in found["step_bytes"].items()}
    lines.append(
        f"\npeak of a step: fast {peak['fast']:.1f} GiB, SpecForge {peak['SpecForge']:.1f} GiB, "
        f"both with {found['state_bytes'] / 2**30:.1f} of weights, masters, moments; "
        f"bench in one process: {found['bytes_needed'] / 2**30:.0f} GiB"
    )
    return "\n".join(lines)


def _line(name: str, row: dict[str, float], whole: float) -> str:
    """One part; `whole` is the step's expected time."""
    moved = (row["read"] + row["written"]) / 1e9
    return (
        f"{name:<29} {row['flops'] / 1e12:6.2f} {moved:7.2f} {row['launches']:8.0f} "
        f"{row['floor'] * 1e3:8.2f} {row['expected'] * 1e3:9.2f} {row['expected'] / whole:6.1%}"
    )


def main() -> None:
    parser = common.parser_of(__doc__)
    common.add_shape(parser, "qwen2.5-7b")
    common.add_masked(parser)
    add = parser.add_argument
    add("--seq", type=int, default=2048, help="tokens of a sample (default 2048)")
    add("--batch", type=int, default=1, help="samples of a step (default 1)")
    add("--k", type=int, default=7, help="unroll steps (default 7)")
    about = "chance that a row goes on to the next unroll step (default 1)"
    add("--survival", type=float, default=1.0, help=about)
    add("--card", choices=CARDS, help="one card (default: all)")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = result(options)
    print(json.dumps(found) if options.json else table(found))


if __name__ == "__main__":
    sys.exit(common.program("bench.floors", main))
