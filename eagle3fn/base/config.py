"""Configuration: frozen dataclasses, read from TOML with dotted overrides; unknown keys are refused."""

import math
import types
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.toml import override, read_toml


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss. `normalization`: "mask" divides by trained rows, "rows" by all B·S rows (the old tool).

    `loss`: "kl", or by acceptance (arXiv 2602.23881) "lk_alpha", or "lk_lambda", which weighs KL by
    `kl_scale · exp(-kl_decay · acceptance)`. Both take the legacy numerics, and one micro-batch an update.

    `numerics`: "legacy" is the old tool's arithmetic, operation for operation; "fast" the same mathematics on the rows
    that matter, with its own compact teacher, so that `teacher` and `teacher_chunk` have no effect there.
    """

    ttt_length: int = 7
    decay: float = 0.8
    normalization: Literal["mask", "rows"] = "mask"
    loss: Literal["kl", "lk_alpha", "lk_lambda"] = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0
    teacher: Literal["compact", "full"] = "compact"
    teacher_chunk: int = 32768
    numerics: Literal["fast", "legacy"] = "fast"

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "objective")
        require(self.ttt_length >= 1, "objective.ttt_length", self.ttt_length, "at least 1")
        require(0 < self.decay <= 1, "objective.decay", self.decay, "in (0, 1]")
        require(
            self.teacher_chunk >= 1, "objective.teacher_chunk", self.teacher_chunk, "at least 1"
        )
        require(0 <= self.kl_scale <= 1, "objective.kl_scale", self.kl_scale, "in [0, 1]")
        require(
            0 <= self.kl_decay < math.inf,
            "objective.kl_decay",
            self.kl_decay,
            "at least 0 and finite",
        )
        plain = "'kl' under the fast numerics; for it set objective.numerics='legacy'"
        require(self.loss == "kl" or self.numerics == "legacy", "objective.loss", self.loss, plain)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on fp32 masters. "legacy" copies the old tool: its cosine recursion, bf16 accumulation.

    `horizon`: updates that the schedule spans, where a run makes another number; 0: `train.steps`.
    """

    learning_rate: float = 1e-4
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["cosine", "legacy"] = "cosine"
    accumulation: Literal["fp32", "legacy"] = "fp32"
    horizon: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "optimizer")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "above 0")
        require(
            0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", self.warmup_ratio, "in [0, 1)"
        )
        for name in ("learning_rate", "max_grad_norm", "eps", "weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name}", value, "at least 0 and finite")
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "above 0")
        require(self.horizon >= 0, "optimizer.horizon", self.horizon, "at least 0 (0: train.steps)")
        require(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "in [0, 1)")
        require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "in [0, 1)")


@dataclass(frozen=True)
class DataConfig:
    """Samples to batches. `mask_alignment`: "serving" trains the rows a server drafts from, "legacy" the old tool's.

    `order`: "shuffled" by the seed, "legacy" as the old tool's sampler, "stored" as its dataflow launcher.
    """

    max_length: int = 2048
    mask_alignment: Literal["serving", "legacy"] = "serving"
    global_batch: int = 1
    micro_batch: int = 1
    held_out: int = 0
    order: Literal["shuffled", "legacy", "stored"] = "shuffled"
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "data")
        require(self.max_length >= 3, "data.max_length", self.max_length, "at least 3")
        require(self.micro_batch >= 1, "data.micro_batch", self.micro_batch, "at least 1")
        fits = self.global_batch >= 1 and self.global_batch % self.micro_batch == 0
        require(
            fits,
            "data.global_batch",
            self.global_batch,
            f"a multiple of data.micro_batch = {self.micro_batch}",
        )
        require(self.held_out >= 0, "data.held_out", self.held_out, "at least 0")
        require(self.prefetch >= 0, "data.prefetch", self.prefetch, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `steps` 0 means as many as `--minutes` allow, or `epochs` need.

    `init` "target" starts head, norm and projection from the target; "legacy" draws what the old tool draws. `reduce`
    "tree" sums micro-batches and ranks by one binary tree, so that 1, 2, 4, … ranks give the same bits; "sum" in order,
    and over ranks as the backend does.
    A loss or gradient that is not finite ends the run, or under `on_nonfinite` "skip" its update is dropped.
    """

    epochs: int = 10
    steps: int = 0
    seed: int = 0
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    device: str = "cpu"
    init: Literal["target", "random", "legacy"] = "target"
    reduce: Literal["sum", "tree"] = "sum"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "train")
        for name in ("epochs", "eval_every", "checkpoint_every", "keep_last"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(0 <= self.seed < 2**40, "train.seed", self.seed, "in [0, 2**40)")
        require(
            self.steps >= 0, "train.steps", self.steps, "at least 0 (0: as many as epochs need)"
        )


@dataclass(frozen=True)
class Config:
    """Everything a run depends on but its data."""

    draft: DraftConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse sections that don't go together."""
        whole = self.objective.loss == "kl" or self.data.micro_batch == self.data.global_batch
        rule = f"{self.data.global_batch}, all of data.global_batch: objective.loss = {self.objective.loss!r} has means"
        require(whole, "data.micro_batch", self.data.micro_batch, f"{rule} over the whole batch")
        wide = self.train.reduce == "sum" or self.optimizer.accumulation == "fp32"
        rule = "'sum' with optimizer.accumulation = 'legacy', whose sums in bf16 differ from the ranks' in fp32"
        require(wide, "train.reduce", self.train.reduce, rule)


def require(holds: bool, name: str, value: Any, constraint: str) -> None:
    """Raise a UserError that names the value and its constraint unless `holds`."""
    if not holds:
        raise UserError(f"{name} = {value!r}: must be {constraint}")


def _check_choices(config: Any, section: str) -> None:
    """Refuse a value that its field does not list."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            wanted = " or ".join(map(repr, get_args(hint)))
            require(
                getattr(config, name) in get_args(hint),
                f"{section}.{name}",
                getattr(config, name),
                wanted,
            )


def load_config(
    path: str | Path | None, overrides: list[str], draft: DraftConfig | None = None
) -> Config:
    """Read a TOML file (or none), apply `section.key=value` overrides, and check every key and type.

    `draft` fills the draft section; keys the file or overrides name there win.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of range, no draft section.
    """
    tree = read_toml(path) if path else {}
    for text in overrides:
        override(tree, text)
    if not isinstance(tree.get("draft", {}), dict):
        raise UserError(f"{path}: draft = {tree['draft']!r}: must be a section, [draft]")
    if draft is not None:
        tree["draft"] = {**to_dict(draft), **tree.get("draft", {})}
    if "draft" not in tree:
        raise UserError(
            "no [draft] section; add one, or name a target or a draft configuration to take it from"
        )
    return from_dict(Config, tree, str(path or "overrides"))


def from_dict(kind: Any, tree: dict, where: str, prefix: str = "") -> Any:
    """Build a frozen dataclass from nested dicts; every key must be a field and every value of its type.

    Raises:
        UserError: names the dotted key, the file and what would be right.
    """
    hints = get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UserError(
            f"{where}: unknown key {prefix}{unknown[0]}; known: {', '.join(prefix + k for k in hints)}"
        )
    values = {key: _convert(hints[key], value, where, prefix + key) for key, value in tree.items()}
    missing = [
        f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory
    ]
    if missing:
        raise UserError(f"{where}: {prefix}{missing[0]} is missing")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where, name + ".")
    if origin is Literal:  # its section checks the value
        return value
    if origin in (types.UnionType,):
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where, name)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(options[0], item, where, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    if origin is dict and isinstance(value, dict):
        return value
    raise UserError(f"{where}: {name} = {value!r}: must be {getattr(hint, '__name__', hint)}")


def to_dict(config: Any) -> dict:
    """Nested plain dicts of a config; None values are left out (TOML has none)."""
    pairs = ((f.name, getattr(config, f.name)) for f in fields(config))
    return {k: to_dict(v) if is_dataclass(v) else v for k, v in pairs if v is not None}


def with_steps(config: Config, steps: int) -> Config:
    """The same configuration with the number of optimizer steps filled in."""
    return replace(config, train=replace(config.train, steps=steps))
