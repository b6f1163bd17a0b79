"""A run's results gathered: a short table, `report.json`, and a picture of the curves."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import whole_file, write_json
from eagle3fn.base.places import check_out_file
from eagle3fn.base.provenance import processor, versions
from eagle3fn.base.read import read_object
from eagle3fn.train.advice import advise, history_of
from eagle3fn.train.branch import Branch, Rows, own_rows, read_branch
from eagle3fn.use.groups import group_lines
from eagle3fn.use.report_files import (
    begins_warm,
    if_there,
    read_evaluation,
    read_held_out,
    read_stages,
    read_steps,
    read_supervised,
    training_folder,
)

_LABEL = 22  # columns


def write_report(folder: Path) -> str:
    """Write `report.json` and `curves.png` into a run's folder; returns the table as text.

    The folder is that of `train --out`, or one with that as its `train/`. Its `metrics.jsonl` is
    read, and where they exist `eval.jsonl` and `config.toml` next to it, and of the folder
    `evaluation.json`, `features/`, `stages.json` (seconds of each stage) and `settings.json`. What
    is not there is left out.

    The training may be under way: a last row that is not whole yet is left out.

    Raises:
        UserError: no training, or a file that holds something else; it names the file and the row.
    """
    for name in ("report.json", "curves.png"):
        check_out_file(folder / name)

    # What the run wrote.
    training = training_folder(folder)
    steps = read_steps(training / "metrics.jsonl")
    if not steps:
        raise UserError(f"{training}/metrics.jsonl: no steps; run eagle3fn train first")
    held_out = if_there(read_held_out, training / "eval.jsonl", [])
    warm = begins_warm(training / "config.toml")
    evaluation = if_there(read_evaluation, folder / "evaluation.json", {})
    supervised = if_there(read_supervised, folder / "features", None)
    stages = if_there(read_stages, folder / "stages.json", {})
    settings = if_there(read_object, folder / "settings.json", {})
    branch = read_branch(training)

    # Numbers are of the run's own rows, not of those that it has from another run. Row 0 is the
    # untrained draft's; a run that holds no samples out has no accepted length.
    own = own_rows(Rows(steps, held_out), branch)
    measured = [row for row in own.held_out if row.get("accepted_length") is not None]
    trained = [row for row in measured if row["step"] > 0]
    seconds = sum(row["seconds"] for row in own.steps)
    tokens = sum(row["tokens"] for row in own.steps)

    report: dict[str, Any] = {
        **evaluation,
        "steps": steps[-1]["step"],
        "train_tokens_per_s": tokens / seconds if seconds else None,
        "supervised_tokens": supervised,
        "held_out_accepted_length": max((row["accepted_length"] for row in trained), default=None),
        **_rates(own.steps, trained),
        "advice": list(advise(history_of(own.steps, own.held_out, warm)).values()),
        **stages,
        "went_on_from": None if branch is None else branch._asdict(),
        "settings": settings,
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": _versions(),
    }
    write_json(folder / "report.json", report)
    with whole_file(folder / "curves.png") as temporary:
        _draw(steps, held_out, branch, report, temporary)
    groups = "".join(f"\n{line}" for line in group_lines(report))
    return f"{_table(report)}{groups}\n\ncurves  {folder}/curves.png\nnumbers {folder}/report.json"


def _rates(steps: list[dict[str, Any]], trained: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies and the share of rows counted, of the best draft on held-out rows, or where none
    were held out of the last update; nothing of a run of an earlier version.
    """
    rows = [max(trained, key=lambda row: row["accepted_length"])] if trained else steps[-1:]
    names = ("accuracy", "conditional_accuracy", "counted")
    if not rows or not set(names) <= rows[0].keys():
        return {}
    row = rows[0]
    return {name: row[name] for name in names} | {
        "rates_of": "held-out rows" if trained else "the last update's rows"
    }


def _table(report: dict[str, Any]) -> str:
    """What a user wants to know first, then what explains it; lines whose values are there."""
    lines = []
    for label, text in [*_answer_lines(report), *_run_lines(report)]:
        lines.append(f"{label:{_LABEL}}{printable(text, 400)}")
    return "\n".join(lines)


def _answer_lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
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


def _run_lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
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


def _versions() -> dict[str, str]:
    from eagle3fn import __version__

    # The package may run from a checkout that is not installed.
    return {"eagle3fn": __version__, **versions(("torch", "transformers"))}


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _draw(
    steps: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    branch: Branch | None,
    report: dict[str, Any],
    path: Path,
) -> None:
    """Draw the training loss, the held-out accepted length, and where prompts were decoded the
    acceptance by position.

    A line marks where a run went on from another one, whose rows come before it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    evaluated = "acceptance_by_position" in report
    count = 3 if evaluated else 2
    figure, axes = plt.subplots(1, count, figsize=(13 * count / 3, 3.8), layout="constrained")
    left, middle = axes[:2]

    # Loss: means over windows of a hundredth of the run. Where all updates were skipped is a gap.
    window = max(1, len(steps) // 100)
    places = []
    means = []
    for end in range(window, len(steps) + 1, window):
        losses = [row["loss"] for row in steps[end - window : end] if row.get("loss") is not None]
        places.append(steps[end - 1]["step"])
        means.append(sum(losses) / len(losses) if losses else math.nan)
    left.plot(places, means)
    left.set(xlabel="optimizer step", ylabel=f"training loss (mean of {window})", title="Loss")

    # Held-out samples: every evaluation that measured a length, the untrained draft's included.
    rows = [row for row in held_out if row.get("accepted_length") is not None]
    middle.plot([row["step"] for row in rows], [row["accepted_length"] for row in rows], marker=".")
    middle.set(
        xlabel="optimizer step", ylabel="simulated accepted length", title="Held-out conversations"
    )

    # What another run had made before this one went on from it.
    if branch is not None:
        for part in (left, middle):
            part.axvline(branch.step, color="gray", linestyle=":", label="until here another run")
            part.legend()

    # Prompts of the evaluation.
    if evaluated:
        right = axes[2]
        rates = report["acceptance_by_position"] or []
        right.bar(range(1, len(rates) + 1), rates)
        right.set(xlabel="draft position", ylabel="acceptance, given all before", ylim=(0, 1))
        right.set_title(prompts_title(report), parse_math=False)

    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def prompts_title(report: dict[str, Any]) -> str:
    """The evaluation's prompts by name: `HumanEval` of `HumanEval.jsonl.gz`.

    A report without the name, as older ones are, gets a neutral title.
    """
    name = report.get("prompts")
    if not name:
        return "Evaluation prompts"
    return printable(name).removesuffix(".gz").removesuffix(".xz").removesuffix(".jsonl")
