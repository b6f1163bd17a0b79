"""The charts of a report's page, made of a run's rows and of the report's numbers."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from eagle3fn.train.branch import Rows
from eagle3fn.use.costs import expected_length
from eagle3fn.use.html_charts import Bars, Chart, Line, Mark, bar_chart, line_chart, short

_POINTS = 100  # of a curve at most
_STEP = "optimizer step, tokens trained on until then"

Row = dict[str, Any]


def training_charts(numbers: Row, rows: Rows) -> list[Chart]:
    """Losses, accepted lengths, learning rate and gradient norm by step.

    Values of steps, and of evaluations, are means over equal windows, `_POINTS` at most. A
    dotted line marks where the run went on from another one, whose rows come before it.
    """
    window = -(-len(rows.steps) // _POINTS)
    mean = f", mean of {window} steps" if window > 1 else ""
    tokens_at = _tokens_at(rows.steps)
    branch = numbers["went_on_from"]
    down = None if branch is None else Mark(branch["step"], "until here the other run")

    def chart(title: str, *lines: Line) -> Chart | None:
        drawn = [line for line in lines if any(value is not None for _, value in line.points)]
        if not drawn:
            return None
        return line_chart(
            title,
            _STEP,
            drawn,
            x_name=lambda step: f"step {short_step(step)}, {tokens_at(step)}",
            under=tokens_at,
            down=down,
        )

    def of_steps(name: str) -> list[tuple[float, float | None]]:
        return window_means(rows.steps, name, window)

    def of_held_out(name: str) -> Line:
        measured = [row for row in rows.held_out if row.get(name) is not None]
        several = max(-(-len(measured) // _POINTS), 1)
        label = f"held-out, mean of {several} evaluations" if several > 1 else "held-out"
        return Line(label, window_means(measured, name, several), dots=True)

    found = [
        chart(
            "Loss",
            Line(f"training{mean}", of_steps("loss")),
            of_held_out("loss"),
        ),
        chart(
            "Accepted length, simulated",
            Line(f"training{mean}", of_steps("accepted_length")),
            of_held_out("accepted_length"),
        ),
        chart("Learning rate", Line(f"learning rate{mean}", of_steps("learning_rate"))),
        chart("Gradient norm", Line(f"before clipping{mean}", of_steps("grad_norm"))),
    ]
    return [each for each in found if each is not None]


def short_step(step: float) -> str:
    """A step's number in full."""
    return f"{step:g}" if step < 1e6 else f"{step:.0f}"


def window_means(rows: Sequence[Row], name: str, window: int) -> list[tuple[float, float | None]]:
    """A value's means over windows of rows, each at its last step; None where no row has one."""
    points = []
    for start in range(0, len(rows), window):
        part = rows[start : start + window]
        values = [row[name] for row in part if row.get(name) is not None]
        points.append((part[-1]["step"], sum(values) / len(values) if values else None))
    return points


def _tokens_at(steps: Sequence[Row]) -> Callable[[float], str]:
    """Gives the tokens that were trained on until a step, as a text."""
    numbers = [row["step"] for row in steps]
    totals = [0, *accumulate(row["tokens"] for row in steps)]
    return lambda step: f"{short(totals[bisect_right(numbers, step)])} tokens"


def acceptance_charts(numbers: Row) -> list[Chart]:
    """By draft position: of the evaluation's prompts, and simulated of held-out rows."""
    charts = []
    rates = numbers.get("acceptance_by_position")
    if rates:
        all_before = list(accumulate(rates, lambda before, rate: before * rate))
        series = [Bars("given all before", rates), Bars("with all before", all_before)]
        charts.append(_by_position("Acceptance of decoded answers", series))
    if "rates_of" in numbers:
        series = [
            Bars("given all before", numbers["conditional_accuracy"]),
            Bars("by itself", numbers["accuracy"]),
        ]
        charts.append(_by_position(f"Accuracy of {numbers['rates_of']}, simulated", series))
    return charts


def _by_position(title: str, series: list[Bars]) -> Chart:
    positions = [str(position) for position in range(1, len(series[0].values) + 1)]
    return bar_chart(title, "draft position", positions, series)


def cost_charts(numbers: Row) -> list[Chart]:
    """Speed by draft length as the measured costs predict it, and the break-even accepted length.

    A round of length `k` that costs `c_k` plain steps and emits `l` tokens is `l / c_k` times as
    fast as decoding plainly: faster from the accepted length `c_k` on.
    """
    costs = numbers.get("costs")
    if not costs or "speedup" not in numbers:
        return []
    plain = costs["verify_seconds"][0]
    predicted = [plain / seconds for seconds in costs["predicted_seconds_per_token"]]
    lengths = [str(length) for length in range(1, len(predicted) + 1)]
    by_length = bar_chart(
        "Speed by draft length, times plain decoding",
        "draft length",
        lengths,
        [Bars("predicted of the costs", predicted)],
        across=Mark(1.0, "plain decoding"),
    )

    even = numbers["break_even_accepted_length"]
    measured = numbers["speed_accepted_length"]
    chosen = numbers["speed_draft_length"]
    if even < 1:  # noise of the timing: the summary says so
        return [by_length]
    most = max(chosen + 1.0, measured)
    break_even = line_chart(
        f"Speed by accepted length, at draft length {chosen}",
        "accepted length",
        [
            Line("of the costs", [(x, x / even) for x in sorted({1.0, even, measured, most})]),
            Line("measured", [(measured, numbers["speedup"])], dots=True),
        ],
        x_name=lambda length: f"accepted length {short(length)}",
        across=Mark(1.0, "plain decoding"),
        down=Mark(even, f"break-even {even:.2f}"),
    )
    return [by_length, break_even]


def cost_rows(numbers: Row) -> list[list[str]]:
    """By draft length: milliseconds of a round, its break-even and its expected accepted length."""
    costs = numbers.get("costs")
    if not costs:
        return []
    verify = costs["verify_seconds"]
    rates = numbers.get("expected_acceptance_by_position") or numbers["acceptance_by_position"]
    rows = []
    for length in range(1, len(verify)):
        draft = costs["first_draft_seconds"] + (length - 1) * costs["next_draft_seconds"]
        seconds = draft + verify[length]
        expected = expected_length(rates, length)
        rows.append(
            [
                str(length),
                *(f"{value * 1000:.2f}" for value in (draft, verify[length], seconds)),
                f"{seconds / verify[0]:.2f}",
                f"{expected:.2f}",
            ]
        )
    return rows


def length_chart(numbers: Row) -> Chart | None:
    """How many samples have how many tokens."""
    lengths = numbers["data"].get("lengths")
    if not lengths:
        return None
    names = [f"{each['from']}–{each['to']}" for each in lengths]
    counts = [each["samples"] for each in lengths]
    return bar_chart("Samples by length", "tokens of a sample", names, [Bars("samples", counts)])
