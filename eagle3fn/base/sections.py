"""The sections of a configuration but the draft's: frozen, and they refuse what no run has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from eagle3fn.base.errors import UserError, shown
from eagle3fn.base.toml import as_override
from eagle3fn.base.weights import name_or_weights

Role = Literal["attention", "matrix", "norm", "embedding", "head", "bias"]
"""Of a parameter, in `model.table`: what an optimizer may treat apart. "attention": its four
matrices, "matrix": the others."""

MOST_STEPS = 10**8 - 1
"""Of a run: a checkpoint's folder is named by eight digits."""

HIGHEST_RATE = 1e30
"""Of an update: with the factors below its products are numbers of fp32."""

_LARGEST_FACTOR = 1e6  # weight decay, Muon's factor
_HIGHEST_BETA = 1 - 1e-7
_MOST = 2**31 - 1  # of a setting that has no bound of its own
LONGEST_UNROLL = 128  # its masks alone are `(B, K, S)`, and drafts of a server are below 20 tokens
_MOST_PREFETCHED = 1024  # batches held in memory
_LARGEST_BATCH = 2**24  # the numbers of its samples are a list


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective.

    Attributes:
        ttt_length: unroll steps `K` (training-time test).
        decay: weight of unroll step `i` is `decay ** i`.
        survival: chance that a row goes on to the next unroll step. Of step `i` a share of
            `survival ** i` is computed, and weighs as much more: loss and gradient are right in
            expectation. 1: every row, at every step.
        normalization: "mask" divides a step's loss by its trained rows in the global batch, "rows"
            by all `B·S` rows.
        loss: "kl"; "rkl" (reverse KL); "jsd" (Jensen-Shannon); "ce" (the target's choice); "tv"
            (total variation); "nla" and "lk", by acceptance rate (arXiv 2602.23881); a function of
            your own as "module:function", of `(logits, p_draft, p_full)`; or a table of names with
            weights, `{ce = 0.1, tv = 0.9}`. See docs/losses.md.
        kl_scale: weight of the KL in "lk" where nothing is accepted, in [0, 1].
        kl_decay: that weight falls as `exp(-kl_decay · acceptance)`.
        teacher: under the plain numerics, "full" computes all logits `(B, S, V)` at once, "compact"
            streams over the vocabulary. The fast numerics always stream.
        teacher_chunk: vocabulary rows that the compact teacher computes at once.
        numerics: "fast" computes the rows that reach a loss term alone, with kernels of its own;
            "plain" is the readable unroll, the same to rounding, differentiable any number of
            times.
    """

    ttt_length: int = 7
    decay: float = 0.8
    survival: float = 1.0
    normalization: Literal["mask", "rows"] = "mask"
    loss: str | Mapping[str, float] = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0
    teacher: Literal["compact", "full"] = "compact"
    teacher_chunk: int = 32768
    numerics: Literal["fast", "plain"] = "fast"

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "objective")
        _within(self, "objective", ttt_length=(1, LONGEST_UNROLL), teacher_chunk=(1, _MOST))
        require(0 < self.decay <= 1, "objective.decay", self.decay, "in (0, 1]")
        require(0 < self.survival <= 1, "objective.survival", self.survival, "in (0, 1]")
        require(0 <= self.kl_scale <= 1, "objective.kl_scale", self.kl_scale, "in [0, 1]")
        require(
            0 <= self.kl_decay < math.inf,
            "objective.kl_decay",
            self.kl_decay,
            "at least 0 and finite",
        )
        object.__setattr__(self, "loss", name_or_weights(self.loss, "objective.loss"))


class Readers(NamedTuple):
    """Under which values of another setting of its section a setting is read."""

    choice: str
    values: tuple[str, ...]


READERS = {
    "beta1": Readers("name", ("adamw", "muon", "lion")),
    "beta2": Readers("name", ("adamw", "muon")),
    "eps": Readers("name", ("adamw", "muon")),
    "momentum": Readers("name", ("muon", "sgd", "lion")),
    "matrices": Readers("name", ("muon",)),
    "matrix_factor": Readers("name", ("muon",)),
    "cooldown_ratio": Readers("schedule", ("wsd",)),
}
"""The settings of `[optimizer]` that some optimizers or schedules do not read. Where one would
change nothing, and differs from its default, it is refused; a user's own may read any."""


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer on fp32 masters, its gradients clipped by their global norm.

    Attributes:
        name: "adamw"; "muon", for matrices, with AdamW for the other leaves; "lion"; "sgd", with
            momentum; or a function of your own as "module:function", of this configuration, that
            returns an `Optimizer` (docs/own-parts.md).
        learning_rate: the highest rate, reached at the end of the warm-up.
        warmup_ratio: share of the schedule's steps in which the rate rises linearly.
        max_grad_norm: gradients are clipped to this global norm.
        beta1: AdamW's, of the gradient's running mean; Lion's, the share of the running mean in the
            direction.
        beta2: AdamW's, of the squared gradient's.
        eps: AdamW's, added to the root of that.
        weight_decay: a parameter loses `rate · weight_decay` of itself in an update; under "sgd"
            `weight_decay` of it is added to the gradient, as in `torch.optim.SGD`.
        matrices: whose update is Muon's: "attention"'s four, from which nearly all of its gain
            comes, or "all", MLP and projection too; head, norms and embedding have AdamW's.
        momentum: Muon's and Lion's `μ`, of the gradient's running mean `m ← m + (1 - μ)(g - m)`
            (in Lion's paper `β₂`); SGD's, of the sum `m ← μ m + g`.
        matrix_factor: Muon's `c`: a matrix `(A, B)` moves by
            `0.2 · √max(A, B) · rate · c · orthogonal(g + μ (m - g))`.
        schedule: how the rate falls after the warm-up: "cosine", to 0 after the last step;
            "linear"; "constant"; "wsd" (warm-up, stable, decay); or a function of your own as
            "module:function". See docs/losses.md.
        accumulation: dtype in which the gradients of several micro-batches are summed: "fp32", or
            "params", the parameters' own.
        schedule_steps: updates that the schedule spans, where a run makes another number; 0:
            `train.steps`.
        decay_roles: the parameters that weight decay applies to: of "attention" (its four
            matrices), "matrix" (MLP and projection), "norm", "embedding", "head", "bias".
        cooldown_ratio: share of the schedule's steps in which the rate of "wsd" falls, at the end.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    matrices: Literal["attention", "all"] = "attention"
    momentum: float = 0.95
    matrix_factor: float = 6.0
    schedule: str = "cosine"
    accumulation: Literal["fp32", "params"] = "fp32"
    schedule_steps: int = 0
    decay_roles: tuple[Role, ...] = get_args(Role)
    cooldown_ratio: float = 0.2

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "optimizer")
        for name in ("learning_rate", "max_grad_norm", "matrix_factor"):
            require(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "above 0")
        for name in ("learning_rate", "max_grad_norm", "eps"):
            value = getattr(self, name)
            words = f"finite, from 0 to {HIGHEST_RATE:g}"
            require(0 <= value <= HIGHEST_RATE, f"optimizer.{name}", value, words)
        for name in ("weight_decay", "matrix_factor"):
            value = getattr(self, name)
            words = f"finite, from 0 to {_LARGEST_FACTOR:g}"
            require(0 <= value <= _LARGEST_FACTOR, f"optimizer.{name}", value, words)
        for name in ("warmup_ratio", "beta1", "beta2", "momentum"):
            value = getattr(self, name)
            words = "in [0, 1), and no nearer to 1 than 1e-7"
            require(0 <= value <= _HIGHEST_BETA, f"optimizer.{name}", value, words)
        _within(self, "optimizer", schedule_steps=(0, _MOST))
        require(
            self.weight_decay * self.learning_rate <= 1,
            "optimizer.weight_decay",
            self.weight_decay,
            f"at most 1 / optimizer.learning_rate = {1 / self.learning_rate:g}: an update cannot "
            "take more of a parameter than there is",
        )

        self._check_decay_roles()
        self._check_cooldown()
        self._check_readers()

    def _check_decay_roles(self) -> None:
        name = "optimizer.decay_roles"
        words = f"one or several of {', '.join(map(repr, get_args(Role)))}"
        several = isinstance(self.decay_roles, tuple) and len(self.decay_roles) > 0
        known = several and all(role in get_args(Role) for role in self.decay_roles)
        require(known, name, self.decay_roles, words)
        ordered = tuple(role for role in get_args(Role) if role in self.decay_roles)
        object.__setattr__(self, "decay_roles", ordered)
        if self.decay_roles != OptimizerConfig.decay_roles and not self.weight_decay:
            raise UserError(
                f"{name} = {shown(self.decay_roles)}: nothing decays with optimizer.weight_decay = "
                f"0; set {as_override(name, OptimizerConfig.decay_roles)}, its default, or "
                "optimizer.weight_decay"
            )

    def _check_cooldown(self) -> None:
        name = "optimizer.cooldown_ratio"
        require(0 < self.cooldown_ratio <= 1, name, self.cooldown_ratio, "above 0 and at most 1")
        if self.schedule in READERS["cooldown_ratio"].values:
            rest = f"at most 1 - optimizer.warmup_ratio = {1 - self.warmup_ratio:g}"
            holds = self.warmup_ratio + self.cooldown_ratio <= 1
            require(holds, name, self.cooldown_ratio, rest)

    def _check_readers(self) -> None:
        for setting, (choice, readers) in READERS.items():
            value = getattr(self, setting)
            chosen = getattr(self, choice)
            default = getattr(OptimizerConfig, setting)
            read = chosen in readers or ":" in chosen
            if not read and value != default:
                raise UserError(
                    f"optimizer.{setting} = {value!r}: optimizer.{choice} = {chosen!r} does not "
                    f"read it; set {as_override(f'optimizer.{setting}', default)}, its default, "
                    f"or optimizer.{choice} = {' or '.join(map(repr, readers))}"
                )


@dataclass(frozen=True)
class DataConfig:
    """Samples to batches.

    Attributes:
        max_length: tokens kept of a sample in training.
        global_batch: samples of one update, over all ranks.
        micro_batch: samples of one forward and backward pass; divides `global_batch`.
        held_out: samples at the end that are evaluated on, not trained on.
        prefetch: batches that are read ahead in a thread; 0: none.
        pack_tokens: tokens of a packed row at most, in which several samples stand one after
            another; at least `max_length`. 0: padded rows. See docs/training.md.
    """

    max_length: int = 2048
    global_batch: int = 1
    micro_batch: int = 1
    held_out: int = 0
    prefetch: int = 2
    pack_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _within(self, "data", max_length=(3, _MOST), micro_batch=(1, _LARGEST_BATCH))
        _within(self, "data", global_batch=(1, _LARGEST_BATCH), held_out=(0, _MOST))
        _within(self, "data", prefetch=(0, _MOST_PREFETCHED))
        require(
            self.global_batch % self.micro_batch == 0,
            "data.global_batch",
            self.global_batch,
            f"a multiple of data.micro_batch = {self.micro_batch}",
        )
        self._check_packing()

    def _check_packing(self) -> None:
        if not self.pack_tokens:
            return
        _within(self, "data", pack_tokens=(0, _MOST))
        require(
            self.pack_tokens >= self.max_length,
            "data.pack_tokens",
            self.pack_tokens,
            f"0, or at least data.max_length = {self.max_length}, which may be lowered: a sample "
            "is in one row",
        )
        require(
            self.micro_batch == 1,
            "data.micro_batch",
            self.micro_batch,
            f"1, its default, where data.pack_tokens = {self.pack_tokens} makes the micro-batches",
        )


STARTS = ("target", "random")
"""The values of `train.init` that are no draft's folder."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
        epochs: passes over the samples, where `steps` is 0 and no `--minutes` are given.
        steps: optimizer updates; 0: as many as `--minutes` allow, or `epochs` need.
        seed: of the first parameters and of the samples' order.
        dtype: of parameters, activations and features: "bfloat16", "float32" or "float64"; masters
            and moments are at least fp32.
        device: torch device of training.
        init: "target" starts head, norm and projection from the target; "random" draws everything;
            else the folder of an exported draft, whose parameters are the first ones
            (docs/training.md).
        reduce: "tree" sums micro-batches and ranks by one binary tree, so that 1, 2, 4, … ranks
            give the same bits; "sum" sums in order, and over ranks as the backend does.
        on_nonfinite: a loss or gradient that is not finite ends the run ("stop"), or its update is
            dropped and counted ("skip").
        eval_every: updates between two evaluations on the held-out samples.
        checkpoint_every: updates between two checkpoints.
        keep_last: checkpoints that are kept.
        patience: evaluations in a row without a held-out accepted length above the best one, after
            which the run ends; 0: it makes all its updates.
    """

    epochs: int = 10
    steps: int = 0
    seed: int = 0
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    device: str = "cpu"
    init: str = "target"
    reduce: Literal["sum", "tree"] = "sum"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    patience: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_choices(self, "train")
        words = f"{' or '.join(map(repr, STARTS))}, or the folder of an exported draft"
        require(bool(self.init), "train.init", self.init, words)
        _within(self, "train", epochs=(1, _MOST), steps=(0, MOST_STEPS), keep_last=(1, _MOST))
        _within(self, "train", eval_every=(1, _MOST), checkpoint_every=(1, _MOST))
        _within(self, "train", patience=(0, _MOST))
        require(0 <= self.seed < 2**40, "train.seed", self.seed, "in [0, 2**40)")


def require(holds: bool, name: str, value: Any, constraint: str) -> None:
    """Raise a UserError that names the value and its constraint unless `holds`."""
    if not holds:
        raise UserError(f"{name} = {shown(value)}: must be {constraint}")


def _within(config: Any, section: str, **bounds: tuple[int, int]) -> None:
    """Refuse a whole number outside of its bounds."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        require(least <= value, f"{section}.{name}", value, f"at least {least}")
        require(value <= most, f"{section}.{name}", value, f"at most {most}")


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
