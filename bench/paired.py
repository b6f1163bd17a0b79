"""One training step of this checkout against another checkout's, in paired rounds.

    python -m bench.paired --other CHECKOUT --shape smollm2 --seq 1024
    python -m bench.paired --other CHECKOUT --side plain --other-side NAME

Each checkout runs in a process of its own, with its own package and its own `bench.step`, on the
same seeded problem. In a round each makes one step, one after the other; which one begins
alternates. The last line is JSON:

- `ratio`: this checkout's wall time over the other's; median and quartiles of the rounds' ratios
- `processor_ratio`: the same of processor time, which other work on the machine disturbs less
- `memory_ratio`: peak memory of a step, this checkout's over the other's
- `same_losses`: whether the losses of all rounds have the same bits

`--other-side` is the side's name in the other checkout, where it is another one.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import json
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, closing
from statistics import quantiles
from typing import Any, NamedTuple

from bench import common
from bench.launch import add_arguments
from eagle3fn.base.errors import UserError
from eagle3fn.base.provenance import git_revision, provenance

ROUNDS = 10
WARM = 1  # rounds before the timed ones
HERE = Path(__file__).resolve()
# Options that are handed on to both checkouts' `bench.step`.
SETTINGS = ("shape", "seq", "batch", "masked", "k", "dtype", "device", "seed")


class Round(NamedTuple):
    """One step: its times and its loss."""

    seconds: float
    processor_seconds: float
    loss: float


class Worker:
    """A checkout's process (`bench/paired_worker.py`), which makes a step at each call of `round`.

    Raises:
        UserError: the process ended.
    """

    def __init__(self, checkout: Path, side: str, arguments: list[str]) -> None:
        program = HERE.with_name("paired_worker.py")
        self.checkout = checkout
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(checkout), side, *arguments],
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            ready = self._answer()
            if Path(ready["package"]) != checkout / "eagle3fn":
                raise UserError(f"{checkout}: its process imported {ready['package']}")
        except UserError:
            self.close()
            raise
        self.memory: dict[str, int] = ready["memory"]

    def round(self) -> Round:
        """One step."""
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        return Round(**self._answer())

    def close(self) -> None:
        """End the process: it reads no further line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.checkout}: its process ended; the reason is printed above")
        return json.loads(line)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--other", type=Path, required=True, help="the other checkout, with bench/ and eagle3fn/")
    add("--side", default="fast", help="a side of bench.sides (default fast)")
    add("--other-side", help="its name in the other checkout (default: the same)")
    common.add_problem_arguments(parser)
    add("--seq", type=int, default=1024, help="tokens of a sample (default 1024)")
    add("--batch", type=int, default=1, help="samples of a step (default 1)")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    for folder in ("bench", "eagle3fn"):
        if not (options.other / folder).is_dir():
            raise UserError(f"--other {options.other}: no {folder}/ there; name a checkout")
    return options


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of a single value three times that."""
    if len(values) == 1:
        values = [*values, *values]
    first, median, third = quantiles(values, n=4, method="inclusive")
    return {"median": median, "first_quartile": first, "third_quartile": third}


def ratios(here: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    return middle([a / b for a, b in zip(here, other, strict=True)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both checkouts in turns."""
    arguments = [f"--{name}={getattr(options, name)}" for name in SETTINGS]
    sides = {
        "here": (HERE.parent.parent, options.side),
        "other": (options.other.resolve(), options.other_side or options.side),
    }
    with ExitStack() as stack:
        workers = {}
        for name, (checkout, side) in sides.items():
            workers[name] = stack.enter_context(closing(Worker(checkout, side, arguments)))

        rounds: dict[str, list[Round]] = {name: [] for name in workers}
        for number in range(-WARM, options.rounds or ROUNDS):
            order = list(workers) if number % 2 else list(reversed(workers))
            for name in order:
                found = workers[name].round()
                if number >= 0:
                    rounds[name].append(found)
        memory = {name: worker.memory for name, worker in workers.items()}

    seconds = {name: [one.seconds for one in found] for name, found in rounds.items()}
    processor = {name: [one.processor_seconds for one in found] for name, found in rounds.items()}
    losses = {name: [one.loss for one in found] for name, found in rounds.items()}
    return {
        "ratio": ratios(seconds["here"], seconds["other"]),
        "processor_ratio": ratios(processor["here"], processor["other"]),
        "memory_ratio": memory["here"]["step"] / memory["other"]["step"],
        "same_losses": losses["here"] == losses["other"],
        "seconds": {name: middle(values) for name, values in seconds.items()},
        "memory": memory,
        "last_loss": {name: values[-1] for name, values in losses.items()},
        "all_seconds": seconds,
        "all_processor_seconds": processor,
    }


def result_of(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement with its settings."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {
        "side": options.side,
        "other_side": options.other_side or options.side,
        "rounds": options.rounds or ROUNDS,
        "allocator": options.allocator,
    }
    other = {"other_revision": git_revision(options.other)}
    return measure(options) | {"settings": settings, **other, **provenance()}


def show(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result for people."""
    for name, used in result["memory"].items():
        took = result["seconds"][name]
        quartiles = f"{took['first_quartile'] * 1000:.1f} to {took['third_quartile'] * 1000:.1f}"
        text = f"{took['median'] * 1000:.1f} ms ({quartiles}), {used['step'] / 2**20:.0f} MiB"
        common.show(options, f"{name:6} {text}")
    for name in ("ratio", "processor_ratio"):
        found = result[name]
        quartiles = f"{found['first_quartile']:.3f} to {found['third_quartile']:.3f}"
        common.show(options, f"{name} {found['median']:.3f} ({quartiles})")
    text = "the same bits" if result["same_losses"] else "not the same"
    common.show(options, f"memory_ratio {result['memory_ratio']:.3f}; losses {text}")


def main() -> None:
    options = parse()
    result = result_of(options)
    show(options, result)
    name = f"paired-{options.side}-{options.shape}-s{options.seq}-{options.dtype}-{options.device}"
    common.finish(result, options.out, name)


if __name__ == "__main__":
    sys.exit(common.program("bench.paired", main))
