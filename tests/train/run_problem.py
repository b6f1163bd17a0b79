"""A tiny run of `train`: features, a target, a vocabulary map and a configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import eagle3fn as e3
from eagle3fn.base.types import TrainState, VocabMap
from eagle3fn.data.features import FeatureSet, open_features
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.specforge import RECIPE
from eagle3fn.train.loop import train
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.run import Run, prepare
from tests.factories import make_config, make_map, make_target, supervised_sample, write_folder

HIDDEN = 16
VOCAB = 40
DRAFT_VOCAB = 24
LENGTHS = (9, 12, 7, 10, 8, 11)
"""Tokens of the samples trained on."""

HELD_OUT_LENGTHS = (10, 4, 13, 7, 8)
"""Tokens of the held-out samples. Of the second one no row is trained after the second step."""


class Problem(NamedTuple):
    """What `train` and `prepare` read, but the folder that they write."""

    config: e3.Config
    features: FeatureSet
    vocab_map: VocabMap
    target: TargetTensors


def make_problem(
    folder: Path,
    steps: int = 4,
    dtype: str = "float32",
    train: dict[str, Any] | None = None,
    **objective: Any,
) -> Problem:
    """Write a feature folder of `LENGTHS` and `HELD_OUT_LENGTHS`, and make the rest."""
    lengths = LENGTHS + HELD_OUT_LENGTHS
    samples = [supervised_sample(length, i, VOCAB, HIDDEN) for i, length in enumerate(lengths)]
    write_folder(folder, samples, VOCAB, HIDDEN)

    # Means over the whole batch need one micro-batch an update.
    config = make_config(dtype, steps, train=train, **objective)
    micro_batch = 2 if config.objective.loss in RECIPE.batch_means else 1
    data = e3.DataConfig(global_batch=2, micro_batch=micro_batch, held_out=len(HELD_OUT_LENGTHS))
    vocab_map = make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(1))
    return Problem(
        replace(config, data=data), open_features(folder), vocab_map, make_target(VOCAB, HIDDEN)
    )


def train_in(out: Path, problem: Problem, **options: Any) -> TrainState:
    """`train` on a problem, writing into `out`."""
    return train(*problem, out, **options)


def held_out_run(folder: Path, recipe: Recipe = OURS, **objective: Any) -> Run:
    """A run that was prepared and has not begun, for an evaluation; its samples are in `folder`."""
    problem = make_problem(folder / "features", **objective)
    return prepare(*problem, folder / "run", recipe=recipe)
