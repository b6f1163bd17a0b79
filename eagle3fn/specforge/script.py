"""Train with the arguments of the old tool's `train_eagle3.py`, unchanged, from features on disk.

    torchrun --nproc-per-node N scripts/train_eagle3_fn.py $ARGS

The settings are the old tool's (README, "Settings that reproduce the old tool"): its start, order, mask, division,
schedule, sums and arithmetic. What is not there is refused by name; options without an effect here are listed once.
`OUTPUT_DIR` gets `metrics.jsonl`, a row an update, `checkpoints/` and the exported `draft/`.

Three things are not the old tool's. On several ranks the clip is by the global norm, an update's samples are split
among the ranks and its sampler's padding is not repeated: runs are equal on one rank alone. Its vocabulary map is read
where it left one (`CACHE_DIR/vocab_mapping/`); else the map is counted from the features, where it tokenizes
`--train-data-path` again. And without `--draft-model-config` the draft takes the target's RoPE base, where the old tool
takes its template's.
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from eagle3fn.base import progress
from eagle3fn.base.config import Config, ObjectiveConfig, require
from eagle3fn.base.draft_config import (
    DraftConfig,
    aux_layers,
    draft_config_from_json,
    draft_config_from_target,
)
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import TrainState, VocabMap
from eagle3fn.data.features import FeatureSet, check_made_for, open_features
from eagle3fn.data.target import config_hash, read_target_tensors, target_config
from eagle3fn.data.vocab import build_map, count_tokens, load_map, save_map
from eagle3fn.specforge.feature_files import READER, read_map
from eagle3fn.specforge.recipe import recipe
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.launch import World, ranks
from eagle3fn.train.loop import train
from eagle3fn.use.publish import run_events

LOSSES: dict[Any, Any] = {None: "kl", "alpha": "lk_alpha", "lambda": "lk_lambda"}
ATTENTION = ("sdpa", "flex_attention", "fa")
FLAGS = (
    *(
        "trust-remote-code",
        "is-vlm",
        "is-preformatted",
        "train-only-last-turn",
        "resume",
        "compact-teacher",
    ),
    *("verbose", "profile", "profile-record-shapes", "wandb-offline", "sglang-enable-nccl-nvls"),
    *("sglang-enable-symm-mem", "sglang-enable-torch-compile", "sglang-enable-dp-attention"),
    *("sglang-enable-dp-lm-head", "sglang-enable-piecewise-cuda-graph"),
)
STRINGS = {
    **{
        "draft-model-config": None,
        "train-hidden-states-path": None,
        "eval-hidden-states-path": None,
    },
    **{
        "embedding-key": "model.embed_tokens.weight",
        "lm-head-key": "lm_head.weight",
        "eval-data-path": None,
    },
    **{
        "chat-template": "llama3",
        "ckpt-dir": None,
        "attention-backend": "flex_attention",
        "cache-key": None,
    },
    **{
        "cache-dir": "./cache",
        "model-download-dir": None,
        "wandb-project": None,
        "wandb-name": None,
    },
    **{
        "wandb-key": None,
        "wandb-dir": None,
        "swanlab-project": None,
        "swanlab-name": None,
        "swanlab-key": None,
    },
    **{"mlflow-tracking-uri": None, "mlflow-experiment-name": None, "mlflow-run-name": None},
    "sglang-attention-backend": "flashinfer",
}
WHOLE = {
    **{
        "build-dataset-num-proc": 8,
        "dataloader-num-workers": 4,
        "num-epochs": 10,
        "max-num-steps": None,
    },
    **{
        "batch-size": 1,
        "max-length": 2048,
        "total-steps": None,
        "ttt-length": 7,
        "eval-interval": 5000,
    },
    **{
        "save-interval": 5000,
        "log-interval": 50,
        "seed": 0,
        "draft-accumulation-steps": 1,
        "tp-size": 1,
    },
    **{
        "sp-ulysses-size": 1,
        "sp-ring-size": 1,
        "compact-teacher-chunk-size": None,
        "dist-timeout": 20,
    },
    **{"min-pixels": 50176, "max-pixels": 802816, "profile-start-step": 30, "profile-num-steps": 4},
    **{
        "sglang-context-length": None,
        "sglang-piecewise-cuda-graph-max-tokens": 4096,
        "sglang-ep-size": 1,
    },
}
NUMBERS = {
    **{
        "learning-rate": 1e-4,
        "warmup-ratio": 0.015,
        "max-grad-norm": 0.5,
        "kl-scale": 1.0,
        "kl-decay": 3.0,
    },
    "sglang-mem-fraction-static": 0.4,
}
CHOICES = {
    "target-model-backend": ("sglang", ["sglang", "hf", "custom"]),
    "lk-loss-type": (None, ["lambda", "alpha"]),
    "report-to": ("none", ["wandb", "tensorboard", "swanlab", "mlflow", "none"]),
}
IDLE = (
    *("trust-remote-code", "shard-target-output", "target-model-backend", "is-preformatted"),
    *(
        "train-only-last-turn",
        "build-dataset-num-proc",
        "eval-interval",
        "log-interval",
        "cache-key",
        "verbose",
    ),
    *("dist-timeout", "model-download-dir", "min-pixels", "max-pixels", "report-to"),
)
IDLE_GROUPS = ("profile", "sglang-", "wandb-", "swanlab-", "mlflow-")


def parser() -> argparse.ArgumentParser:
    """The old script's options, with its types and defaults."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("target-model-path", "train-data-path", "output-dir"):
        made.add_argument(f"--{name}", type=str, required=True)
    for name in FLAGS:
        made.add_argument(f"--{name}", action="store_true")
    for kind, table in ((str, STRINGS), (int, WHOLE), (float, NUMBERS)):
        for name, default in table.items():
            made.add_argument(f"--{name}", type=kind, default=default)
    for name, (default, choices) in CHOICES.items():
        made.add_argument(f"--{name}", type=str, default=default, choices=choices)
    made.add_argument("--shard-target-output", action=argparse.BooleanOptionalAction)
    made.add_argument("--sglang-piecewise-cuda-graph-tokens", type=int, nargs="+")
    return made


def refuse(options: argparse.Namespace) -> None:
    """Refuse by name what is not there.

    Raises:
        UserError: the first such option, its value and what to do instead.
    """
    one = "every rank holds the whole draft for its own samples; leave it at 1"
    wanted = (
        (
            "--is-vlm",
            options.is_vlm,
            False,
            "vision-language targets are not supported; choose a text target",
        ),
        ("--tp-size", options.tp_size != 1, options.tp_size, one),
        ("--sp-ulysses-size", options.sp_ulysses_size != 1, options.sp_ulysses_size, one),
        ("--sp-ring-size", options.sp_ring_size != 1, options.sp_ring_size, one),
    )
    for name, found, value, remedy in wanted:
        if found:
            raise UserError(f"{name}{'' if value is False else f' = {value}'}: {remedy}")
    usable = options.attention_backend in ATTENTION
    require(
        usable, "--attention-backend", options.attention_backend, f"one of {', '.join(ATTENTION)}"
    )
    for name in ("ckpt-dir", "eval-data-path", "eval-hidden-states-path"):
        if (value := getattr(options, name.replace("-", "_"))) is not None:
            raise UserError(f"--{name} = {value!r}: not there; leave it out, or use eagle3fn train")
    if options.train_hidden_states_path is None:
        raise UserError(
            "--train-hidden-states-path is missing: features are read from disk; run eagle3fn extract"
        )
    for name, ending in (
        ("embedding-key", "embed_tokens.weight"),
        ("lm-head-key", "lm_head.weight"),
    ):
        value = getattr(options, name.replace("-", "_"))
        require(
            value.endswith(ending),
            f"--{name}",
            value,
            f"a key that ends in {ending}; it is found by that",
        )


def idle(options: argparse.Namespace) -> list[str]:
    """Options that were given and have no effect here."""
    names = [action.dest for action in parser()._actions if action.dest in vars(options)]
    quiet = [
        name
        for name in names
        if name.replace("_", "-") in IDLE or name.replace("_", "-").startswith(IDLE_GROUPS)
    ]
    default = {action.dest: action.default for action in parser()._actions}
    return [
        f"--{name.replace('_', '-')}" for name in quiet if getattr(options, name) != default[name]
    ]


class Length(NamedTuple):
    """How long the old script would train."""

    steps: int  # optimizer updates
    schedule_steps: int  # updates that its schedule spans


def length_of(options: argparse.Namespace, samples: int, size: int = 1) -> Length:
    """The old script counts a rank's micro-batches, and a rest that fills none, or no update, is left out.

    Raises:
        UserError: no update at all.
    """
    batch, share = options.target_batch_size, options.draft_accumulation_steps
    for name, value in (
        ("batch-size", batch),
        ("draft-accumulation-steps", share),
        ("num-epochs", options.num_epochs),
    ):
        require(value >= 1, f"--{name}", value, "at least 1")
    loader = math.ceil(samples / size) // batch
    micro = options.num_epochs * loader
    if options.max_num_steps is not None:
        micro = min(micro, options.max_num_steps)
    if micro < share:
        raise UserError(
            f"{samples} samples, --batch-size {batch}, --max-num-steps {options.max_num_steps}: fewer than the "
            f"{share} micro-batches of one update; extract more or lower --batch-size"
        )
    return Length(
        micro // share, options.total_steps or options.num_epochs * math.ceil(loader / share)
    )


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
    batch = options.target_batch_size
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
    """The map that the old script would find in its cache; else counted from the features and kept in the run."""
    names = (
        options.train_data_path,
        options.max_length,
        options.chat_template,
        options.target_model_path,
    )
    key = hashlib.md5("-".join(map(str, names)).encode()).hexdigest()
    found, out = (
        Path(options.cache_dir, "vocab_mapping", f"{key}.pt"),
        Path(options.output_dir, "vocab.safetensors"),
    )
    if found.is_file():
        vocab, origin = (
            load_map(found, draft.vocab_size, draft.draft_vocab_size, read=read_map),
            str(found),
        )
    else:
        counts = count_tokens(features, range(len(features.samples)), draft.vocab_size)
        vocab = build_map(counts, draft.draft_vocab_size)
        origin = f"{out}, counted from the features (none at {found})"
    if world.main:
        save_map(
            out,
            vocab,
            {"target": options.target_model_path, "features": options.train_hidden_states_path},
        )
        print(f"vocabulary map: {origin}")
    return vocab


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
    options.target_batch_size = options.tp_size * options.batch_size
    tree, out = target_config(options.target_model_path), Path(options.output_dir)
    path = options.draft_model_config
    draft = (
        draft_config_from_json(path)
        if path
        else draft_config_from_target(tree, options.target_model_path)
    )
    features = open_features(
        options.train_hidden_states_path, tree["vocab_size"], tree["hidden_size"], READER
    )
    layers = tree["num_hidden_layers"]
    check_made_for(
        features, config_hash(tree), aux_layers(draft, layers), options.target_model_path
    )
    config = config_of(options, draft, len(features.samples), world.size, device)
    if checkpoints(out / "checkpoints") and not options.resume:
        raise UserError(f"{out}: holds a run; go on with --resume, or name another --output-dir")
    if world.main and (unused := idle(options)):
        print(f"no effect here: {' '.join(unused)}")
    target = read_target_tensors(options.target_model_path, getattr(torch, config.train.dtype))
    vocab = vocab_of(options, features, draft, world)
    return train(config, features, vocab, target, out, None, run_events(out, config, layers), world)


def main(arguments: list[str] | None = None) -> Any:
    """Exit code 0, or 2 with one line on stderr."""
    try:
        with ranks() as world:
            run(parser().parse_args(arguments), world)
        return 0
    except UserError as error:
        message = str(error)
    except (OSError, SafetensorError) as error:
        message = f"{error}; check that the path is right, writable and has room"
    progress.close()
    print(f"train_eagle3_fn: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
