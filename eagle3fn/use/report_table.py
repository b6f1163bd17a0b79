"""A run's report as a table for a terminal: is it faster, is the text the same, and why."""

from collections.abc import Iterator
from typing import Any

from eagle3fn.base.errors import printable
from eagle3fn.use.groups import group_lines

_LABEL = 22  # columns


def report_table(report: dict[str, Any]) -> str:
    """What a user wants to know first, then what explains it; lines whose values are there.

    Args:
        report: as `use.report.write_report` gives it.
    """
    lines = []
    for label, text in [*answer_lines(report), *run_lines(report)]:
        lines.append(f"{label:{_LABEL}}{printable(text, 400)}")
    return "\n".join([*lines, *group_lines(report)])


def answer_lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Is it faster, is the text the same, and why."""
    dtype = report.get("speed_dtype", "float32") or "as its file has it"
    if "speedup" in report:
        faster = "yes" if report["speedup"] > 1 else "no"
        yield (
            "faster",
            f"{faster}: {report['speedup']:.2f} times as fast, {report['tokens_per_s']:.1f} "
            f"tokens/s against {report['plain_tokens_per_s']:.1f} without the draft "
            f"({dtype}, {_place(report)}, {_counted(report['speed_tasks'], 'prompt')})",
        )
    if "lossless" in report:
        yield "same text", _same_text(report, dtype)

    if "accepted_length" in report:
        length = report["accepted_length"]
        yield (
            "accepted length",
            f"{'unknown' if length is None else format(length, '.3f')} at draft length "
            f"{report['draft_length']}",
        )
    else:
        yield (
            "accepted length",
            "not known: run eagle3fn evaluate with --out RUN/evaluation.json, then report again",
        )
    if report.get("engine_accepted_length") is not None:
        yield "  engine's own", f"{report['engine_accepted_length']:.3f}"
    if "break_even_accepted_length" in report:
        yield (
            "  when timed",
            f"{report['speed_accepted_length']:.3f} at draft length "
            f"{report['speed_draft_length']}, the fastest; "
            f"{_break_even(report['break_even_accepted_length'])}",
        )
    if "untrained_accepted_length" in report:
        yield "  untrained draft's", f"{report['untrained_accepted_length']:.3f}"
    if report["held_out_accepted_length"] is not None:
        yield "  held-out, simulated", f"{report['held_out_accepted_length']:.3f}"
    if "rates_of" in report:
        yield "  accuracy", f"{_positions(report['accuracy'])}, of all {report['rates_of']}"
        yield "  conditional", f"{_positions(report['conditional_accuracy'])}, given all before"


def _break_even(length: float) -> str:
    """The accepted length from which drafting pays. A round emits a token at least and costs more
    than a step without a draft, so below 1 only the timing was wrong.
    """
    if length < 1:
        return (
            "from where on it is faster than plain is not known, as a round with drafting was "
            "timed as shorter than a step without: noise of the timing; time it again"
        )
    return f"faster than plain from {length:.2f} on"


def _positions(rates: list[float]) -> str:
    """Rates by the drafted token's position."""
    return " ".join(f"{rate:.3f}" for rate in rates)


def _place(report: dict[str, Any]) -> str:
    """Where the speed was measured: an engine, a card, or threads of the processor."""
    if "engine" in report:
        return f"{report['engine']} {report['engine_version']}"
    if report.get("device", "cpu") != "cpu":
        return report["device"]
    return _counted(report["threads"], "thread") if "threads" in report else "CPU"


def _same_text(report: dict[str, Any], dtype: str) -> str:
    """Whether the answers with the draft are those without it."""
    if report["lossless"] is None:
        return report["lossless_note"]
    same = "yes, token for token" if report["lossless"] else "NO"
    if "engine" in report:
        return f"{same} ({dtype}, {_counted(report['tasks'], 'prompt')})"
    text = f"{same} (float32, {_counted(report['tasks'], 'prompt')})"
    if dtype != "float32" and "differing_tokens" in report:
        text += (
            f"; in {dtype}, where a block rounds otherwise, "
            f"{report['differing_tokens']} of {report['timed_tokens']} differ"
        )
    return text


def run_lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The training, its data and the time."""
    rate = report["train_tokens_per_s"]
    text = f"{report['steps']} steps, {'unknown' if rate is None else format(rate, '.0f')} tokens/s"
    if report["supervised_tokens"] is not None:
        text += f", on {report['supervised_tokens']} supervised tokens"
    yield "training", text
    if report.get("went_on_from"):
        branch = report["went_on_from"]
        text = "; ".join(branch["changes"]) or "nothing changed"
        yield "  went on from", f"step {branch['step']} of the run {branch['run']}: {text}"
    if "rates_of" in report:
        yield "rows counted", f"{report['counted']:.1%} of {report['rates_of']}"
    if "repeated_8gram_share" in report:
        yield "repeated 8-grams", f"{report['repeated_8gram_share']:.1%} of the answers' tokens"
    if "wall_s" in report:
        yield "wall seconds", f"{report['wall_s']:.0f}, all stages"
    for line in report["advice"]:
        yield "advice", line.removeprefix("advice: ")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
