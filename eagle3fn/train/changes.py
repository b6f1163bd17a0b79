"""What has changed since a checkpoint was written: what may, what is refused, and how it is said.

| | goes on in its own folder | goes on in a new one, `--from` |
|---|---|---|
| settings that leave a step's result as it is (`MAY_CHANGE`) | may change | may change |
| the number of steps (`HORIZON`) | may change | may change |
| the draft, its dtype, its vocabulary, its optimizer (`FIXED`) | refused | refused |
| `data.held_out` of the same features | refused | refused |
| more `data.held_out` of features that an earlier run trained on | refused | refused |
| anything else | refused | may change |
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from eagle3fn.base.config import Config, to_dict
from eagle3fn.base.errors import UserError, printable

MAY_CHANGE = {
    "data.prefetch",
    "train.checkpoint_every",
    "train.eval_every",
    "train.keep_last",
    "train.on_nonfinite",
    "train.patience",
}
"""Settings that do not touch the result of a step."""

HORIZON = {"train.epochs", "train.steps"}
"""Settings that choose how many steps a run takes: `horizon.with_horizon` says which may be."""

FIXED = {"train.dtype", "vocabulary map", "optimizer.name"}
"""What a state is made of, with all of `draft`: no run goes on under another one. Optimizers whose
states have the same leaves, as Lion's and SGD's, mean others by them."""

RENAMED = {"optimizer.horizon": "optimizer.schedule_steps"}
"""Settings of older checkpoints, and what they are named now."""

GONE = {"data.mask_alignment": "serving", "data.order": "shuffled"}
"""Settings of older checkpoints that now always have this value."""

RECIPE = "recipe"  # among the data's hashes, where a checkpoint keeps its name
FEATURES = "features"
MADE_WITH = "features: "
"""Begins the names under which the data's hashes have what features were made with, where that is
known: texts, which explain how the features' hashes differ."""
THREADS = "threads"


class Change(NamedTuple):
    """A setting, or a part of the data, that is not what a checkpoint was written with."""

    name: str  # of a setting "section.key"; else "features", "recipe", …
    was: Any
    now: Any
    hashed: bool = False  # the values are hashes, which say nothing to a user
    made_with: tuple["Change", ...] = ()  # of features: in what they are others, where it is known

    def line(self) -> str:
        """For a user, as "train.eval_every: 50, was 500"."""
        if self.made_with:
            return f"{self.name}: {'; '.join(each.line() for each in self.made_with)}"
        if self.hashed:
            return f"{self.name}: others"
        return f"{self.name}: {_shown(self.now)}, was {_shown(self.was)}"


def changes_since(meta: dict[str, Any], config: Config, data: dict[str, str]) -> list[Change]:
    """What differs from a checkpoint's `meta.json`, by name: settings first, then data and threads.

    Args:
        meta: checked (`checkpoint_meta.read_meta`).
        config: the run's now.
        data: the run's hashes and its recipe's name, `Run.data`.
    """
    found = []
    was = written_settings(meta)
    now = _dotted(to_dict(config))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            found.append(Change(name, was.get(name), now.get(name)))

    for name in sorted(meta["data"].keys() | data.keys()):
        before = meta["data"].get(name, "none")
        after = data.get(name, "none")
        if before != after and not name.startswith(MADE_WITH):
            parts = made_otherwise(meta["data"], data) if name == FEATURES else ()
            found.append(Change(name, before, after, hashed=name != RECIPE, made_with=parts))

    # The bits depend on the number of threads, and are promised under the tree alone.
    threads = torch.get_num_threads()
    if config.train.reduce == "tree" and meta["threads"] != threads:
        found.append(Change(THREADS, meta["threads"], threads))
    return found


def made_with(settings: Mapping[str, str]) -> dict[str, str]:
    """What features were made with, by option, as the data's hashes have it."""
    return {MADE_WITH + name: value for name, value in settings.items()}


def made_otherwise(was: Mapping[str, str], now: Mapping[str, str]) -> tuple[Change, ...]:
    """In what features were made otherwise, as far as both say it; by the names of `MADE_WITH`."""
    names = sorted(name for name in was.keys() & now.keys() if name.startswith(MADE_WITH))
    return tuple(
        Change(name.removeprefix(MADE_WITH), was[name], now[name])
        for name in names
        if was[name] != now[name]
    )


def written_settings(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, dotted, under today's names.

    What it does not name is younger than the checkpoint, which was made under its default.
    """
    settings = {RENAMED.get(name, name): value for name, value in _dotted(meta["config"]).items()}
    settings = {
        name: value for name, value in settings.items() if (name, value) not in GONE.items()
    }
    for section, kind in get_type_hints(Config).items():
        for item in fields(kind):
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            if default is not MISSING and default is not None:
                settings.setdefault(f"{section}.{item.name}", default)
    return settings


def trained_with(meta: dict[str, Any]) -> dict[str, int]:
    """By the hash of features, the fewest held-out samples that a state was trained with on them.

    Those of the checkpoint itself, and of the runs before `--from`.
    """
    found = dict(meta.get("earlier", {}))
    features = meta["data"].get(FEATURES)
    held_out = written_settings(meta)["data.held_out"]
    if features is not None:
        found[features] = min(held_out, found.get(features, held_out))
    return found


def refuse_held_out(
    path: Path, trained: Mapping[str, int], config: Config, data: dict[str, str]
) -> None:
    """Refuse to hold samples out that a checkpoint's state was trained on, by a run before too.

    Args:
        path: of the checkpoint.
        trained: `trained_with` of its `meta.json`.
        config: the run's now.
        data: its hashes, `Run.data`.

    Raises:
        UserError: names the number held out, and the greatest one that may be.
    """
    now = config.data.held_out
    most = trained.get(data[FEATURES], now)
    if now > most:
        raise UserError(
            f"{path}: data.held_out was {most}, is {now}, of features that its run or one before "
            "was trained on: samples that were trained on would be held out; set "
            f"data.held_out={most}, or give other features"
        )


def refuse_in_place(path: Path, changes: list[Change]) -> None:
    """Refuse what a run in its own folder cannot go on under.

    Raises:
        UserError: names what changed, both values, and `--from`.
    """
    names = {change.name for change in changes}
    refused = [change for change in changes if change.name not in MAY_CHANGE | HORIZON]

    # What no run can go on under comes first: the remedy for the others would be refused.
    for change in sorted(refused, key=lambda change: not _refused_elsewhere(change, names)):
        raise _refused(path, change, names)


def refuse_features(path: Path, made: tuple[Change, ...]) -> None:
    """Refuse features that were made otherwise (`made_otherwise`), if any were.

    Raises:
        UserError: as `refuse_in_place`.
    """
    if made:
        refuse_in_place(path, [Change(FEATURES, "", "", hashed=True, made_with=made)])


def refuse_elsewhere(path: Path, changes: list[Change]) -> None:
    """Refuse what no run can go on under, in a new folder either.

    Raises:
        UserError: names what changed, both values, and what to do.
    """
    names = {change.name for change in changes}
    for change in changes:
        if change.name == "data.held_out" and FEATURES not in names:
            raise UserError(
                f"{path}: data.held_out was {change.was}, is {change.now}, of the same features: "
                "samples that were trained on would be held out, or the data's order would be "
                f"another; set data.held_out={change.was}, or give other features"
            )
        if change.name == "train.init":
            raise UserError(
                f"{path}: train.init was {_shown(change.was)}, is {_shown(change.now)}: --from "
                "goes on with a state, for which no start is read; leave one of them out"
            )
        if _is_fixed(change):
            raise _refused(path, change, names)


def _is_fixed(change: Change) -> bool:
    return change.name in FIXED or change.name.startswith("draft.")


def _refused_elsewhere(change: Change, names: Collection[str]) -> bool:
    """Whether `refuse_elsewhere` refuses it, where `names` have changed."""
    same_samples = change.name == "data.held_out" and FEATURES not in names
    return same_samples or change.name == "train.init" or _is_fixed(change)


def _refused(path: Path, change: Change, names: Collection[str]) -> UserError:
    """One sentence: what changed, and how to go on all the same; `names` are all that did."""
    remedy = f"go on under it in a new folder with --from {path} --out NEW"
    if _is_fixed(change):
        remedy = "begin a new run from an exported draft with --set train.init=RUN/draft"
    elif _refused_elsewhere(change, names):
        remedy = "begin a new run with another --out"

    # A recipe is known by its name; the other data by hashes.
    if change.name == RECIPE:
        return UserError(
            f"{path}: written for another recipe ({printable(change.was)}, now {change.now}); "
            f"name it again, or {remedy}"
        )
    if change.made_with:
        one = change.made_with[0]
        return UserError(
            f"{path}: written for other features: {one.name} was {_shown(one.was)}, is "
            f"{_shown(one.now)}; give what it was, or {remedy}"
        )
    if change.hashed:
        return UserError(f"{path}: written for other {change.name}; name them again, or {remedy}")
    if change.name == THREADS:
        return UserError(
            f"{path}: written by ranks of {change.was} threads, these have {change.now}: under "
            "train.reduce = 'tree' the bits would differ; set "
            f"OMP_NUM_THREADS={change.was} (or --threads), or {remedy}"
        )

    words = f"is {change.now!r}; set it back, or {remedy}"
    if change.name in GONE:
        words = f"a setting that is gone; {remedy}"
    return UserError(
        f"{path}: a checkpoint of another configuration: {change.name} was {change.was!r:.200}, "
        f"{words}"
    )


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


def _dotted(config: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted names, as JSON has them: lists for tuples."""
    settings = {}
    for section, values in json.loads(json.dumps(config)).items():
        for name, value in values.items():
            settings[f"{section}.{name}"] = value
    return settings
