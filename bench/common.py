"""What the benchmarks share: options, timing in turns, matmul rate, counted FLOPs, results."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.problem import SHAPES
from eagle3fn.base.device import multiplies_bf16
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.launch import World
from eagle3fn.base.program import exit_code
from eagle3fn.specforge.oracle import OracleMissingError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
APART = 0.02  # relative difference of losses beyond which sides do not compute the same
CPU_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 1152, 576))
CUDA_SIZES = ((8192, 8192, 8192), (4096, 4096, 16384))
MATMUL_CALLS = 4  # of each size, of which the fastest counts


class Parser(argparse.ArgumentParser):
    """A parser that chooses the dtype by the device where none was named."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `ArgumentParser.parse_args`."""
        options = super().parse_args(args, namespace)
        if getattr(options, "dtype", "") is None:
            options.dtype = "bfloat16" if multiplies_bf16(options.device) else "float32"
        return options


def parser_of(about: str | None) -> Parser:
    """A parser whose help is a file's docstring as it is written."""
    return Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a problem: shape, masked share, unroll steps, dtype."""
    add_shape(parser)
    add_masked(parser)
    parser.add_argument("--k", type=int, default=7, help="unroll steps (default 7)")
    add_dtype(parser)


def add_shape(parser: argparse.ArgumentParser, default: str = "smollm2") -> None:
    """The option `--shape`."""
    about = f"the draft's shape (default {default})"
    parser.add_argument("--shape", choices=SHAPES, default=default, help=about)


def add_masked(parser: argparse.ArgumentParser) -> None:
    """The option `--masked`."""
    about = "share of masked tokens, in turns of 64 to 256 (default 0.5)"
    parser.add_argument("--masked", type=float, default=0.5, help=about)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option `--dtype`."""
    dtypes = ("bfloat16", "float32")
    about = "compute dtype (default: bfloat16 where the device multiplies it, else float32)"
    parser.add_argument("--dtype", choices=dtypes, help=about)


def settings_of(
    options: argparse.Namespace, names: tuple[str, ...], rounds: int, world: World
) -> dict[str, Any]:
    """A result's settings: the named options, how many rounds were timed, and the ranks."""
    named = {name: getattr(options, name) for name in names}
    return named | {"rounds": options.rounds or rounds, "ranks": world.size}


def synchronize(device: str) -> None:
    """Wait for the device; nothing on CPU."""
    if device != "cpu":
        torch.cuda.synchronize()


class Elsewhere(NamedTuple):
    """A step that another process made for a call."""

    loss: float
    processor_seconds: float


class Spent(NamedTuple):
    """Seconds of one call."""

    wall: float
    processor: float  # of the process that worked; other work on the machine disturbs it less


def spent(call: Callable[[], object], device: str) -> Spent:
    """Seconds of one call, on the wall with its device work."""
    synchronize(device)
    wall = time.perf_counter()
    processor = time.process_time()
    made = call()
    synchronize(device)
    wall = time.perf_counter() - wall
    if isinstance(made, Elsewhere):
        return Spent(wall, made.processor_seconds)
    return Spent(wall, time.process_time() - processor)


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, its device work included."""
    return spent(call, device).wall


class Matmul(NamedTuple):
    """The product that the matmul rate is measured by."""

    size: tuple[int, int, int]  # rows, inner, columns
    flops: int
    call: Callable[[], object]


def best_matmul(dtype: torch.dtype, device: str) -> Matmul:
    """Of a few large products the one with the highest rate here."""
    best: Matmul | None = None
    best_rate = 0.0
    for size in CPU_SIZES if device == "cpu" else CUDA_SIZES:
        matmul = _matmul(size, dtype, device)
        took = min(seconds(matmul.call, device) for _ in range(MATMUL_CALLS))
        rate = matmul.flops / took
        if best is None or rate > best_rate:
            best = matmul
            best_rate = rate
    assert best is not None
    return best


def _matmul(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Matmul:
    """A product of random matrices, repeated where one is short."""
    rows, inner, columns = size
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    count = rows * inner * columns
    repeats = max(1, int(2e9 // count)) if device == "cpu" else 10

    def call() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)

    return Matmul(size, 2 * count * repeats, call)


def check_losses(losses: dict[str, float]) -> None:
    """Refuse to time sides that compute different things.

    Raises:
        UserError: a loss differs by more than 2% from the first, or is not a number.
    """
    first = next(iter(losses.values()))
    if not all(abs(loss - first) <= APART * abs(first) for loss in losses.values()):
        raise UserError(
            f"first losses {losses}: more than {APART:.0%} apart, "
            "so the sides do not compute the same"
        )


class Timing(NamedTuple):
    """Seconds of every call in every round, and the matmul rate of the same rounds."""

    seconds: dict[str, list[float]]
    rates: list[float]  # FLOP/s
    matmul_size: tuple[int, int, int]
    processor: dict[str, list[float]]  # processor seconds, as `seconds`

    def ratio(self, over: str, under: str) -> float:
        """Median of the rounds' ratios of two calls' times."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return median(a / b for a, b in pairs)

    def share(self, name: str, count: float) -> float:
        """The part of the matmul rate that a call of `count` FLOPs reaches; median over rounds."""
        pairs = zip(self.seconds[name], self.rates, strict=True)
        return median(count / took / rate for took, rate in pairs)

    def summary(self) -> dict[str, Any]:
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
    """Time every call and the matmul once a round.

    Which one begins changes from round to round. All ranks begin each call together; then the
    slowest rank of a side counts, and the fastest of the matmul.

    Args:
        calls: what is timed, by name.
        rounds: timed rounds.
        dtype: of the matmul.
        device: where all this runs.
        world: the ranks.
        warm: rounds before the timed ones, which are left out.
    """
    matmul = best_matmul(dtype, device)
    every = {**calls, "matmul": matmul.call}
    names = list(every)
    times: dict[str, list[Spent]] = {name: [] for name in every}
    for number in range(-warm, rounds):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            world.barrier()
            took = spent(every[name], device)
            if number >= 0:
                times[name].append(took)

    # Of several ranks each round has several times.
    ranks = world.every(times)
    slowest = {}
    processor = {}
    for name in calls:
        of_rounds = list(zip(*(rank[name] for rank in ranks), strict=True))
        slowest[name] = [max(took.wall for took in of_ranks) for of_ranks in of_rounds]
        processor[name] = [max(took.processor for took in of_ranks) for of_ranks in of_rounds]
    of_rounds = zip(*(rank["matmul"] for rank in ranks), strict=True)
    rates = [matmul.flops / min(took.wall for took in of_ranks) for of_ranks in of_rounds]
    return Timing(slowest, rates, matmul.size, processor)


class Flops(NamedTuple):
    """FLOPs that a step must compute, by part.

    Six for each multiply-add of the forward; four for the projection, whose input needs no
    gradient, and two for the teacher, which has no backward.
    """

    projection: int
    keys_values: int
    queries_output: int
    attention: int  # causal: a query sees the block up to its row, and a key a step
    mlp: int
    head: int
    teacher: int  # the target's head

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self)


def needed_rows(scored: Tensor) -> Tensor:
    """`(K, B, S)` bool: row `t` reaches a loss term at step `i` or later, by `(B, K, S)`."""
    trained = scored.transpose(0, 1) > 0
    return trained.flip(0).cummax(0).values.flip(0)


def row_shares(scored: Tensor) -> dict[str, float]:
    """Of all rows: those with a masked loss, those needed at step 0, and the mean over steps."""
    need = needed_rows(scored).float()
    return {
        "masked": 1 - float((scored[:, 0] > 0).float().mean()),
        "needed": float(need[0].mean()),
        "needed_over_steps": float(need.mean()),
    }


def flops(draft: DraftConfig, scored: Tensor, dense: bool = False) -> Flops:
    """FLOPs of a step's forward and backward on the rows it needs.

    A row that is not needed gives its step-0 key and value alone. Where rows survive by chance, a
    step needs those that are scored at it or later: what `base.rows.plan_rows` plans.

    Args:
        draft: the draft's shape.
        scored: `(B, K, S)`, the row mask of the surviving rows. Every label is scored at step 0.
        dense: all `B·S` rows at every step are counted, whatever the mask.
    """
    scored = torch.ones_like(scored).cpu() if dense else scored.cpu()
    b, k, s = scored.shape
    every = b * s
    need = needed_rows(scored)
    pairs = int((scored > 0).sum())  # of a row and its label
    labels = int((scored[:, 0] > 0).sum())

    rows = int(need.sum())
    later = int(need[1:].sum())  # rows of the steps after the first, each with a key and value
    seen = torch.arange(1, s + 1) + torch.arange(k)[:, None, None]
    keys_seen = int((seen * need).sum())

    h = draft.hidden_size
    queries = draft.num_attention_heads * draft.head_dim
    keys = draft.num_key_value_heads * draft.head_dim
    return Flops(
        projection=4 * every * 3 * draft.target_hidden_size * h,
        keys_values=6 * (every + later) * 2 * 2 * h * keys,
        queries_output=6 * rows * (2 * h * queries + queries * h),
        attention=6 * keys_seen * 2 * queries,
        mlp=6 * rows * 3 * h * draft.intermediate_size,
        head=6 * pairs * h * draft.draft_vocab_size,
        teacher=2 * labels * draft.target_hidden_size * draft.vocab_size,
    )


def result_path(out: str | None, name: str) -> Path | None:
    """Where a result goes: nowhere without `--out`; in a folder, a file of this name."""
    if out is None:
        return None
    return Path(out) / f"{name}.json" if Path(out).is_dir() else Path(out)


def finish(result: dict[str, Any], out: str | None, name: str) -> None:
    """Print the result as the last line, and write it where `--out` says so.

    Args:
        result: JSON values.
        out: a file, or a folder that is there; None: nothing is written.
        name: the file's name without its ending, in a folder.
    """
    path = result_path(out, name)
    if path is not None:
        write_json(path, result)
    print(json.dumps(result), flush=True)


def program(name: str, run: Callable[[], int | None]) -> int:
    """The exit code of a benchmark: what `run` returns, 0 for None.

    Bad input, or a SpecForge that is not at hand, becomes 2 and one line that begins with `name`.
    """

    def guarded() -> int | None:
        try:
            return run()
        except OracleMissingError as error:
            raise UserError(str(error)) from None

    return exit_code(name, guarded)


def show(options: Any, text: str) -> None:
    """A line for people, unless `--json`."""
    if not options.json:
        print(text, flush=True)


def show_case(options: Any, title: str, case: dict[str, Any]) -> None:
    """One case of a part measured alone: times of all sides, ratio, share of the matmul rate."""
    times = [f"{name} {took * 1000:.1f} ms" for name, took in case["seconds"].items()]
    numbers = f"ratio {case['ratio']:.2f}, mfu {case['mfu']:.1%}"
    show(options, f"{title}: {', '.join(times)}; {numbers}")
