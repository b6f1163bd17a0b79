"""SpecForge's training as values: its settings, and the functions that take the place of ours.

| what | SpecForge's | why ours is the default |
|---|---|---|
| `Recipe.loss` | `arithmetic.forward_loss` | the fast numerics leave out rows that reach no loss term |
| `Recipe.start` | layers of `torch.nn`, as they are made | a draft that starts from the target learns sooner |
| `Recipe.schedule` | the recursion of `CosineAnnealingLR` | it lies above its formula, and rises again past the end |
| `Recipe.align_mask` | the mask without its last entry | it lies one row late for a server's first draft of a turn |
| `Recipe.order` | shuffled by the epoch alone | ours depends on the seed too, and leaves nothing out |
| `objective.numerics` | `"plain"` | as `Recipe.loss` |
| `objective.normalization` | `"rows"` | padding, and the split into micro-batches, then change the loss |
| `objective.teacher` | `"full"` | all logits in fp32 need much memory for the same values to rounding |
| `optimizer.accumulation` | `"params"` | sums in bf16 lose small gradients |
| `train.init` | `"random"` | as `Recipe.start` |
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config, OptimizerConfig, from_dict, to_dict
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Frozen, Params
from eagle3fn.data.pipeline import epoch_order
from eagle3fn.model.table import EMBED, shapes
from eagle3fn.specforge.arithmetic import forward_loss
from eagle3fn.train.optimizer import Schedule, schedule_span
from eagle3fn.train.recipe import Recipe

NAME = "specforge"
SETTINGS: dict[str, dict[str, Any]] = {
    "objective": {"numerics": "plain", "normalization": "rows", "teacher": "full"},
    "optimizer": {"accumulation": "params"},
    "train": {"init": "random"},
}
"""Settings in which SpecForge differs from our defaults, by section; defaults of `load_config`."""


class SpecForge(NamedTuple):
    """SpecForge's training: `config` for `bind` and `train`, `recipe` beside it."""

    config: Config
    recipe: Recipe


def recipe(draft: DraftConfig, **sections: dict[str, Any]) -> SpecForge:
    """SpecForge's configuration and functions for a draft.

    Args:
        draft: the draft's shape.
        sections: settings by section, as `train={"steps": 100}`; they win over `SETTINGS`.

    Raises:
        UserError: an unknown setting, or a value out of range.
    """
    tree: dict[str, Any] = {"draft": to_dict(draft)}
    for section in SETTINGS | sections:
        tree[section] = SETTINGS.get(section, {}) | sections.get(section, {})
    return SpecForge(from_dict(Config, tree, "specforge.recipe"), RECIPE)


def start(config: Config, frozen: Frozen, seed: int) -> Params:
    """The draft's first parameters as SpecForge's module draws them under the same seed.

    As the layers of `torch.nn` are made: the embedding from normal(0, 1), then matrices uniform in ±1/√fan_in, norms 1.
    The embedding is drawn first, also where it is the target's and the draw is thrown away.
    """
    draft = config.draft
    generator = torch.Generator().manual_seed(seed)

    embedding = torch.empty(draft.vocab_size, draft.hidden_size, dtype=torch.float32)
    drawn = {EMBED: embedding.normal_(generator=generator)}
    for name, shape in shapes(draft).items():
        if len(shape) == 1:
            drawn[name] = torch.ones(shape, dtype=torch.float32)
        elif name != EMBED:
            matrix = torch.empty(shape, dtype=torch.float32)
            drawn[name] = torch.nn.init.kaiming_uniform_(matrix, math.sqrt(5), generator=generator)

    dtype = getattr(torch, config.train.dtype)
    return {name: drawn[name].to(config.train.device, dtype) for name in shapes(draft)}


def schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Linear warm-up, then `CosineAnnealingLR`'s recursion, entered at epoch 0 after the warm-up.

    Its values are `2 / (1 + cos(π/T))` times the closed form's, `T` the steps after the warm-up, and rise again past
    the end. The function returned is pure: threads may share it.

    Raises:
        UserError: `total_steps` is below 1.
    """
    base = config.learning_rate
    warmup, decay = schedule_span(config, total_steps)

    # One step more than the schedule spans: what a run needs is made here, once.
    rates = [(step + 1) / warmup * base for step in range(warmup)]
    for step in range(warmup, warmup + decay + 1):
        rates.append(_recursion(rates[-1] if rates else base, step - warmup, base, decay))

    def rate(step: int) -> float:
        if step < len(rates):
            return rates[step]
        value = rates[-1]
        for later in range(len(rates), step + 1):
            value = _recursion(value, later - warmup, base, decay)
        return value

    return rate


def _recursion(rate: float, epoch: int, base: float, span: int) -> float:
    """`CosineAnnealingLR`'s rate of an epoch, from the one before it."""
    if (epoch - 1 - span) % (2 * span) == 0:
        return rate + base * (1 - math.cos(math.pi / span)) / 2
    above = 1 + math.cos(math.pi * epoch / span)
    below = 1 + math.cos(math.pi * (epoch - 1) / span)
    return above / below * rate


def align_mask(token_mask: Tensor) -> Tensor:
    """Rows to train, `(S,)`: the mask of assistant tokens, `(S,)`, with its last entry zeroed."""
    return torch.cat([token_mask[:-1], torch.zeros_like(token_mask[-1:])])


def script_order(n: int, config: Config, step: int) -> list[int]:
    """The samples of a step as `train_eagle3.py`'s sampler gives them: shuffled by the epoch alone.

    An epoch leaves out what does not fill a micro-batch.

    Raises:
        UserError: fewer samples than a micro-batch, where none would be left.
    """
    kept = _whole_batches(n, config)
    return [epoch_order(n, 1 + place // kept)[place % kept] for place in _places(config, step)]


def stored_order(n: int, config: Config, step: int) -> list[int]:
    """The samples of a step as the dataflow launcher reads them: in stored order, in every epoch.

    An epoch leaves out what does not fill a micro-batch.

    Raises:
        UserError: fewer samples than a micro-batch, where none would be left.
    """
    kept = _whole_batches(n, config)
    return [place % kept for place in _places(config, step)]


def _places(config: Config, step: int) -> range:
    """A step's places in epochs laid end to end."""
    size = config.data.global_batch
    return range(step * size, (step + 1) * size)


def _whole_batches(n: int, config: Config) -> int:
    kept = n - n % config.data.micro_batch
    if not kept:
        raise UserError(
            f"data.micro_batch = {config.data.micro_batch}: {n} samples fill no batch; extract more or lower it"
        )
    return kept


RECIPE = Recipe(
    name=NAME,
    loss=forward_loss,
    start=start,
    schedule=schedule,
    align_mask=align_mask,
    order=script_order,
)
DATAFLOW_RECIPE = RECIPE._replace(name="specforge-dataflow", order=stored_order)
"""As `RECIPE`, in the order of SpecForge's dataflow launcher."""

RECIPES = {each.name: each for each in (RECIPE, DATAFLOW_RECIPE)}
"""What `eagle3fn train --recipe` names."""

_OLD_SETTINGS = {
    "objective.numerics": "objective.numerics=plain; SpecForge's arithmetic is part of --recipe specforge",
    "optimizer.schedule": "--recipe specforge, which brings SpecForge's schedule",
    "optimizer.accumulation": "optimizer.accumulation=params, part of --recipe specforge",
    "train.init": "--recipe specforge, which brings SpecForge's start",
    "data.mask_alignment": "--recipe specforge, which brings SpecForge's mask",
    "data.order": "--recipe specforge or specforge-dataflow, which bring SpecForge's order",
    "optimizer.horizon": "optimizer.schedule_steps",
}


def refuse_old_settings(tree: dict[str, Any], where: str) -> None:
    """Refuse settings by the names they had before SpecForge's were a recipe.

    Raises:
        UserError: names the setting, its value, and what to write now.
    """
    for name, instead in _OLD_SETTINGS.items():
        section, key = name.split(".")
        values = tree.get(section)
        if not isinstance(values, dict) or key not in values:
            continue
        if values[key] in ("legacy", "stored") or key == "horizon":
            raise UserError(f"{where}: {name} = {values[key]!r} is now {instead}")
        if key in ("mask_alignment", "order"):
            raise UserError(
                f"{where}: {name} = {values[key]!r} is no setting any more: it is always so but under a recipe; "
                "leave it out"
            )
