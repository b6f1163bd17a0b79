"""Sides of `bench.online`: trainings whose features come as they go, with their sources open."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, cast

from bench.extraction import timed
from eagle3fn import cli
from eagle3fn.base.config import Config, load_config
from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.commands.online import begin_online, check_online_options, online_features
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.on_demand import OnlineSamples
from eagle3fn.data.target_source import target_config
from eagle3fn.data.vocab import map_size
from eagle3fn.train.defaults import by_section, chosen_defaults


class Side(NamedTuple):
    """A training with `--online`, by its further options."""

    source: str
    writes: bool = False
    narrow: bool = False

    @property
    def opened(self) -> str:
        """The name of what is open for it, which sides share that differ in their room alone."""
        return f"{self.source} writes" if self.writes else self.source


SIDES = {
    "here": Side("here"),
    "here narrow": Side("here", narrow=True),
    "transformers": Side("transformers"),
    "transformers narrow": Side("transformers", narrow=True),
    "transformers writes": Side("transformers", writes=True),
    "vllm": Side("vllm"),
    "vllm narrow": Side("vllm", narrow=True),
    "vllm writes": Side("vllm", writes=True),
}


class Opened(NamedTuple):
    """Samples whose source is open."""

    features: FeatureSet
    config: Config
    seconds: float  # until the source was ready


# What is opened


def command_of(options: argparse.Namespace, side: Side, out: Path) -> list[str]:
    """The command line whose samples and sources a side has."""
    words = ["train", "--target", options.target, "--online", options.conversations]
    words += ["--vocab", options.vocab, "--out", str(out), "--limit", str(options.limit)]
    words += ["--max-length", str(options.max_length), "--dtype", options.dtype]
    words += ["--threads", str(options.threads)]
    if side.source != "here":
        words += ["--engine", side.source]
    if side.source == "vllm":
        words += ["--engine-python", options.engine_python, "--check", "logits"]
        for argument in options.engine_arg:
            words += ["--engine-arg", argument]
    if side.writes:
        words += ["--generate", "--max-new", str(options.max_new), "--temperature", "0"]
    return words


def config_of(options: argparse.Namespace, features: FeatureSet) -> Config:
    """The settings that `train` chooses, over one pass of the samples."""
    tree = target_config(options.target)
    draft = draft_config_from_target(tree, options.target, map_size(options.vocab))
    samples = len(features.samples)
    updates = samples // options.batch
    if updates < 2:
        raise UserError(f"--limit {options.limit}: {samples} samples; two updates need more")
    overrides = [
        f"train.steps={updates}",
        f"train.dtype={options.dtype}",
        f"data.global_batch={options.batch}",
        "data.held_out=0",
    ]
    return load_config(None, overrides, draft, by_section(chosen_defaults(draft, samples)))


def open_source(options: argparse.Namespace, side: Side, folder: Path, stack: ExitStack) -> Opened:
    """A side's samples and its source, which is ready.

    Raises:
        UserError: vLLM without its Python; as `train --online`; samples for less than two updates.
    """
    if side.source == "vllm" and not options.engine_python:
        raise UserError("--sides: vLLM's need --engine-python, that of vLLM's environment")
    command = command_of(options, side, folder / side.opened.replace(" ", "-"))
    given = cli.parser().parse_args(command)
    given.arguments = command
    check_online_options(given)

    tree = target_config(options.target)
    draft = draft_config_from_target(tree, options.target, None)
    layers = aux_layers(draft, tree["num_hidden_layers"])
    found = online_features(given, tree, layers, World())

    def ready() -> FeatureSet:
        features = stack.enter_context(found)
        on_demand_of(features).sample(0)  # an engine's first row is compared
        return features

    features, seconds = timed(ready)
    config = config_of(options, features)
    begin_online(features, given, config, World())
    return Opened(features, config, seconds)


def on_demand_of(features: FeatureSet) -> OnlineSamples:
    """A side's samples as they come from its sources."""
    return cast("OnlineSamples", features.on_demand)
