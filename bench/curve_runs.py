"""One run of a learning curve: its samples, either side's training, and what the draft reaches."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.specforge_training import UNROLL, first_params, train_specforge, under
from eagle3fn.base import progress
from eagle3fn.base.config import Config, load_config
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.read import read_object
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet, tensors_of
from eagle3fn.data.order import shuffled
from eagle3fn.data.pipeline import split
from eagle3fn.data.target_tensors import TargetTensors, read_target_tensors
from eagle3fn.data.vocab import map_size
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.train.defaults import by_section, chosen_defaults
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.loop import train
from eagle3fn.train.recipe import Recipe
from eagle3fn.train.run import Run, prepare
from eagle3fn.use.eval_settings import EvalSettings
from eagle3fn.use.evaluate import evaluate
from eagle3fn.use.export import export, load_draft
from eagle3fn.use.prompts import Prompts
from eagle3fn.use.publish import run_events


class Part(NamedTuple):
    """A size: the first samples of the features."""

    samples: int
    supervised: int  # tokens of these


class Inputs(NamedTuple):
    """What all runs share."""

    options: argparse.Namespace
    tree: dict[str, Any]  # the target's configuration
    features: FeatureSet
    vocab: VocabMap
    prompts: Prompts


# What is trained


def part_of(features: FeatureSet, size: int, held_out: int) -> Part:
    """The first samples with at least `size` supervised tokens; none of the held-out last ones.

    Raises:
        UserError: the folder has fewer.
    """
    kept, _ = split(len(features.samples), held_out)
    samples = 0
    supervised = 0
    for number in kept:
        if supervised >= size:
            break
        samples += 1
        supervised += features.samples[number]["supervised"]
    if supervised < size or size < 1:
        raise UserError(
            f"--sizes {size}: {features.folder} has {supervised} supervised tokens without the "
            f"{held_out} held-out samples; give a size from 1 to that, or extract more"
        )
    return Part(samples, supervised)


def first_samples(part: Part) -> Recipe:
    """Our recipe, whose steps train on the first samples alone."""

    def order(n: int, config: Config, place: int) -> int:
        return shuffled(min(n, part.samples), config, place)

    return Recipe(name=f"the first {part.samples} samples", order=order)


def config_of(inputs: Inputs, part: Part, seed: int) -> Config:
    """The settings that `eagle3fn train` chooses, and the schedule of this size."""
    options = inputs.options
    size = map_size(options.vocab)
    draft = draft_config_from_target(inputs.tree, options.target, size)
    chosen = by_section(chosen_defaults(draft, part.samples + options.held_out))
    steps = options.epochs * part.samples
    overrides = [
        f"data.held_out={options.held_out}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        f"train.eval_every={steps}",
    ]
    return load_config(None, overrides, draft, chosen)


def tensors_for(inputs: Inputs, config: Config) -> TargetTensors:
    """The target's tensors in a run's dtype."""
    dtype = getattr(torch, config.train.dtype)
    return read_target_tensors(inputs.options.target, dtype, tensors_of(inputs.features))


def train_ours(inputs: Inputs, part: Part, config: Config, folder: Path) -> Run:
    """Train, or go on; leaves the draft after the last update in `folder/draft`.

    Raises:
        UserError: a signal ended the training.
    """
    target = tensors_for(inputs, config)
    recipe = first_samples(part)
    run = prepare(config, inputs.features, inputs.vocab, target, folder, recipe=recipe)
    layers = inputs.tree["num_hidden_layers"]
    state = train(
        config,
        inputs.features,
        inputs.vocab,
        target,
        folder,
        events=run_events(folder, config, layers),
        recipe=recipe,
    )
    progress.close()
    if int(state.step) < config.train.steps:
        raise UserError(f"{folder}: stopped at step {int(state.step)}; the same call goes on")

    # The training itself keeps the best draft; here it is the last one.
    dtype = getattr(torch, config.train.dtype)
    export(state.params, run.frozen, config.draft, folder / "draft", layers, dtype)
    return run


def train_theirs(
    inputs: Inputs, part: Part, config: Config, folder: Path, oracle: Oracle | None
) -> Run:
    """Train SpecForge's model on the same samples in the same order; as `train_ours`."""
    assert oracle is not None
    rate = inputs.options.specforge_rate or config.optimizer.learning_rate
    optimizer = replace(config.optimizer, learning_rate=rate)
    every_row = replace(config.objective, survival=1.0)
    config = replace(config, optimizer=optimizer, objective=every_row)
    run = prepare(config, inputs.features, inputs.vocab, tensors_for(inputs, config), folder)
    run = run._replace(train=run.train[: part.samples])

    start = first_params(config, inputs.options.init)
    steps = config.train.steps
    params, _ = train_specforge(oracle, under(run, "specforge", UNROLL), start, steps)
    dtype = getattr(torch, config.train.dtype)
    layers = inputs.tree["num_hidden_layers"]
    export(params, run.frozen, config.draft, folder / "draft", layers, dtype)
    return run


# What is measured


def measure(inputs: Inputs, run: Run, folder: Path) -> dict[str, Any]:
    """The draft's accepted lengths, simulated and decoded."""
    options = inputs.options
    params = load_draft(folder / "draft", getattr(torch, run.config.train.dtype)).params
    every_row = replace(run.config.objective, survival=1.0)
    run = run._replace(config=replace(run.config, objective=every_row))
    simulated = evaluate_held_out(under(run, "serving", UNROLL), params)

    settings = EvalSettings(
        tasks=len(inputs.prompts.texts),
        max_new=options.max_new,
        draft_length=options.draft_length,
        speed_tasks=1,
        repeats=1,
    )
    report = evaluate(
        options.target,
        folder / "draft",
        inputs.prompts.texts,
        settings,
        plain_store=options.out / "plain.json",
        on_progress=progress.bars("prompt"),
        categories=inputs.prompts.categories,
    )
    progress.close()
    shown = ("lossless", "acceptance_by_position", "by_category")
    return {
        "held_out": simulated["accepted_length"],
        "decoded": report["accepted_length"],
        **{name: report[name] for name in shown if name in report},
    }


def one_run(
    inputs: Inputs, part: Part, size: int, seed: int, side: str, oracle: Oracle | None
) -> dict[str, Any]:
    """The row of a finished run: kept, or trained and measured now."""
    folder = inputs.options.out / f"{size}-{seed}" / side
    kept = folder / "result.json"
    if kept.exists():
        return read_object(kept)

    begin = time.perf_counter()
    config = config_of(inputs, part, seed)
    print(
        f"== {size} supervised tokens, seed {seed}, {side}: {config.train.steps} steps", flush=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    if side == "ours":
        run = train_ours(inputs, part, config, folder)
    else:
        run = train_theirs(inputs, part, config, folder, oracle)
    trained = time.perf_counter()

    row = {
        "side": side,
        "size": size,
        "seed": seed,
        "samples": part.samples,
        "supervised_tokens": part.supervised,
        "steps": config.train.steps,
        "learning_rate": run.config.optimizer.learning_rate,
        "unroll": run.config.objective.ttt_length if side == "ours" else UNROLL,
        **measure(inputs, run, folder),
        "train_seconds": trained - begin,
        "measure_seconds": time.perf_counter() - trained,
    }
    write_json(kept, row)
    return row
