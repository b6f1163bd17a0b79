"""The loop where a step returns before it is computed, and where a batch cannot be read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.data.order import shuffled
from eagle3fn.train import loop
from eagle3fn.train.recipe import OURS
from tests.train.run_files import same_end
from tests.train.run_problem import LENGTHS, Problem, make_problem, train_in

STEPS = 8


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    """Eight steps of one micro-batch, evaluated every four and saved every three."""
    train = {"eval_every": 4, "checkpoint_every": 3}
    made = make_problem(tmp_path / "features", STEPS, train=train)
    data = replace(made.config.data, micro_batch=2)
    return made._replace(config=replace(made.config, data=data))


def written(out: Path) -> list[int]:
    """The steps whose metrics are in the file."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class WatchedLoss:
    """`forward_loss`; records, when a step calls it, how many rows of metrics are written."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[int] = []

    def __call__(
        self, params: Params, batch: Batch, *, config: e3.Config, frozen: Frozen
    ) -> tuple[Tensor, Aux]:
        if torch.is_grad_enabled():  # not in an evaluation
            self.rows.append(len(written(self.out)))
        return e3.forward_loss(params, batch, config=config, frozen=frozen)


@pytest.fixture(params=[False, True], ids=["waits", "asynchronous"])
def asynchronous(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a device a step's metrics are read when the next one was called; here as if on one."""
    monkeypatch.setattr(loop, "_is_asynchronous", lambda device: request.param)
    return request.param


def test_metrics_are_written_one_step_late_on_a_device(problem, tmp_path, asynchronous):
    """Before an evaluation and before a checkpoint all of them are written."""
    out = tmp_path / "run"
    loss = WatchedLoss(out)
    train_in(out, problem, recipe=OURS._replace(name="marking", loss=loss))
    if asynchronous:
        assert loss.rows == [0, 0, 1, 3, 4, 4, 6, 6]
    else:
        assert loss.rows == list(range(STEPS))


def test_asynchronous_run_writes_the_same_files(problem, tmp_path, monkeypatch):
    train_in(tmp_path / "whole", problem)
    monkeypatch.setattr(loop, "_is_asynchronous", lambda device: True)
    train_in(tmp_path / "run", problem)
    assert same_end(tmp_path / "run", tmp_path / "whole", STEPS)


def test_loss_that_is_not_finite_ends_the_run_with_the_samples_named(
    problem, tmp_path, asynchronous
):
    optimizer = replace(problem.config.optimizer, learning_rate=1e30, warmup_ratio=0.0)
    diverging = problem._replace(config=replace(problem.config, optimizer=optimizer))
    with pytest.raises(e3.UserError, match=r"not finite; samples row\d, row\d; .*learning_rate"):
        train_in(tmp_path / "run", diverging)


def test_batch_that_cannot_be_read_loses_no_metrics(problem, tmp_path, asynchronous):
    def broken(n: int, config: e3.Config, place: int) -> int:
        if n == len(LENGTHS) and place == 2 * config.data.global_batch:  # not in an evaluation
            raise e3.UserError("shard 7: truncated")
        return shuffled(n, config, place)

    out = tmp_path / "run"
    with pytest.raises(e3.UserError, match="shard 7: truncated"):
        train_in(out, problem, recipe=OURS._replace(name="broken", order=broken))
    assert written(out) == [1, 2]
