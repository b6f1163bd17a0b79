"""The `evaluation.json` of a run, as a report reads it: a value of another kind is named."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.kinds import Check, is_amount, is_count, is_flag, is_rates, is_text, or_none
from eagle3fn.base.places import check_out_file
from eagle3fn.base.read import read_object
from eagle3fn.use.rounds import is_examples

_GROUP: dict[str, Check] = {
    "prompts": is_count,
    "tokens": is_count,
    "verifications": or_none(is_count),
    "accepted_length": or_none(is_amount),
}
"""What a report reads of the answers of one group."""


def is_groups(value: Any) -> bool:
    """Numbers of groups of prompts, by name."""
    return isinstance(value, dict) and all(map(_is_group, value.values()))


def _is_group(value: Any) -> bool:
    if not isinstance(value, dict) or not _GROUP.keys() <= value.keys():
        return False
    return all(good(value[name]) for name, good in _GROUP.items())


def is_shares(value: Any) -> bool:
    """Rates by draft position, of which none is above 1."""
    return is_rates(value) and all(rate <= 1 for rate in value)


_SHORTEST = 1e-9  # seconds: what is measured takes longer


def is_costs(value: Any) -> bool:
    """What `use.speed.measure_speed` gives of costs: `verify_seconds` has one entry more."""
    if not isinstance(value, dict):
        return False
    verify: Any = value.get("verify_seconds")
    predicted: Any = value.get("predicted_seconds_per_token")
    if not is_rates(verify) or not is_rates(predicted):
        return False
    if min([*verify, *predicted], default=0) < _SHORTEST:
        return False
    singles = ("context", "first_draft_seconds", "next_draft_seconds")
    return all(is_amount(value.get(name)) for name in singles) and len(verify) == len(predicted) + 1


_EVALUATION: dict[str, Check] = {
    "draft_length": is_count,
    "accepted_length": or_none(is_amount),
    "acceptance_by_position": or_none(is_shares),
    "expected_acceptance_by_position": or_none(is_shares),
    "prompts": or_none(is_text),
    "lossless": or_none(is_flag),
    "lossless_note": is_text,
    "tasks": is_count,
    "speedup": is_amount,
    "tokens_per_s": is_amount,
    "plain_tokens_per_s": is_amount,
    "speed_dtype": or_none(is_text),
    "speed_tasks": is_count,
    "speed_draft_length": is_count,
    "speed_accepted_length": is_amount,
    "break_even_accepted_length": is_amount,
    "untrained_accepted_length": is_amount,
    "timed_tokens": is_count,
    "differing_tokens": is_count,
    "repeated_8gram_share": is_amount,
    "threads": is_count,
    "wall_s": is_amount,
    "device": is_text,
    "engine": is_text,
    "engine_version": is_text,
    "engine_accepted_length": or_none(is_amount),
    "by_category": is_groups,
    "by_prompt_length": is_groups,
    "costs": is_costs,
    "examples": is_examples,
}
"""What a report reads of an evaluation, where it is there."""

_OF_THE_TRAINING = (
    "rates_of",
    "accuracy",
    "conditional_accuracy",
    "counted",
    "changed",
    "stage_seconds",
    "draft_vocab_size",
    "vocab_size",
)
"""Names that a report has from other files of a run: an evaluation would speak for them."""

_TOGETHER = {
    "speedup": ("tokens_per_s", "plain_tokens_per_s", "speed_tasks"),
    "lossless": ("tasks",),
    "break_even_accepted_length": ("speed_accepted_length", "speed_draft_length"),
    "differing_tokens": ("timed_tokens",),
    "engine": ("engine_version",),
    "costs": ("speedup", "speed_dtype", "break_even_accepted_length"),
}
"""What must be there with another value."""


def check_out_evaluation(path: str | Path) -> None:
    """Refuse a place for an evaluation: a file that holds something else.

    Raises:
        UserError: as `check_out_file`; or what is there is no older evaluation.
    """
    check_out_file(path)
    if not os.path.lexists(path) or not os.path.getsize(path):
        return
    found = {}
    with suppress(UserError):
        found = read_object(path)
    if not {"draft_length", "accepted_length"} <= found.keys():
        raise UserError(f"{path}: is there and no older evaluation; name another file")


def read_evaluation(path: Path) -> dict[str, Any]:
    """The evaluation, here or in an engine, that `eagle3fn evaluate` wrote.

    Raises:
        UserError: missing, or one of its values is, or is of another kind; it names the value.
    """
    found = read_object(path)
    needed = ["draft_length", "accepted_length", "acceptance_by_position"]
    for name, others in _TOGETHER.items():
        needed += others if name in found else ()
    if found.get("lossless", True) is None:
        needed.append("lossless_note")

    for name in needed:
        if name not in found:
            raise UserError(f"{path}: {name} is missing; run eagle3fn evaluate again")
    wrong = [name for name in _OF_THE_TRAINING if name in found]
    wrong += [name for name, good in _EVALUATION.items() if name in found and not good(found[name])]
    for name in wrong:
        raise UserError(
            f"{path}: {name} is no value that evaluate writes; run eagle3fn evaluate again"
        )
    engine_alone = "engine" in found and "costs" not in found
    if found["acceptance_by_position"] is None and not engine_alone:
        raise UserError(f"{path}: acceptance_by_position is missing; run eagle3fn evaluate again")
    return found
