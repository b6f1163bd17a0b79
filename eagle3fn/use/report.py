"""A run's results gathered: `report.json`, and `report.html`, a page to look at and send."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json, write_text
from eagle3fn.base.output import json_value
from eagle3fn.base.places import check_out_file
from eagle3fn.base.provenance import git_revision, processor, versions
from eagle3fn.base.read import read_object
from eagle3fn.train.advice import advise, history_of
from eagle3fn.train.branch import Rows, own_rows, read_branch
from eagle3fn.use.evaluation_file import read_evaluation
from eagle3fn.use.model_card import Facts, public_name, read_facts
from eagle3fn.use.report_files import (
    begins_warm,
    if_there,
    read_data,
    read_held_out,
    read_planned,
    read_settings,
    read_stages,
    read_steps,
    run_file,
    training_folder,
)
from eagle3fn.use.report_page import report_page

NUMBERS = "report.json"
PAGE = "report.html"


class Run(NamedTuple):
    """What is read of a run."""

    numbers: dict[str, Any]  # `report.json`
    rows: Rows  # of the training, those of a run that it went on from included
    examples: list[dict[str, Any]]  # answers of the evaluation, round by round


def write_report(folder: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a run's folder; returns what `report.json` has.

    Raises:
        UserError: as `gather`; or a place is taken by what is no file.
    """
    for name in (NUMBERS, PAGE):
        check_out_file(folder / name)
    run = gather(folder)
    page = report_page(run.numbers, run.rows, run.examples)

    # JSON has no NaN: a setting may hold one.
    write_json(folder / NUMBERS, json_value(run.numbers))
    write_text(folder / PAGE, page)
    return run.numbers


def gather(folder: Path) -> Run:
    """Read a run: the folder of `train --out`, or one with that as its `train/`.

    Its `metrics.jsonl` is read, and where they exist `eval.jsonl`, `config.toml`, `horizon.json`
    and the draft's card next to it, and of the folder `evaluation.json`, `features/`,
    `stages.json` (seconds of each stage) and `settings.json`. These are looked for next to a
    folder that is named `train` too. What is not there is left out.

    The training may be under way: a last row that is not whole yet is left out.

    Raises:
        UserError: no training, or a file that holds something else; it names the file and the row.
    """
    # What the run wrote.
    training = training_folder(folder)
    steps = read_steps(training / "metrics.jsonl")
    if not steps:
        raise UserError(f"{training}/metrics.jsonl: no steps; run eagle3fn train first")
    held_out = if_there(read_held_out, training / "eval.jsonl", [])
    warm = begins_warm(training / "config.toml")
    chosen = if_there(read_settings, training / "config.toml", {})
    evaluation = dict(if_there(read_evaluation, run_file(folder, "evaluation.json"), {}))
    data = if_there(read_data, run_file(folder, "features"), {})
    stages = if_there(read_stages, run_file(folder, "stages.json"), {})
    settings = if_there(read_object, run_file(folder, "settings.json"), {})
    examples = evaluation.pop("examples", [])
    branch = read_branch(training)
    facts = _facts(training)

    # Numbers are of the run's own rows, not of those that it has from another run. Row 0 is the
    # untrained draft's; a run that holds no samples out has no accepted length.
    own = own_rows(Rows(steps, held_out), branch)
    measured = [row for row in own.held_out if row.get("accepted_length") is not None]
    trained = [row for row in measured if row["step"] > 0]
    seconds = sum(row["seconds"] for row in own.steps)
    tokens = sum(row["tokens"] for row in own.steps)

    numbers: dict[str, Any] = {
        "run": _name(training),
        "target": public_name(facts.target)[0] if facts.target else None,
        **evaluation,
        "steps": steps[-1]["step"],
        "planned_steps": if_there(read_planned, training / "horizon.json", None),
        "train_tokens": tokens,
        "train_seconds": seconds,
        "train_tokens_per_s": tokens / seconds if seconds else None,
        "supervised_tokens": data.get("supervised", facts.supervised),
        "held_out_accepted_length": max((row["accepted_length"] for row in trained), default=None),
        **_rates(own.steps, trained),
        "advice": list(advise(history_of(own.steps, own.held_out, warm)).values()),
        **stages,
        "went_on_from": None if branch is None else branch._asdict(),
        "data": data or {"samples": facts.samples},
        **chosen,
        "settings": settings,
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": _versions(),
        "revision": git_revision(),
    }
    return Run(numbers, Rows(steps, held_out), examples)


def _name(training: Path) -> str:
    """The run's: of the folder that has `train/`, or of the training's own."""
    place = training.resolve()
    return place.parent.name if place.name == "train" else place.name


def _facts(training: Path) -> Facts:
    """Of the draft's card: target and data. The untrained draft's is there from the start."""
    for name in ("draft", "untrained"):
        if os.path.isdir(training / name):
            return read_facts(training / name)
    return Facts()


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
