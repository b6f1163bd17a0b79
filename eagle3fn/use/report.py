"""A run's results gathered: a short table, `report.json`, and a picture of the curves."""

import os
import platform
import time
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, read_jsonl, whole_file, write_json

_TABLE = (
    ("lossless in fp32", "lossless", "{}"),
    ("accepted length (draft length {draft_length})", "accepted_length", "{:.3f}"),
    ("untrained draft's", "untrained_accepted_length", "{:.3f}"),
    ("held-out, simulated", "held_out_accepted_length", "{:.3f}"),
    ("tokens/s, plain", "plain_tokens_per_s", "{:.1f}"),
    ("tokens/s, speculative", "tokens_per_s", "{:.1f}"),
    ("  at draft length", "speed_draft_length", "{}"),
    ("break-even accepted length there", "break_even_accepted_length", "{:.2f}"),
    ("share of tokens in repeated 8-grams", "repeated_8gram_share", "{:.1%}"),
    ("training tokens/s", "train_tokens_per_s", "{:.0f}"),
    ("optimizer steps", "steps", "{}"),
    ("supervised tokens in the data", "supervised_tokens", "{}"),
    ("wall seconds, all stages", "wall_s", "{:.0f}"),
)


def write_report(folder: Path) -> str:
    """Write `report.json` and `curves.png` into a demo folder; returns the table as text.

    Reads `features/index.json`, `train/metrics.jsonl`, `train/eval.jsonl` and `evaluation.json`, and, if they are
    there, `stages.json` (seconds of each stage) and `settings.json`.

    Raises:
        UserError: one of them is missing or holds something else; it names the file.
    """
    steps, evals = (
        read_jsonl(folder / "train/metrics.jsonl"),
        read_jsonl(folder / "train/eval.jsonl"),
    )
    if not steps:
        raise UserError(f"{folder}/train/metrics.jsonl: no steps; run eagle3fn train first")
    stages, settings = folder / "stages.json", folder / "settings.json"
    trained = [row for row in evals if row["step"] > 0 and "accepted_length" in row]
    report: dict[str, Any] = {
        **_evaluation(folder / "evaluation.json"),
        "steps": steps[-1]["step"],
        "train_tokens_per_s": sum(row["tokens"] for row in steps)
        / sum(row["seconds"] for row in steps),
        "supervised_tokens": read_json(folder / "features/index.json")["totals"]["supervised"],
        "held_out_accepted_length": max((row["accepted_length"] for row in trained), default=None),
        **(_stages(stages) if stages.exists() else {}),
        "settings": _object(settings) if settings.exists() else {},
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": _versions(),
    }
    write_json(folder / "report.json", report)
    with whole_file(folder / "curves.png") as temporary:
        _draw(steps, evals, report, temporary)
    rows = [
        (label.format_map(report), style.format(report[key]))
        for label, key, style in _TABLE
        if _has(report, key)
    ]
    lines = [f"{label:38}{value}" for label, value in rows]
    return "\n".join([*lines, f"\n{folder}/report.json, {folder}/curves.png"])


def _has(report: dict[str, Any], key: str) -> bool:
    return report.get(key) is not None


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a {type(found).__name__}, it must be a JSON object; write it anew"
        )
    return found


def _evaluation(path: Path) -> dict[str, Any]:
    found = _object(path)
    rates = found.get("acceptance_by_position")
    if (
        type(found.get("draft_length")) is not int
        or not isinstance(rates, list)
        or not all(map(_is_number, rates))
    ):
        raise UserError(
            f"{path}: draft_length or acceptance_by_position is missing; run eagle3fn evaluate again"
        )
    return found


def _stages(path: Path) -> dict[str, Any]:
    stages = _object(path)
    if not all(map(_is_number, stages.values())):
        raise UserError(f"{path}: must hold the seconds of each stage; mend it or delete it")
    return {"stage_seconds": stages, "wall_s": sum(stages.values())}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from eagle3fn import __version__

    return {"eagle3fn": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")
    ]
    model = names[0] if names else platform.processor()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _draw(steps: list[dict], evals: list[dict], report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    window = max(1, len(steps) // 100)
    places = range(window - 1, len(steps), window)
    mean = [sum(row["loss"] for row in steps[i - window + 1 : i + 1]) / window for i in places]
    left.plot([steps[i]["step"] for i in places], mean)
    left.set(xlabel="optimizer step", ylabel=f"training loss (mean of {window})", title="Loss")
    held = [row for row in evals if "accepted_length" in row]
    middle.plot([row["step"] for row in held], [row["accepted_length"] for row in held], marker=".")
    middle.set(
        xlabel="optimizer step", ylabel="simulated accepted length", title="Held-out conversations"
    )
    rates = report["acceptance_by_position"]
    right.bar(range(1, len(rates) + 1), rates)
    right.set(
        xlabel="draft position",
        ylabel="acceptance, given all before",
        ylim=(0, 1),
        title="HumanEval",
    )
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
