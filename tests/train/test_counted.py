"""Rows that the loss counts: a run whose labels are never in the draft vocabulary is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.types import VocabMap
from eagle3fn.data.collate import align_mask
from eagle3fn.data.features import open_features
from eagle3fn.data.target_tensors import make_frozen
from eagle3fn.train import counted
from eagle3fn.train.events import Events
from tests.factories import supervised_sample, write_folder
from tests.train.run_files import rows
from tests.train.run_problem import DRAFT_VOCAB, HIDDEN, VOCAB, Problem, make_problem, train_in

STEPS = 6


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    return make_problem(tmp_path / "features", STEPS, train={"eval_every": 3})


def never_in_map(problem: Problem) -> Problem:
    """A map of tokens that are nowhere the target's most likely ones: a head of zeros has token 0
    everywhere, as the lowest of equal ones.
    """
    kept = torch.arange(1, DRAFT_VOCAB + 1)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    vocab_map = VocabMap(t2d, kept - torch.arange(DRAFT_VOCAB))
    head = torch.zeros_like(problem.target.head)
    return problem._replace(vocab_map=vocab_map, target=problem.target._replace(head=head))


def without_held_out(problem: Problem) -> Problem:
    data = replace(problem.config.data, held_out=0)
    return problem._replace(config=replace(problem.config, data=data))


class Exported:
    """Which drafts were published."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.events = Events(on_draft=lambda params, frozen, row: self.steps.append(row["step"]))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_run_that_counts_no_label_is_refused_before_anything_is_written(
    problem, tmp_path, held_out
):
    bad = never_in_map(problem)
    if not held_out:
        bad = without_held_out(bad)
    with pytest.raises(e3.UserError, match=r"of the first \d+ labels none.*eagle3fn vocab"):
        train_in(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_held_out_rows_of_which_none_counts_end_the_run_before_its_first_update(
    problem, tmp_path, monkeypatch
):
    monkeypatch.setattr("eagle3fn.train.run.check_first_labels", lambda *args: None)
    exported = Exported()
    with pytest.raises(e3.UserError, match=r"step 0: none of the \d+ held-out rows"):
        train_in(tmp_path / "run", never_in_map(problem), events=exported.events)
    assert exported.steps == []
    assert rows(tmp_path / "run/metrics.jsonl") == []


@pytest.mark.parametrize(("steps", "last"), [(6, 6), (40, counted.MOST_UNCOUNTED)])
def test_updates_that_count_no_row_end_the_run(problem, tmp_path, monkeypatch, steps, last):
    monkeypatch.setattr("eagle3fn.train.run.check_first_labels", lambda *args: None)
    bad = without_held_out(never_in_map(problem))
    train = replace(bad.config.train, steps=steps, eval_every=50)
    bad = bad._replace(config=replace(bad.config, train=train))
    exported = Exported()
    with pytest.raises(e3.UserError, match=f"step {last}: the loss of the last {last} updates"):
        train_in(tmp_path / "run", bad, events=exported.events)
    assert exported.steps == [0]  # the untrained one alone
    assert len(rows(tmp_path / "run/metrics.jsonl")) == last


def test_uncounted_updates_are_counted_across_calls(problem, tmp_path, monkeypatch):
    monkeypatch.setattr("eagle3fn.train.run.check_first_labels", lambda *args: None)
    bad = without_held_out(never_in_map(problem))
    train_in(tmp_path / "run", bad, max_steps=4)
    with pytest.raises(e3.UserError, match="step 6: the loss of the last 6 updates"):
        train_in(tmp_path / "run", bad)


def metrics(rows: list[int], known: list[float]) -> dict[str, Any]:
    zeros = torch.zeros(len(rows))
    counts = torch.tensor(rows)
    aux = e3.Aux(
        losses=zeros,
        correct=counts,
        rows=counts,
        chain_rows=counts,
        chain_correct=counts,
        accept=zeros,
        accept_rows=torch.tensor(known),
        greedy=zeros.sum(),
        sampled=zeros.sum(),
    )
    return {"aux": aux}


def test_an_update_without_a_trained_row_says_nothing():
    assert counted.uncounted_after(3, metrics([0, 0], [0.0, 0.0])) == 3
    assert counted.uncounted_after(3, metrics([5, 4], [0.0, 0.0])) == 4
    assert counted.uncounted_after(3, metrics([5, 4], [1.0, 0.0])) == 0


@pytest.mark.parametrize("positive", [None, 0, 2])
def test_one_label_in_the_map_is_enough_to_begin(problem, tmp_path, positive):
    """Token 1, which is in the map, is the most likely one where hidden states are positive, else
    token 0, which is not.
    """
    bad = never_in_map(problem)
    samples = [supervised_sample(6, number, VOCAB, HIDDEN) for number in range(3)]
    for number, sample in enumerate(samples):
        sample.last_hidden.fill_(1.0 if number == positive else -1.0)
    features = open_features(write_folder(tmp_path / "three", samples, VOCAB, HIDDEN))
    head = torch.zeros_like(bad.target.head)
    head[1] = 1.0
    frozen = make_frozen(bad.target._replace(head=head), bad.vocab_map, bad.config)

    def check() -> None:
        counted.check_first_labels(bad.config, frozen, features, [0, 1, 2], align_mask)

    if positive is not None:
        assert check() is None
        return
    with pytest.raises(e3.UserError, match="of the first 12 labels none"):
        check()


def test_every_row_says_the_share(problem, tmp_path):
    train_in(tmp_path / "run", problem)
    shares = [
        row["counted"]
        for name in ("metrics.jsonl", "eval.jsonl")
        for row in rows(tmp_path / "run" / name)
    ]
    assert len(shares) == STEPS + 3
    assert all(0 < share < 1 for share in shares)
