"""Settings that a run takes by the size of target and data, where its user names none.

Measured at SmolLM2-135M's size (hidden size 576) with 60 to 600 conversations; SpecForge's rate is
at hidden size 3,584 to 4,096. Nothing between or beyond was measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from eagle3fn.base.config import Config, from_dict
from eagle3fn.base.device import fast_dtype
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import STARTS, OptimizerConfig
from eagle3fn.base.toml import read_toml
from eagle3fn.data.vocab import held_out_of
from eagle3fn.train.checkpoint import checkpoints

_KNOWN_WIDTH = 576  # of the draft that the highest rate was measured on
_HIGHEST_RATE = 1e-3
_LOWEST_RATE = 1e-4
_RATED = ("adamw", "muon")  # the optimizers that these rates are for
_HINTS = {
    "lion": "the best of two tried was a third of AdamW's",
    "sgd": "the best of four tried, none of them near AdamW, was a hundred times AdamW's",
}
"""How the rate of another optimizer stands to AdamW's, by `optimizer.name` (bench/LOG.md)."""
_WARM_SHARE = 1 / 3  # of the rate, where a trained draft is trained on
_MOST_STEPS_APART = 500  # between two evaluations
_FEWEST_STEPS_APART = 50


class Unroll(NamedTuple):
    """Unroll steps, and the chance that a row goes on to the next one."""

    steps: int
    survival: float


# A draft that learned from few samples gets few tokens accepted in a row: later steps teach it
# little (bench/LOG.md, at 200 to 600 samples). From many on it is SpecForge's number of steps,
# whose later rows cost less; that was not measured.
_SHORT = Unroll(3, 0.8)
_LONG = Unroll(7, 0.65)
_MANY_SAMPLES = 5000


class Choice(NamedTuple):
    """A setting, the value chosen for it, and why."""

    setting: str  # as --set has it, "section.key"
    value: Any
    reason: str


def chosen_defaults(
    draft: DraftConfig,
    samples: int,
    device: str = "cpu",
    optimizer: str = "muon",
    init: str = "target",
    held_out: int | None = None,
    ranks: int = 1,
    micro_batch: int = 1,
) -> list[Choice]:
    """The settings that are chosen where nobody names them.

    Args:
        draft: the draft's shape.
        samples: conversations, held-out ones among them.
        device: where it is trained.
        optimizer: the `optimizer.name` that is named; no rate is chosen but for AdamW and Muon.
        init: the `train.init` that is named; a trained draft gets a third of the rate.
        held_out: samples that the vocabulary map was not counted on, of the same folder; None: of
            another, or it doesn't say.
        ranks: that train together.
        micro_batch: the `data.micro_batch` that is named.
    """
    reason = "those that the vocabulary map was not counted on"
    if held_out is None:
        held_out = held_out_of(samples)
        reason = f"a tenth of {samples} samples, at most 24"
    apart = min(max(samples - held_out, _FEWEST_STEPS_APART), _MOST_STEPS_APART)
    width = draft.hidden_size
    unroll = _SHORT if samples < _MANY_SAMPLES else _LONG
    rates = []
    if optimizer in _RATED:
        rates.append(Choice("optimizer.learning_rate", *_rate_and_reason(width, init)))
    return [
        Choice("objective.ttt_length", unroll.steps, f"for {samples} samples"),
        Choice("objective.survival", unroll.survival, "fewer products, more samples a minute"),
        Choice("optimizer.name", "muon", "learns more from a sample"),
        *rates,
        Choice("optimizer.warmup_ratio", 0.03, "of the demo"),
        Choice("train.dtype", _name(fast_dtype(device)), f"fast on this {device}"),
        *batch_of_ranks(ranks, micro_batch),
        Choice("data.held_out", held_out, reason),
        Choice("train.eval_every", apart, "about an epoch, 50 to 500 steps"),
    ]


def batch_of_ranks(ranks: int, micro_batch: int = 1) -> list[Choice]:
    """A micro-batch for each of several ranks; nothing is chosen for one.

    >>> [choice.value for choice in batch_of_ranks(2, 4)], batch_of_ranks(1)
    ([8], [])
    """
    if ranks == 1:
        return []
    reason = f"data.micro_batch = {micro_batch} on each of {ranks} ranks"
    return [Choice("data.global_batch", ranks * micro_batch, reason)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rate_and_reason(width: int, init: str) -> tuple[float, str]:
    rate = rate_of(width)
    if init in STARTS:
        return rate, f"by hidden size {width}"

    # The rate for an untrained draft would first undo what this one has learned.
    return float(f"{rate * _WARM_SHARE:.1e}"), f"from a trained draft, a third of {rate:g}"


def rate_of(width: int) -> float:
    """The peak learning rate for a hidden size: `1e-3 · (576 / width)^1.25`, in [1e-4, 1e-3].

    Two points meet it: 1e-3 at 576, measured on SmolLM2-135M, and SpecForge's 1e-4 at 3,584 and
    4,096. It is rounded to two digits.

    >>> rate_of(576), rate_of(1536), rate_of(3584), rate_of(8192)
    (0.001, 0.00029, 0.0001, 0.0001)
    """
    rate = _HIGHEST_RATE * (_KNOWN_WIDTH / width) ** 1.25
    return float(f"{min(max(rate, _LOWEST_RATE), _HIGHEST_RATE):.1e}")


# Which of them a run takes


def check_rate(optimizer: OptimizerConfig, width: int, *given: Mapping[str, Any]) -> None:
    """Refuse an optimizer whose learning rate nobody gave, and that none is chosen for.

    Args:
        optimizer: the run's.
        width: the draft's hidden size, for the hint.
        given: settings by section: those named, and those kept of a run or chosen.

    Raises:
        UserError: names the optimizer, and how its rate stands to AdamW's where that is known.
    """
    has_rate = any("learning_rate" in settings.get("optimizer", {}) for settings in given)
    if has_rate or optimizer.name in _RATED:
        return
    hint = ""
    if optimizer.name in _HINTS:
        hint = f"; {_HINTS[optimizer.name]}, which would be {rate_of(width):g} for this draft"
    raise UserError(
        f"optimizer.learning_rate: none is chosen for optimizer.name = {optimizer.name!r}; name "
        f"one with --set optimizer.learning_rate=RATE{hint}"
    )


def named_value(named: Mapping[str, Any], setting: str, default: str) -> str:
    """A text that a user's sections name for a setting, or the default."""
    section, key = setting.split(".")
    values = named.get(section)
    value = values.get(key, default) if isinstance(values, dict) else default
    return value if isinstance(value, str) else default


def not_named(choices: Iterable[Choice], named: Mapping[str, Any]) -> list[Choice]:
    """The choices whose settings a user's sections do not name."""
    left = []
    for choice in choices:
        section, key = choice.setting.split(".")
        values = named.get(section)
        if not isinstance(values, dict) or key not in values:
            left.append(choice)
    return left


def begun_settings(out: str | Path) -> dict[str, dict[str, Any]] | None:
    """The settings of the run in `out` that a checkpoint is there of, as defaults of `load_config`.

    A run goes on with what it began with: it must not choose anew, from other data or by the rules
    of a later version. The draft is `begun_draft`; the number of steps has a file of its own. None
    if no run has begun there.

    Raises:
        UserError: `config.toml` is damaged; names it and the setting.
    """
    path = Path(out) / "config.toml"
    begun = _begun(out)
    if begun is None:
        return None

    # Keys that are settings no longer are left out.
    tree: dict[str, dict[str, Any]] = {}
    for section, kind in get_type_hints(Config).items():
        if section == "draft":
            continue
        known = {field.name for field in fields(kind)} - {"steps"}
        values = begun.get(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section} is no section; set it back, or train elsewhere")
        tree[section] = {key: value for key, value in values.items() if key in known}
        from_dict(kind, tree[section], str(path), f"{section}.")
    return tree


def begun_draft(out: str | Path) -> DraftConfig | None:
    """The draft of the run in `out` that a checkpoint is there of: what was named once, switches
    and sizes, needs no naming again. None if no run has begun there.

    Raises:
        UserError: `config.toml` is damaged; names it and the setting.
    """
    begun = _begun(out)
    if begun is None:
        return None
    path = Path(out) / "config.toml"
    values = begun.get("draft", {})
    if not isinstance(values, dict):
        raise UserError(f"{path}: draft is no section; set it back, or train elsewhere")
    return from_dict(DraftConfig, values, str(path), "draft.")


def _begun(out: str | Path) -> dict[str, Any] | None:
    """The resolved settings of a run that a checkpoint is there of."""
    path = Path(out) / "config.toml"
    if not path.is_file() or not checkpoints(Path(out) / "checkpoints"):
        return None
    return read_toml(path)


def by_section(choices: Iterable[Choice]) -> dict[str, dict[str, Any]]:
    """The choices as defaults of `load_config`."""
    tree: dict[str, dict[str, Any]] = {}
    for choice in choices:
        section, key = choice.setting.split(".")
        tree.setdefault(section, {})[key] = choice.value
    return tree


def describe(choices: Iterable[Choice]) -> str:
    """What was chosen and why, in at most three lines."""
    lines: dict[str, list[str]] = {}
    for choice in choices:
        section = choice.setting.split(".")[0]
        line = section if section in ("objective", "optimizer") else "data"
        lines.setdefault(line, []).append(f"{choice.setting}={choice.value} ({choice.reason})")
    return "\n".join("chosen: " + ", ".join(parts) for parts in lines.values())
