"""The model card of a draft's folder: README.md, with what is known of the target and the training.

It names no path of this machine: a target that is a local folder is known by its last name.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.draft_config import TAPS
from eagle3fn.base.errors import UserError
from eagle3fn.base.kinds import Check, is_amount, is_count, is_text, or_none
from eagle3fn.base.read import parse_json, read_text
from eagle3fn.base.sections import LONGEST_UNROLL
from eagle3fn.data.features import FeatureSet
from eagle3fn.use.engine_limits import VLLM, able, unable_line
from eagle3fn.use.layouts import how_to_serve

CARD = "README.md"
_LIBRARY = "library_name: eagle3fn"  # in the front matter of every card of ours
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = re.compile(r"^<!-- eagle3fn (\{.*\}) -->$", re.M)  # the facts, for `read_facts`
_DRAFT = "DRAFT"  # stands for the folder, or the name under which it is published


class Facts(NamedTuple):
    """What a card says of a draft besides its shape; what is not known is left out."""

    target: str = ""  # a hub id, or a folder
    data: str = ""  # a name for the samples
    samples: int | None = None
    supervised: int | None = None  # tokens that were trained on
    steps: int | None = None
    accepted_length: float | None = None  # held-out, simulated
    origin: str = ""  # where the training went on from, and what was changed then
    unroll: int | None = None  # steps of it in training: tokens that the draft learned to guess


def _is_unroll(value: Any) -> bool:
    return is_count(value) and 1 <= value <= LONGEST_UNROLL


_KINDS: dict[str, Check] = {
    "target": is_text,
    "data": is_text,
    "samples": or_none(is_count),
    "supervised": or_none(is_count),
    "steps": or_none(is_count),
    "accepted_length": or_none(is_amount),
    "origin": is_text,
    "unroll": or_none(_is_unroll),
}
"""What the facts are; those of a card may be anything."""


def facts_of(features: FeatureSet, target: str) -> Facts:
    """The facts of a training on a feature folder; steps and result come later."""
    totals = features.index.get("totals", {})
    return Facts(
        target=target,
        data=features.folder.resolve().name,
        samples=len(features.samples),
        supervised=totals.get("supervised"),
    )


def public_name(target: str) -> tuple[str, bool]:
    """A target's name without a path of this machine, and whether it is a hub id."""
    local = Path(target).exists() or not _HUB_ID.fullmatch(target)
    return (Path(target).name or "the target", False) if local else (target, True)


def card(tree: dict[str, Any], facts: Facts, lacks: dict[str, list[str]]) -> str:
    """The card's text.

    Args:
        tree: the draft's `config.json`.
        facts: of target and training.
        lacks: by engine what it cannot represent of the draft, as `engine_limits.lacking` says.
    """
    name, on_hub = public_name(facts.target) if facts.target else ("its target", False)

    # The front matter, which the Hugging Face hub reads.
    lines = ["---"]
    if on_hub:
        lines.append(f"base_model: {name}")
    lines += [_LIBRARY, "tags:", "- eagle3", "- speculative-decoding", "- draft"]
    lines += ["# license: name yours; the target's and the data's may bind you", "---", ""]

    # The draft.
    lines += [f"# EAGLE-3 draft of {name}", ""]
    lines += [
        f"A draft of one layer that guesses the next tokens of {name}, which then checks several",
        "guesses in one run. It was trained with eagle3fn.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {value} |" for title, value in _rows(tree, facts)),
        "",
    ]

    # How it is served, by the engines that compute this draft.
    target = name if on_hub else "TARGET"
    engines = able(lacks)
    commands = how_to_serve(_DRAFT, target, engines)
    if "speculators_config" in tree and VLLM.name in engines:
        commands.insert(0, f"vllm serve {_DRAFT}  # takes the target by this folder's config.json")
    lines += ["## Serving", ""]
    if commands:
        lines += [f"`{_DRAFT}` is this folder, or the name it is published under.", ""]
        lines += ["```bash", *commands, "```", ""]
    if len(engines) < len(lacks):
        lines += [f"These engines {unable_line(lacks)}.", ""]

    # The facts once more, for a card of the same draft in another layout.
    if facts == Facts():
        return "\n".join(lines)
    kept = facts._replace(target=name if facts.target else "")._asdict()
    text = json.dumps(kept).replace("--", "\\u002d-")
    return "\n".join([*lines, f"<!-- eagle3fn {text} -->", ""])


def is_ours(folder: Path) -> bool:
    """Whether the card of a draft's folder was written here."""
    try:
        lines = read_text(folder / CARD).splitlines()
    except UserError:
        return False
    front = lines[: lines.index("---", 1)] if "---" in lines[1:] else []
    return lines[:1] == ["---"] and _LIBRARY in front


def read_facts(folder: str | Path) -> Facts:
    """The facts in the card of an exported folder; none are known without a card of ours.

    Raises:
        UserError: what lies in the card's place cannot be read as text.
    """
    card = Path(folder) / CARD
    found = _KEPT.search(read_text(card)) if os.path.lexists(card) else None
    if found is None:
        return Facts()
    try:
        facts = Facts(**parse_json(found.group(1)))
    except (ValueError, TypeError):
        return Facts()
    good = all(is_kind(getattr(facts, name)) for name, is_kind in _KINDS.items())
    return facts if good and "\n" not in facts.target + facts.data + facts.origin else Facts()


def _rows(tree: dict[str, Any], facts: Facts) -> list[tuple[str, str]]:
    """Titles and values of the table; what is not known has no row."""
    taps = tree["eagle_config"][TAPS]
    rows = [
        ("tapped layers of the target", f"{', '.join(map(str, taps))}, counted from 0"),
        ("draft vocabulary", f"{tree['draft_vocab_size']} of {tree['vocab_size']} tokens"),
        ("weights", str(tree["dtype"])),
    ]
    if facts.samples is not None:
        tokens = f", {facts.supervised} supervised tokens" if facts.supervised is not None else ""
        rows.append(("data", f"{facts.data}: {facts.samples} samples{tokens}"))
    if facts.steps is not None:
        rows.append(("updates", str(facts.steps)))
    if facts.unroll is not None:
        rows.append(("unroll in training", f"{facts.unroll} tokens"))
    if facts.origin:
        rows.append(("went on from", facts.origin))
    if facts.accepted_length is not None:
        text = f"{facts.accepted_length:.3f}, simulated without decoding"
        rows.append(("held-out accepted length", text))
    return rows
