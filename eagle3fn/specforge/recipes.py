"""SpecForge's training as values: its settings, and the functions that take the place of ours.

| what | SpecForge's | why ours is another |
|---|---|---|
| `Recipe.loss` | `arithmetic.forward_loss` | fast numerics leave out rows without a loss term |
| `Recipe.start` | as `torch.nn` draws its layers | a start from the target learns sooner |
| `Recipe.schedule` | `CosineAnnealingLR`'s recursion | it exceeds its formula, rises past its end |
| `Recipe.align_mask` | the mask without its last entry | one row late for a turn's first draft |
| `Recipe.order` | shuffled by the epoch alone | ours has the seed too, and leaves nothing out |
| `objective.numerics` | `"plain"` | as `Recipe.loss` |
| `objective.survival` | 1.0 | every row at every step costs twice the products |
| `objective.normalization` | `"rows"` | padding and the micro-batches' split change the loss |
| `objective.teacher` | `"full"` | much memory for the same values to rounding |
| `optimizer.name` | `"adamw"` | Muon learns more from a sample |
| `optimizer.accumulation` | `"params"` | sums in bf16 lose small gradients |
| `train.init` | `"random"` | as `Recipe.start` |
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config, from_dict, to_dict
from eagle3fn.base.draft_config import DEFAULT_TAPS, DraftConfig, switches
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import STARTS, OptimizerConfig
from eagle3fn.base.types import Frozen, Params
from eagle3fn.data.order import epoch_order
from eagle3fn.model.table import TABLE, weights
from eagle3fn.specforge.arithmetic import BATCH_MEANS, forward_loss
from eagle3fn.train.recipe import Recipe
from eagle3fn.train.schedules import Schedule, schedule_span
from eagle3fn.train.warm_start import start_from_draft

NAME = "specforge"
SETTINGS: dict[str, dict[str, Any]] = {
    "objective": {
        "numerics": "plain",
        "normalization": "rows",
        "survival": 1.0,
        "teacher": "full",
    },
    "optimizer": {"name": "adamw", "accumulation": "params"},
    "train": {"init": "random"},
}
"""Settings in which SpecForge differs from our defaults, or would from later ones, by section;
defaults of `load_config`.
"""


class SpecForge(NamedTuple):
    """What `bind` and `train` take for SpecForge's training."""

    config: Config
    recipe: Recipe


def recipe(draft: DraftConfig, **sections: dict[str, Any]) -> SpecForge:
    """SpecForge's configuration and functions for a draft.

    Args:
        draft: the draft's shape.
        sections: settings by section, as `train={"steps": 100}`; they win over `SETTINGS`.

    Returns:
        `(config, recipe)`; the recipe is `RECIPE`, in the order of `train_eagle3.py`.

    Raises:
        UserError: an unknown setting, or a value out of range.
    """
    tree: dict[str, Any] = {"draft": to_dict(draft)}
    for section in SETTINGS | sections:
        tree[section] = SETTINGS.get(section, {}) | sections.get(section, {})
    return SpecForge(from_dict(Config, tree, "specforge.recipe"), RECIPE)


# The functions


def start(config: Config, frozen: Frozen, seed: int) -> Params:
    """The draft's first parameters, as SpecForge's module draws them after `manual_seed(seed)`.

    Embeddings are drawn from normal(0, 1), matrices uniformly from ±1/√fan_in; norms are 1.
    Where `train.init` is a draft's folder they are that draft's, and `seed` is not read.
    """
    draft = config.draft
    check_plain(draft)
    if config.train.init not in STARTS:
        return start_from_draft(config, frozen, config.train.init)
    generator = torch.Generator().manual_seed(seed)

    drawn = {}
    for weight in TABLE:
        # The embedding, the first row, is drawn even where it is the target's and is not used.
        if weight.role != "embedding" and not weight.of(draft):
            continue
        value = torch.ones(weight.shape(draft), dtype=torch.float32)
        if weight.role == "embedding":
            value.normal_(generator=generator)
        elif weight.role != "norm":
            # With a = √5 the bound is 1/√fan_in; torch.nn.Linear calls it so.
            torch.nn.init.kaiming_uniform_(value, math.sqrt(5), generator=generator)
        drawn[weight.name] = value

    dtype = getattr(torch, config.train.dtype)
    return {name: drawn[name].to(config.train.device, dtype) for name in weights(draft)}


def check_plain(draft: DraftConfig) -> None:
    """Refuse a draft that SpecForge does not have: with a switch, or other than three taps.

    Raises:
        UserError: names it.
    """
    remedy = "SpecForge's draft is without; leave it out, or train without --recipe"
    for field in switches():
        value = getattr(draft, field.name)
        if value != field.default:
            raise UserError(f"draft.{field.name} = {value}: {remedy}")
    if draft.taps != DEFAULT_TAPS:
        raise UserError(f"draft.aux_layers = {draft.aux_layers}: SpecForge has three taps")


_UNREAD = {
    ("objective", "numerics", "fast"): "SpecForge's arithmetic is plain",
    ("train", "init", "target"): "SpecForge's draft starts from random weights",
}
"""Values of settings that these functions do not read, and why."""


def check_read(named: dict[str, Any]) -> None:
    """Refuse a value that these functions would not heed.

    Args:
        named: the settings that a user names, by section.

    Raises:
        UserError: names the setting and its value.
    """
    for (section, key, value), why in _UNREAD.items():
        if named.get(section, {}).get(key) == value:
            raise UserError(
                f"{section}.{key} = {value!r}: {why}; leave the setting out, or train without "
                "--recipe"
            )


def schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Linear warm-up over `W` steps, then `CosineAnnealingLR`'s recursion over `T` steps.

    `rate(n) = (n + 1) / W · base` for `n < W`. After it, with `e = n - W`,

        rate(n) = (1 + cos(π · e / T)) / (1 + cos(π · (e - 1) / T)) · rate(n - 1)

    As epoch 0 is a step of the recursion too, the values are `2 / (1 + cos(π / T))` times those of
    `schedules.cosine`. They rise again past the end. The function returned is pure: threads may
    share it.

    Raises:
        UserError: `total_steps` is below 1.
    """
    base = config.learning_rate
    warmup, decay = schedule_span(config, total_steps)

    # The rates of a run of this span, and one more, are computed here, once.
    rates = [(step + 1) / warmup * base for step in range(warmup)]
    for epoch in range(decay + 1):
        before = rates[-1] if rates else base
        rates.append(_recursion(before, epoch, base, decay))

    def rate(step: int) -> float:
        if step < len(rates):
            return rates[step]

        # Past the end: from the last one on, without changing what threads share.
        value = rates[-1]
        for later in range(len(rates), step + 1):
            value = _recursion(value, later - warmup, base, decay)
        return value

    return rate


def _recursion(rate: float, epoch: int, base: float, span: int) -> float:
    """`CosineAnnealingLR`'s rate of an epoch, from the rate of the one before it."""
    # One epoch after a minimum, where the quotient below divides by zero.
    if (epoch - 1 - span) % (2 * span) == 0:
        return rate + base * (1 - math.cos(math.pi / span)) / 2
    above = 1 + math.cos(math.pi * epoch / span)
    below = 1 + math.cos(math.pi * (epoch - 1) / span)
    return above / below * rate


def align_mask(token_mask: Tensor) -> Tensor:
    """Rows to train, `(S,)`: the mask of assistant tokens, `(S,)`, with its last entry zeroed."""
    return torch.cat([token_mask[:-1], torch.zeros_like(token_mask[-1:])])


def script_order(n: int, config: Config, place: int) -> int:
    """The sample at a place as `train_eagle3.py` reads them: shuffled by the epoch's number alone.

    Epochs are counted from 1. Each leaves out what does not fill a micro-batch.

    Raises:
        UserError: fewer samples than a micro-batch, where none would be left.
    """
    epoch, place_in_epoch = divmod(place, _whole_batches(n, config))
    return int(epoch_order(n, 1 + epoch)[place_in_epoch])


def stored_order(n: int, config: Config, place: int) -> int:
    """The sample at a place as the dataflow launcher reads them: in stored order, in every epoch.

    An epoch leaves out what does not fill a micro-batch.

    Raises:
        UserError: fewer samples than a micro-batch, where none would be left.
    """
    return place % _whole_batches(n, config)


def _whole_batches(n: int, config: Config) -> int:
    """How many of `n` samples fill micro-batches."""
    size = config.data.micro_batch
    kept = n - n % size
    if not kept:
        raise UserError(
            f"data.micro_batch = {size}: {n} samples fill no batch; extract more or lower it"
        )
    return kept


# The recipes


RECIPE = Recipe(
    name=NAME,
    loss=forward_loss,
    start=start,
    schedule=schedule,
    align_mask=align_mask,
    order=script_order,
    batch_means=BATCH_MEANS,
)
DATAFLOW_RECIPE = RECIPE._replace(name="specforge-dataflow", order=stored_order)
"""As `RECIPE`, in the order of SpecForge's dataflow launcher."""

RECIPES = {each.name: each for each in (RECIPE, DATAFLOW_RECIPE)}
"""What `eagle3fn train --recipe` names."""


# Settings of former versions


class _OldSetting(NamedTuple):
    """A setting that had another name, or values that a recipe has taken over."""

    name: str
    values: tuple[str, ...] | None  # those that are refused; None: every value
    instead: str  # what to write now


_OLD_SETTINGS = (
    _OldSetting(
        "objective.numerics",
        ("legacy",),
        "objective.numerics=plain; SpecForge's arithmetic is part of --recipe specforge",
    ),
    _OldSetting(
        "optimizer.schedule",
        ("legacy",),
        "--recipe specforge, which has SpecForge's schedule",
    ),
    _OldSetting(
        "optimizer.accumulation",
        ("legacy",),
        "optimizer.accumulation=params, part of --recipe specforge",
    ),
    _OldSetting("optimizer.horizon", None, "optimizer.schedule_steps"),
    _OldSetting(
        "train.init",
        ("legacy",),
        "--recipe specforge, which has SpecForge's start",
    ),
    _OldSetting(
        "data.mask_alignment",
        ("legacy",),
        "--recipe specforge, which has SpecForge's mask",
    ),
    _OldSetting(
        "data.order",
        ("legacy", "stored"),
        "--recipe specforge or specforge-dataflow, which have SpecForge's orders",
    ),
)
_NOW_FIXED = ("data.mask_alignment", "data.order")  # of their values ours alone is left


def refuse_old_settings(tree: dict[str, Any], where: str) -> None:
    """Refuse settings by the names and values that they had before SpecForge's became a recipe.

    Args:
        tree: settings by section, as read from a file.
        where: names the file, for the message.

    Raises:
        UserError: names the setting, its value, and what to write now.
    """
    for old in _OLD_SETTINGS:
        section, key = old.name.split(".")
        values = tree.get(section)
        if not isinstance(values, dict) or key not in values:
            continue

        value = values[key]
        if old.values is None or value in old.values:
            raise UserError(f"{where}: {old.name} = {value!r}: write {old.instead}")
        if old.name in _NOW_FIXED:
            raise UserError(
                f"{where}: {old.name} = {value!r} is no setting any more: "
                "it is always so without a recipe; leave it out"
            )
