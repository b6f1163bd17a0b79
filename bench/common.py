"""The matmul rate, timing in turns, counted FLOPs, and the JSON of a result."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.train.launch import World

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
APART = 0.02  # relative difference of losses beyond which sides do not compute the same
CPU_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 1152, 576))
CUDA_SIZES = ((8192, 8192, 8192), (4096, 4096, 16384))


def synchronize(device: str) -> None:
    """Wait for the device; nothing on CPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, its device work included."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


class Matmul(NamedTuple):
    """The product that the matmul rate is measured by."""

    size: tuple[int, int, int]  # rows, inner, columns
    flops: int
    call: Callable[[], object]


def best_matmul(dtype: torch.dtype, device: str) -> Matmul:
    """Of a few large products the one with the highest rate here."""
    found = []
    for rows, inner, columns in CPU_SIZES if device == "cpu" else CUDA_SIZES:
        x = torch.randn(rows, inner, device=device).to(dtype)
        weight = torch.randn(columns, inner, device=device).to(dtype)
        repeat = max(1, int(2e9 // (rows * inner * columns))) if device == "cpu" else 10
        call = _repeated(x, weight, repeat)
        flops = 2 * rows * inner * columns * repeat
        took = min(seconds(call, device) for _ in range(4))
        found.append((flops / took, Matmul((rows, inner, columns), flops, call)))
    return max(found, key=lambda pair: pair[0])[1]


def _repeated(x: Tensor, weight: Tensor, count: int) -> Callable[[], object]:
    def call() -> None:
        for _ in range(count):
            torch.nn.functional.linear(x, weight)

    return call


def check_losses(losses: dict[str, float]) -> None:
    """Refuse to time sides that compute different things."""
    first = next(iter(losses.values()))
    if not all(abs(loss - first) <= APART * abs(first) for loss in losses.values()):
        raise UserError(
            f"first losses {losses}: more than {APART:.0%} apart, so the sides do not compute the same"
        )


class Timing(NamedTuple):
    """Seconds of every call in every round, and the matmul rate of the same rounds."""

    seconds: dict[str, list[float]]
    rates: list[float]  # FLOP/s
    matmul_size: tuple[int, int, int]

    def ratio(self, over: str, under: str) -> float:
        """Median of the rounds' ratios of two calls' times."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return median(a / b for a, b in pairs)

    def share(self, name: str, count: float) -> float:
        """The part of the matmul rate that a call of `count` FLOPs reaches; median of the rounds."""
        return median(
            count / took / rate for took, rate in zip(self.seconds[name], self.rates, strict=True)
        )

    def told(self) -> dict[str, Any]:
        """Medians and all values, for a result."""
        return {
            "seconds": {name: median(took) for name, took in self.seconds.items()},
            "matmul_gflops": median(self.rates) / 1e9,
            "matmul_size": self.matmul_size,
            "all_seconds": self.seconds,
        }


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    dtype: torch.dtype,
    device: str,
    world: World,
    warm: int,
) -> Timing:
    """Time every call once a round, beside the matmul; `warm` earlier rounds are left out.

    Who begins changes from round to round. Of several ranks, which begin each call together, a side's slowest and the
    matmul's fastest counts.
    """
    matmul = best_matmul(dtype, device)
    every = {**calls, "matmul": matmul.call}
    names, times = list(every), {name: [] for name in every}
    for number in range(-warm, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            world.barrier()
            took = seconds(every[name], device)
            if number >= 0:
                times[name].append(took)
    spread = world.every(times)
    slowest = {
        name: [max(turn) for turn in zip(*(part[name] for part in spread), strict=True)]
        for name in calls
    }
    fastest = [min(turn) for turn in zip(*(part["matmul"] for part in spread), strict=True)]
    return Timing(slowest, [matmul.flops / took for took in fastest], matmul.size)


class Flops(NamedTuple):
    """What a step must compute, by part: six for each multiply-add of the forward, teacher and projection less."""

    projection: int  # fc: its input needs no gradient, so four
    keys_values: int
    queries_output: int
    attention: int  # causal: a query sees the block up to its row, and a key a step
    mlp: int
    head: int
    teacher: int  # the target's head, forward alone

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self)


def needed_rows(mask: Tensor, k: int) -> Tensor:
    """`(K, B, S)` bool: row `t` reaches a loss term at step `i` or a later one, by an aligned mask `(B, S)`."""
    s = mask.shape[1]
    labels = torch.nn.functional.pad(mask > 0, (0, k))
    trained = torch.stack([labels[:, i : i + s] for i in range(k)])
    return trained.flip(0).cummax(0).values.flip(0)


def row_shares(mask: Tensor, k: int) -> dict[str, float]:
    """Of all rows: those with a masked loss, those needed at step 0, and the mean of those needed at each step."""
    need = needed_rows(mask, k).float()
    return {
        "masked": 1 - float((mask > 0).float().mean()),
        "needed": float(need[0].mean()),
        "needed_over_steps": float(need.mean()),
    }


def flops(draft: DraftConfig, mask: Tensor, k: int, dense: bool = False) -> Flops:
    """FLOPs of a step's forward and backward on the rows it needs; `dense`: on all of `mask`'s `(B, S)` rows.

    A row that is not needed gives its step-0 key and value.
    """
    every = torch.ones_like(mask)
    need = needed_rows(mask.cpu(), k) if not dense else every.bool().cpu().expand(k, *mask.shape)
    labels = torch.nn.functional.pad(mask.cpu() > 0, (0, k))
    trained = sum(int(labels[:, i : i + mask.shape[1]].sum()) for i in range(k))
    taught = int(labels.sum())
    if dense:
        trained, taught = k * mask.numel(), mask.numel()
    rows, later, total = int(need.sum()), int(need[1:].sum()), mask.numel()
    seen = torch.arange(1, mask.shape[1] + 1) + torch.arange(k)[:, None, None]
    pairs = int((seen * need).sum())
    h, n, j, e = (
        draft.hidden_size,
        draft.num_attention_heads,
        draft.num_key_value_heads,
        draft.head_dim,
    )
    return Flops(
        projection=4 * total * 3 * draft.target_hidden_size * h,
        keys_values=6 * (total + later) * 2 * 2 * h * j * e,
        queries_output=6 * rows * (2 * h * n * e + n * e * h),
        attention=6 * pairs * 2 * n * e,
        mlp=6 * rows * 3 * h * draft.intermediate_size,
        head=6 * trained * h * draft.draft_vocab_size,
        teacher=2 * taught * draft.target_hidden_size * draft.vocab_size,
    )


def finish(result: dict[str, Any], out: str | None, name: str) -> None:
    """Write the result to `out` (None: `name` in bench/results; "-": nowhere) and print it as the last line."""
    if out != "-":
        write_json(RESULTS / f"{name}.json" if out is None else out, result)
    print(json.dumps(result), flush=True)


def guarded(main: Callable[[], None]) -> None:
    """Run a script; bad input ends it with exit code 2 and one line."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


def say(options: Any, text: str) -> None:
    """A line for people, unless `--json`."""
    if not options.json:
        print(text, flush=True)
