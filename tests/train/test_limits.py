"""Whole runs at the limits of their numbers: right, or an end with the last good state kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.types import TrainState
from eagle3fn.data.features import open_features
from eagle3fn.train.checkpoint import checkpoints
from tests.factories import make_draft, make_map, make_target, supervised_sample, write_folder
from tests.train.run_files import read_leaves, rows
from tests.train.run_problem import DRAFT_VOCAB, HIDDEN, VOCAB, Problem, make_problem, train_in

STEPS = 4


def problem_of(
    folder: Path,
    lengths: tuple[int, ...] = (9, 12, 7, 10),
    kept: int = DRAFT_VOCAB,
    scale: float = 1.0,
    rate: float = 1e-2,
    dtype: str = "float32",
    **objective: Any,
) -> Problem:
    """A run of samples of these lengths, features scaled, with so many tokens in the draft's
    vocabulary; the last sample is held out.
    """
    samples = []
    for i, length in enumerate(lengths):
        sample = supervised_sample(length, i, VOCAB, HIDDEN)
        wide = sample.aux_hidden.double() * scale
        samples.append(sample._replace(aux_hidden=wide.to(sample.aux_hidden.dtype)))
    write_folder(folder, samples, VOCAB, HIDDEN)

    train = {"eval_every": 2, "checkpoint_every": 2}
    made = make_problem(folder.parent / "other", STEPS, dtype, train, **objective)
    config = replace(
        made.config,
        draft=make_draft(HIDDEN, VOCAB, kept),
        optimizer=e3.OptimizerConfig(learning_rate=rate, warmup_ratio=0.0),
        data=e3.DataConfig(global_batch=2, held_out=1),
    )
    vocab_map = make_map(VOCAB, kept, torch.Generator().manual_seed(1))
    return Problem(config, open_features(folder), vocab_map, make_target(VOCAB, HIDDEN))


def is_finite(state: TrainState) -> bool:
    leaves = [*state.params.values(), *state.masters.values()]
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def trained(out: Path, problem: Problem) -> list[dict[str, Any]]:
    """The rows of a run that ends well; each has a finite loss."""
    state = train_in(out, problem)
    assert is_finite(state)
    assert int(state.step) == STEPS
    found = rows(out / "metrics.jsonl")
    assert len(found) == STEPS
    assert all(row["loss"] is not None and row["loss"] >= 0 for row in found)
    return found


def ended(out: Path, problem: Problem) -> str:
    """How a run ends that cannot go on; all its checkpoints are finite."""
    with pytest.raises(e3.UserError) as caught:
        train_in(out, problem)
    for path in checkpoints(out / "checkpoints"):
        assert all(leaf.isfinite().all() for leaf in read_leaves(path).values())
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_draft_vocabulary_of_one_token_that_is_no_label_is_refused(tmp_path, numerics):
    """Its distribution is 1 whatever the draft says: the loss would be 0."""
    text = ended(tmp_path / "run", problem_of(tmp_path / "f", kept=1, numerics=numerics))
    assert "none has its most likely token in the draft vocabulary" in text


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_draft_vocabulary_of_two_tokens(tmp_path, numerics):
    found = trained(tmp_path / "run", problem_of(tmp_path / "f", kept=2, numerics=numerics))
    assert all(0 <= rate <= 1 for row in found for rate in row["acceptance"])
    assert found[0]["loss"] > 0


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_unroll_longer_than_the_samples(tmp_path, numerics):
    """Steps beyond a sample's end train nothing."""
    problem = problem_of(tmp_path / "f", ttt_length=20, numerics=numerics)
    found = trained(tmp_path / "run", problem)
    assert all(row["losses"][0] > 0 for row in found)
    assert all(row["losses"][12:] == [0.0] * 8 for row in found)


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize("lengths", [(1, 2, 9, 1, 8), (1, 1, 9, 12, 8)])
def test_conversations_of_one_token_train_nothing(tmp_path, lengths, numerics):
    problem = problem_of(tmp_path / "f", lengths=lengths, numerics=numerics)
    found = trained(tmp_path / "run", problem)
    assert any(row["loss"] > 0 for row in found)


def test_run_of_one_token_conversations_alone_is_refused(tmp_path):
    problem = problem_of(tmp_path / "f", lengths=(1, 1, 1, 1, 9))
    assert "no row to train" in ended(tmp_path / "run", problem)


def test_run_whose_held_out_samples_have_no_supervised_row_is_refused(tmp_path):
    """They would give every draft the accepted length 1."""
    problem = problem_of(tmp_path / "f", lengths=(9, 12, 7, 10, 1))
    text = ended(tmp_path / "run", problem)
    assert text.startswith("data.held_out = 1: no supervised row in these last samples of ")
    assert "set data.held_out=0" in text
    assert not (tmp_path / "run").exists()

    # One of them is enough; and none need be held out.
    for held_out in (0, 2):
        data = replace(problem.config.data, held_out=held_out)
        other = problem._replace(config=replace(problem.config, data=data))
        train_in(tmp_path / f"run-{held_out}", other)


def test_tiny_rate_changes_nothing(tmp_path):
    problem = problem_of(tmp_path / "f", rate=1e-45)
    trained(tmp_path / "run", problem)
    first = read_leaves(tmp_path / "run/checkpoints/step-00000002")
    last = read_leaves(tmp_path / "run/checkpoints/step-00000004")
    assert torch.equal(first["masters.fc.weight"], last["masters.fc.weight"])
    assert not torch.equal(first["opt.mu.fc.weight"], last["opt.mu.fc.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rate", [1e10, 1e30])
def test_rates_that_explode_end_the_run_with_the_last_good_state_kept(tmp_path, rate, dtype):
    text = ended(tmp_path / "run", problem_of(tmp_path / "f", rate=rate, dtype=dtype))
    assert "not finite" in text or "NaN or infinity" in text
    assert "optimizer.learning_rate" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale", [1e-38, 1e11])
def test_features_near_the_ends_of_bf16(tmp_path, scale, dtype):
    found = trained(tmp_path / "run", problem_of(tmp_path / "f", scale=scale, dtype=dtype))
    assert all(0 < row["grad_norm"] < float("inf") for row in found)


def test_features_that_overflow_are_refused_by_their_sample(tmp_path):
    text = ended(tmp_path / "run", problem_of(tmp_path / "f", scale=1e38))
    assert "sample 'row" in text
    assert "aux_hidden" in text
