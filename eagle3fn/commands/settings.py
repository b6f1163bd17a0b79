"""The configuration of a run: what a user names, what a begun run keeps, and what is chosen."""

from typing import TYPE_CHECKING, Any

from eagle3fn.commands.shared import draft_shape

if TYPE_CHECKING:
    from eagle3fn.base.config import Config
    from eagle3fn.base.draft_config import DraftConfig
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.map_data import CountedOn


def draft_of(options: Any, tree: dict[str, Any], size: int | None) -> "DraftConfig":
    """The draft's shape: that of the run that goes on, unless `--draft-config` names another, else
    by the target; its vocabulary is the map's.

    Args:
        options: the command's.
        tree: the target's configuration.
        size: of the draft vocabulary; None: not known.

    Raises:
        UserError: a damaged run or draft JSON; a target that no draft is built for.
    """
    from dataclasses import replace

    from eagle3fn.train.branch import branch_draft
    from eagle3fn.train.defaults import begun_draft

    kept = None
    if not options.draft_config:
        kept = begun_draft(options.out)
        if kept is None and options.source:
            kept = branch_draft(options.source)
    if kept is None:
        return draft_shape(options, tree, size)
    return replace(kept, draft_vocab_size=size or kept.draft_vocab_size)


def overrides_of(options: Any) -> list[str]:
    """The settings that `train`'s own options name, as `--set` has them."""
    overrides = list(options.set)
    if options.on_nonfinite:
        overrides.append(f"train.on_nonfinite={options.on_nonfinite}")
    return overrides


def named_settings(options: Any, overrides: list[str]) -> dict[str, Any]:
    """The settings that a TOML file and overrides name, by section.

    Raises:
        UserError: a file or setting that cannot be read, or has the name of an earlier version.
    """
    from eagle3fn.base.toml import override, read_toml
    from eagle3fn.specforge.recipes import refuse_old_settings

    named = read_toml(options.config) if options.config else {}
    refuse_old_settings(named, options.config)
    given: dict[str, Any] = {}
    for text in overrides:
        override(given, text)
        override(named, text)
    refuse_old_settings(given, "--set")
    return named


def unnamed_settings(
    options: Any,
    named: dict[str, Any],
    draft: "DraftConfig",
    features: "FeatureSet",
    counted: "CountedOn",
    device: str,
    ranks: int = 1,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Values for the settings that nobody names, by section, and a text of where they are from.

    A run that goes on has those it began with; a recipe's own come next, then chosen ones.

    Args:
        options: the command's.
        named: `named_settings`.
        draft: the draft's shape.
        features: what is trained on.
        counted: what the vocabulary map was counted on.
        device: where it is trained.
        ranks: that train together.
    """
    from eagle3fn.data.map_data import held_out_by
    from eagle3fn.specforge.recipes import SETTINGS
    from eagle3fn.train.defaults import (
        batch_of_ranks,
        begun_settings,
        by_section,
        chosen_defaults,
        describe,
        named_value,
        not_named,
    )

    begun = begun_settings(options.out)
    if begun is not None:
        return begun, f"settings that are not named: as the run began, {options.out}/config.toml"
    if options.source:
        return _of_source(options, named), f"settings that are not named: those of {options.source}"
    micro_batch = named.get("data", {}).get("micro_batch", 1)
    if type(micro_batch) is not int:
        micro_batch = 1  # it is refused later, by its name
    if options.recipe:
        chosen = not_named(batch_of_ranks(ranks, micro_batch), named)
        return SETTINGS | by_section(chosen), describe(chosen)
    optimizer = named_value(named, "optimizer.name", "muon")
    start = named_value(named, "train.init", "target")
    held_out = held_out_by(counted, features)
    samples = len(features.samples)
    choices = chosen_defaults(
        draft, samples, device, optimizer, start, held_out, ranks, micro_batch
    )
    chosen = not_named(choices, named)
    return by_section(chosen), describe(chosen)


def _of_source(options: Any, named: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of the checkpoint that `--from` names, with a recipe's own over them.

    Its number of steps too, unless another way to choose it is named.
    """
    from eagle3fn.specforge.recipes import SETTINGS
    from eagle3fn.train.branch import branch_settings
    from eagle3fn.train.defaults import named_value

    settings = branch_settings(options.source)
    optimizer = settings["optimizer"]
    if named_value(named, "optimizer.name", optimizer["name"]) != optimizer["name"]:
        del optimizer["learning_rate"]  # it was another optimizer's
    start = settings["train"]["init"]  # no start is read: it stays what it was
    for section, values in SETTINGS.items() if options.recipe else ():
        settings[section] = settings[section] | values
    settings["train"]["init"] = start
    if options.minutes is not None or "epochs" in named.get("train", {}):
        del settings["train"]["steps"]
    return settings


def config_of(
    options: Any,
    draft: "DraftConfig | None",
    overrides: list[str],
    recipe: str | None = None,
    defaults: dict[str, dict[str, Any]] | None = None,
) -> "Config":
    """The run's configuration.

    Args:
        options: the command's.
        draft: the draft's shape; None: as the settings have it.
        overrides: `section.key=value`, as `--set` has them.
        recipe: `--recipe`, if given.
        defaults: `unnamed_settings`.

    Raises:
        UserError: settings that cannot be, or a loss, optimizer or schedule that is not there.
    """
    from eagle3fn.base.config import load_config
    from eagle3fn.base.errors import UserError
    from eagle3fn.model.checks import check_loss
    from eagle3fn.specforge.recipes import RECIPE, check_read
    from eagle3fn.train.optimizer import named_optimizer
    from eagle3fn.train.recipe import OURS, check_schedule

    config = load_config(options.config, overrides, draft, defaults)
    loss = config.objective.loss
    if isinstance(loss, str) and loss in RECIPE.batch_means and not recipe:
        raise UserError(
            f"objective.loss = {loss!r} is a mean over the whole batch: write nla or lk, which are "
            "such losses by row, or add --recipe specforge"
        )
    check_loss(config, RECIPE.batch_means)
    named_optimizer(config.optimizer)
    check_schedule(config, RECIPE if recipe else OURS)
    if recipe:
        check_read(named_settings(options, overrides))
    return config
