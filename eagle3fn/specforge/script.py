"""Train with the arguments of SpecForge's `train_eagle3.py`, unchanged, from features on disk.

    torchrun --nproc-per-node N scripts/train_eagle3_fn.py $ARGS

It trains by SpecForge's recipe (`specforge.recipe`): its start, order, mask, division, schedule,
sums and arithmetic. An option for what is not supported is refused by name; options without an
effect here are listed once. `OUTPUT_DIR` gets `metrics.jsonl`, a row an update, `checkpoints/` and
the exported `draft/`.

Three things differ from SpecForge:

- On several ranks the clip is by the global norm, an update's samples are split among the ranks,
  and no samples are repeated to fill the ranks. So runs are equal on one rank alone.
- Its vocabulary map is read where it left one (`CACHE_DIR/vocab_mapping/`). Else the map is counted
  from the features; SpecForge tokenizes `--train-data-path` again.
- Without `--draft-model-config` the draft has the target's RoPE base; SpecForge takes its
  template's.
"""

import argparse
import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.program import exit_code
from eagle3fn.base.sections import ObjectiveConfig, require
from eagle3fn.base.types import TrainState, VocabMap
from eagle3fn.data.features import FeatureSet, check_made_for, open_features, tensors_of
from eagle3fn.data.target_source import config_hashes, target_config
from eagle3fn.data.target_tensors import read_target_tensors
from eagle3fn.data.vocab import build_map, count_tokens, load_map, save_map
from eagle3fn.specforge.feature_files import READER, read_map
from eagle3fn.specforge.recipes import RECIPE, recipe
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.loop import train
from eagle3fn.use.model_card import facts_of
from eagle3fn.use.publish import run_events

LOSSES: dict[Any, Any] = {None: "kl", "alpha": "lk_alpha", "lambda": "lk_lambda"}
"""`objective.loss` by `--lk-loss-type`."""

ATTENTION = ("sdpa", "flex_attention", "fa")
"""Attention backends that compute what ours computes."""

TRACKERS = ("wandb", "tensorboard", "swanlab", "mlflow", "none")
"""Values of `--report-to`."""

ONE_RANK = "every rank holds the whole draft for its own samples; leave it at 1"
NO_IMAGES = "vision-language targets are not supported; choose a text target"
NOT_HERE = "not there; leave it out, or use eagle3fn train"


# The options


@dataclass(frozen=True)
class Option:
    """One option of SpecForge's script.

    Attributes:
        name: without the dashes.
        kind: of its value. `bool`: a flag, without a value. `bool | None`: `--name` or `--no-name`.
            `list[int]`: one number or more.
        default: where it is not given.
        effect: "used"; "none", so that it is listed where it is given; "refused" unless it has its
            default.
        remedy: of a refused option, what is wrong and what to do.
        choices: the values allowed; empty: any.
        required: whether it must be given.
    """

    name: str
    kind: Any
    default: Any
    effect: Literal["used", "none", "refused"]
    remedy: str = ""
    choices: tuple[str, ...] = ()
    required: bool = False

    @property
    def dest(self) -> str:
        """Its name as an attribute of the parsed options."""
        return self.name.replace("-", "_")


OPTIONS = (
    # Target and draft
    Option("target-model-path", str, None, "used", required=True),
    Option("draft-model-config", str, None, "used"),
    Option("embedding-key", str, "model.embed_tokens.weight", "used"),
    Option("lm-head-key", str, "lm_head.weight", "used"),
    Option("is-vlm", bool, False, "refused", NO_IMAGES),
    Option("trust-remote-code", bool, False, "none"),
    Option("shard-target-output", bool | None, None, "none"),
    Option("target-model-backend", str, "sglang", "none", choices=("sglang", "hf", "custom")),
    Option("model-download-dir", str, None, "none"),
    Option("min-pixels", int, 50176, "none"),
    Option("max-pixels", int, 802816, "none"),
    # Data
    Option("train-data-path", str, None, "used", required=True),
    Option("train-hidden-states-path", str, None, "used"),
    Option("eval-data-path", str, None, "refused", NOT_HERE),
    Option("eval-hidden-states-path", str, None, "refused", NOT_HERE),
    Option("chat-template", str, "llama3", "used"),
    Option("max-length", int, 2048, "used"),
    Option("cache-dir", str, "./cache", "used"),
    Option("cache-key", str, None, "none"),
    Option("is-preformatted", bool, False, "none"),
    Option("train-only-last-turn", bool, False, "none"),
    Option("build-dataset-num-proc", int, 8, "none"),
    Option("dataloader-num-workers", int, 4, "used"),
    # Objective
    Option("ttt-length", int, 7, "used"),
    Option("lk-loss-type", str, None, "used", choices=("lambda", "alpha")),
    Option("kl-scale", float, 1.0, "used"),
    Option("kl-decay", float, 3.0, "used"),
    Option("compact-teacher", bool, False, "used"),
    Option("compact-teacher-chunk-size", int, None, "used"),
    Option("attention-backend", str, "flex_attention", "used"),
    # Training
    Option("output-dir", str, None, "used", required=True),
    Option("resume", bool, False, "used"),
    Option("ckpt-dir", str, None, "refused", NOT_HERE),
    Option("num-epochs", int, 10, "used"),
    Option("max-num-steps", int, None, "used"),
    Option("total-steps", int, None, "used"),
    Option("batch-size", int, 1, "used"),
    Option("draft-accumulation-steps", int, 1, "used"),
    Option("learning-rate", float, 1e-4, "used"),
    Option("warmup-ratio", float, 0.015, "used"),
    Option("max-grad-norm", float, 0.5, "used"),
    Option("seed", int, 0, "used"),
    Option("save-interval", int, 5000, "used"),
    Option("eval-interval", int, 5000, "none"),
    Option("log-interval", int, 50, "none"),
    Option("verbose", bool, False, "none"),
    # Ranks
    Option("tp-size", int, 1, "refused", ONE_RANK),
    Option("sp-ulysses-size", int, 1, "refused", ONE_RANK),
    Option("sp-ring-size", int, 1, "refused", ONE_RANK),
    Option("dist-timeout", int, 20, "none"),
    # Profiles
    Option("profile", bool, False, "none"),
    Option("profile-start-step", int, 30, "none"),
    Option("profile-num-steps", int, 4, "none"),
    Option("profile-record-shapes", bool, False, "none"),
    # The SGLang server of online training
    Option("sglang-attention-backend", str, "flashinfer", "none"),
    Option("sglang-mem-fraction-static", float, 0.4, "none"),
    Option("sglang-context-length", int, None, "none"),
    Option("sglang-enable-nccl-nvls", bool, False, "none"),
    Option("sglang-enable-symm-mem", bool, False, "none"),
    Option("sglang-enable-torch-compile", bool, False, "none"),
    Option("sglang-enable-dp-attention", bool, False, "none"),
    Option("sglang-enable-dp-lm-head", bool, False, "none"),
    Option("sglang-enable-piecewise-cuda-graph", bool, False, "none"),
    Option("sglang-piecewise-cuda-graph-max-tokens", int, 4096, "none"),
    Option("sglang-piecewise-cuda-graph-tokens", list[int], None, "none"),
    Option("sglang-ep-size", int, 1, "none"),
    # Trackers
    Option("report-to", str, "none", "none", choices=TRACKERS),
    Option("wandb-project", str, None, "none"),
    Option("wandb-name", str, None, "none"),
    Option("wandb-key", str, None, "none"),
    Option("wandb-dir", str, None, "none"),
    Option("wandb-offline", bool, False, "none"),
    Option("swanlab-project", str, None, "none"),
    Option("swanlab-name", str, None, "none"),
    Option("swanlab-key", str, None, "none"),
    Option("mlflow-tracking-uri", str, None, "none"),
    Option("mlflow-experiment-name", str, None, "none"),
    Option("mlflow-run-name", str, None, "none"),
)  # fmt: skip
"""Every option of `train_eagle3.py`, with its type and default."""


def parser() -> argparse.ArgumentParser:
    """The grammar of SpecForge's script: `OPTIONS`."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in OPTIONS:
        flag = f"--{option.name}"
        if option.kind is bool:
            made.add_argument(flag, action="store_true")
        elif option.kind == bool | None:
            made.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif option.kind == list[int]:
            made.add_argument(flag, type=int, nargs="+", default=option.default)
        else:
            made.add_argument(
                flag,
                type=option.kind,
                default=option.default,
                choices=option.choices or None,
                required=option.required,
            )
    return made


def refuse(options: argparse.Namespace) -> None:
    """Refuse by name what is not supported.

    Raises:
        UserError: the first such option, its value and what to do instead.
    """
    for option in OPTIONS:
        value = getattr(options, option.dest)
        if option.effect == "refused" and value != option.default:
            shown = f"--{option.name}" if option.kind is bool else f"--{option.name} = {value!r}"
            raise UserError(f"{shown}: {option.remedy}")

    if options.train_hidden_states_path is None:
        raise UserError(
            "--train-hidden-states-path is missing: features are read from disk; "
            "run eagle3fn extract"
        )

    backend = options.attention_backend
    require(backend in ATTENTION, "--attention-backend", backend, f"one of {', '.join(ATTENTION)}")

    # Embedding and head are found by how their names end.
    for name, key, ending in (
        ("--embedding-key", options.embedding_key, "embed_tokens.weight"),
        ("--lm-head-key", options.lm_head_key, "lm_head.weight"),
    ):
        constraint = f"a key that ends in {ending}; it is found by that"
        require(key.endswith(ending), name, key, constraint)


def idle(options: argparse.Namespace) -> list[str]:
    """Options that were given another value than their default, and have no effect here."""
    found = []
    for option in OPTIONS:
        if option.effect == "none" and getattr(options, option.dest) != option.default:
            found.append(f"--{option.name}")
    return found


# What they mean


class Length(NamedTuple):
    """How long SpecForge's script would train."""

    steps: int  # optimizer updates
    schedule_steps: int  # updates that its schedule spans


def length_of(options: argparse.Namespace, samples: int, size: int = 1) -> Length:
    """The length of a run over `samples` feature files on `size` ranks.

    SpecForge counts a rank's micro-batches. Samples that fill no micro-batch, and micro-batches
    that fill no update, are left out.

    Raises:
        UserError: no update at all, or an option below 1.
    """
    batch = options.batch_size
    share = options.draft_accumulation_steps
    require(batch >= 1, "--batch-size", batch, "at least 1")
    require(share >= 1, "--draft-accumulation-steps", share, "at least 1")
    require(options.num_epochs >= 1, "--num-epochs", options.num_epochs, "at least 1")

    # Micro-batches of an epoch and of the run.
    in_epoch = math.ceil(samples / size) // batch
    micro = options.num_epochs * in_epoch
    if options.max_num_steps is not None:
        micro = min(micro, options.max_num_steps)
    if micro < share:
        raise UserError(
            f"{samples} samples, --batch-size {batch}, --max-num-steps {options.max_num_steps}: "
            f"fewer than the {share} micro-batches of one update; "
            "extract more or lower --batch-size"
        )

    # Its schedule spans each epoch's updates rounded up, whatever the run makes of them.
    schedule_steps = options.total_steps or options.num_epochs * math.ceil(in_epoch / share)
    return Length(steps=micro // share, schedule_steps=schedule_steps)


def config_of(
    options: argparse.Namespace,
    draft: DraftConfig,
    samples: int,
    size: int = 1,
    device: str | None = None,
) -> Config:
    """SpecForge's training of `samples` feature files on `size` ranks, as a configuration.

    `device` is "cuda" where there is a card, "cpu" elsewhere, unless it is named.
    """
    length = length_of(options, samples, size)
    batch = options.batch_size
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"

    return recipe(
        draft,
        objective={
            "ttt_length": options.ttt_length,
            "loss": LOSSES[options.lk_loss_type],
            "kl_scale": options.kl_scale,
            "kl_decay": options.kl_decay,
            "teacher": "compact" if options.compact_teacher else "full",
            "teacher_chunk": options.compact_teacher_chunk_size or ObjectiveConfig.teacher_chunk,
        },
        optimizer={
            "learning_rate": options.learning_rate,
            "warmup_ratio": options.warmup_ratio,
            "max_grad_norm": options.max_grad_norm,
            "schedule_steps": length.schedule_steps,
        },
        data={
            "max_length": options.max_length,
            "micro_batch": batch,
            "global_batch": batch * options.draft_accumulation_steps * size,
            "prefetch": min(options.dataloader_num_workers, 2),
        },
        train={
            "steps": length.steps,
            "seed": options.seed,
            "checkpoint_every": options.save_interval,
            "device": device,
        },
    ).config


def vocab_of(
    options: argparse.Namespace, features: FeatureSet, draft: DraftConfig, world: World
) -> VocabMap:
    """The map in SpecForge's cache, else one counted from the features.

    It is stored in the run's folder.
    """
    cached = cached_map(options)
    kept = Path(options.output_dir, "vocab.safetensors")
    if cached.is_file():
        vocab = load_map(cached, draft.vocab_size, draft.draft_vocab_size, read=read_map)
        origin = str(cached)
    else:
        counts = count_tokens(features, range(len(features.samples)), draft.vocab_size)
        vocab = build_map(counts, draft.draft_vocab_size)
        origin = f"{kept}, counted from the features (none at {cached})"

    if world.main:
        provenance = {
            "target": options.target_model_path,
            "features": options.train_hidden_states_path,
        }
        save_map(kept, vocab, provenance)
        print(f"vocabulary map: {origin}")
    return vocab


def cached_map(options: argparse.Namespace) -> Path:
    """Where SpecForge's script keeps its map: the name is a hash of what the map depends on."""
    parts = (
        options.train_data_path,
        options.max_length,
        options.chat_template,
        options.target_model_path,
    )
    key = hashlib.md5("-".join(map(str, parts)).encode()).hexdigest()
    return Path(options.cache_dir, "vocab_mapping", f"{key}.pt")


def run(
    options: argparse.Namespace,
    world: World = World(),  # noqa: B008
    device: str | None = None,
) -> TrainState:
    """Train as the options say; returns the last state. `device`: see `config_of`.

    Raises:
        UserError: an option that is refused, or whatever `train.loop.train` raises.
    """
    refuse(options)
    out = Path(options.output_dir)

    # Target and draft.
    tree = target_config(options.target_model_path)
    layers = tree["num_hidden_layers"]
    if options.draft_model_config:
        draft = draft_config_from_json(options.draft_model_config, "specforge")
    else:
        draft = draft_config_from_target(tree, options.target_model_path)

    # Features, which must be this target's.
    features = open_features(
        options.train_hidden_states_path, tree["vocab_size"], tree["hidden_size"], READER
    )
    hashes = config_hashes(options.target_model_path)
    check_made_for(features, hashes, aux_layers(draft, layers), options.target_model_path)

    config = config_of(options, draft, len(features.samples), world.size, device)
    if checkpoints(out / "checkpoints") and not options.resume:
        raise UserError(f"{out}: holds a run; go on with --resume, or name another --output-dir")
    unused = idle(options)
    if world.main and unused:
        print(f"no effect here: {' '.join(unused)}")

    dtype = getattr(torch, config.train.dtype)
    target = read_target_tensors(options.target_model_path, dtype, tensors_of(features))
    vocab = vocab_of(options, features, draft, world)
    facts = facts_of(features, options.target_model_path)
    events = run_events(out, config, layers, facts)
    return train(config, features, vocab, target, out, events=events, world=world, recipe=RECIPE)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr."""

    def train_by_options() -> None:
        with ranks() as world:
            run(parser().parse_args(arguments), world)

    return exit_code("train_eagle3_fn", train_by_options)


if __name__ == "__main__":
    sys.exit(main())
