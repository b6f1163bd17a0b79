"""A run's report as one page of HTML: no script, nothing that it loads, every text escaped."""

from pathlib import Path
from typing import Any

from eagle3fn.base.errors import one_line
from eagle3fn.train.branch import Rows
from eagle3fn.use.groups import GROUPS
from eagle3fn.use.html_charts import short
from eagle3fn.use.report_charts import (
    acceptance_charts,
    cost_charts,
    cost_rows,
    length_chart,
    training_charts,
)
from eagle3fn.use.report_table import answer_lines, run_lines

_TEMPLATE = "report.html.jinja"


def report_page(numbers: dict[str, Any], rows: Rows, examples: list[dict[str, Any]]) -> str:
    """The page of a run; its texts may be anything.

    Args:
        numbers: `report.json`.
        rows: of the training, those of a run that it went on from included.
        examples: answers round by round, as `use.rounds.describe_rounds` gives them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    return environment.get_template(_TEMPLATE).render(
        numbers=numbers,
        tiles=_tiles(numbers),
        summary=_summary(numbers),
        training=training_charts(numbers, rows),
        acceptance=acceptance_charts(numbers),
        groups=_groups(numbers),
        examples=[_with_counts(example) for example in examples],
        costs=cost_charts(numbers),
        cost_rows=cost_rows(numbers),
        data=_data(numbers),
        lengths=length_chart(numbers),
        origin=_origin(numbers),
    )


def _visible(value: Any) -> Any:
    """What the page shows of a value: control codes are written out, line breaks and tabs kept."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(letter if letter in "\n\t" else one_line(letter) for letter in value)


def _summary(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table in a terminal but advice, which has a part of its own."""
    lines = [*answer_lines(numbers), *run_lines(numbers)]
    return [(label, text) for label, text in lines if label != "advice"]


def _tiles(numbers: dict[str, Any]) -> list[dict[str, str]]:
    """The answers to look at first: a title, a value, and `good`, `bad` or nothing."""
    tiles = []
    if "speedup" in numbers:
        faster = numbers["speedup"] > 1
        tiles.append(_tile("Faster?", f"{numbers['speedup']:.2f}×", "good" if faster else "bad"))
    if "lossless" in numbers:
        same = numbers["lossless"]
        value = "sampled" if same is None else ("yes" if same else "NO")
        judged = "" if same is None else ("good" if same else "bad")
        tiles.append(_tile("Same text?", value, judged))
    if "accepted_length" in numbers:
        length = numbers["accepted_length"]
        value = "unknown" if length is None else f"{length:.3f}"
        tiles.append(_tile(f"Accepted length at draft length {numbers['draft_length']}", value))
    if numbers["held_out_accepted_length"] is not None:
        value = f"{numbers['held_out_accepted_length']:.3f}"
        tiles.append(_tile("Held-out accepted length, simulated", value))
    return [*tiles, _tile("Optimizer steps", str(numbers["steps"]))]


def _tile(title: str, value: str, judged: str = "") -> dict[str, str]:
    return {"title": title, "value": value, "judged": judged}


def _groups(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of prompts, each with the width of its bar in percent of the longest one's."""
    tables = []
    for key, title in GROUPS.items():
        groups = numbers.get(key, {})
        lengths = [group["accepted_length"] or 0.0 for group in groups.values()]
        most = max(lengths, default=0.0) or 1.0
        rows = []
        for (name, group), length in zip(groups.items(), lengths, strict=True):
            rows.append({**group, "name": name, "width": round(100 * length / most)})
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def _with_counts(example: dict[str, Any]) -> dict[str, Any]:
    """An example with the tokens and rounds shown, and the accepted length over them."""
    rounds = []
    for each in example["rounds"]:
        # An end token among the accepted ones ends the answer: nothing after it was judged.
        kept = min(each["accepted"], len(each["emitted"]))
        ended = kept == len(each["emitted"])
        rejected = "" if ended else "".join(each["drafted_text"][kept:])
        rounds.append(
            {
                "accepted": "".join(each["emitted_text"][:kept]),
                "own": "".join(each["emitted_text"][kept:]),
                "rejected": rejected.replace("\n", "↵"),
                "drafted": len(each["drafted"]),
                "kept": kept,
            }
        )
    emitted = sum(len(each["emitted"]) for each in example["rounds"])
    return {
        **example,
        "rounds": rounds,
        "emitted": emitted,
        "accepted_length": emitted / len(rounds) if rounds else None,
    }


def _data(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of the samples."""
    data = numbers["data"]
    rows = []
    if data.get("samples") is not None:
        rows.append(("samples", str(data["samples"])))
    if "tokens" in data:
        rows.append(("tokens", str(data["tokens"])))
    if numbers["supervised_tokens"] is not None:
        text = str(numbers["supervised_tokens"])
        if data.get("tokens"):
            text += f", {numbers['supervised_tokens'] / data['tokens']:.1%} of all"
        rows.append(("supervised tokens", text))
    text = f"{numbers['train_tokens']}, those of each epoch counted"
    rows.append(("tokens trained on", text))
    if "draft_vocab_size" in numbers:
        text = str(numbers["draft_vocab_size"])
        if "vocab_size" in numbers:
            text += f" of the target's {numbers['vocab_size']} tokens"
        rows.append(("draft vocabulary", text))
    return rows


def _origin(numbers: dict[str, Any]) -> list[tuple[str, Any]]:
    """Where and by what the report was made."""
    machine = numbers["machine"]
    return [
        ("date", numbers["date"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("OMP_NUM_THREADS", machine["OMP_NUM_THREADS"] or "not set"),
        *numbers["versions"].items(),
        ("revision of eagle3fn", numbers["revision"]),
    ]
