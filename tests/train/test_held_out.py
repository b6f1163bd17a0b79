"""The held-out loss is the objective over all held-out rows; `ranks_job` has it on ranks."""

import json

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Frozen
from eagle3fn.data.collate import align_mask
from eagle3fn.data.features import read_sample
from eagle3fn.specforge import RECIPE, stored_order
from eagle3fn.testing.builders import Unaligned
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.recipe import OURS
from eagle3fn.train.run import Run, prepare
from tests.reference.loops import Objective, objective_by_loops
from tests.train.run_problem import (
    HELD_OUT_LENGTHS,
    held_out_run,
    make_problem,
    train_in,
)


def by_loops(run: Run, params: dict[str, torch.Tensor]) -> Objective:
    """The objective over the held-out samples' rows, in fp64."""
    samples = []
    for number in run.held_out:
        sample = read_sample(run.features, number)
        unaligned = Unaligned(
            input_ids=sample.input_ids,
            attention_mask=torch.ones_like(sample.input_ids),
            row_mask=align_mask(sample.token_mask),
            aux_hidden=sample.aux_hidden.double(),
            last_hidden=sample.last_hidden.double(),
        )
        samples.append(unaligned)

    wide = tree_map(lambda leaf: leaf.double(), params)
    frozen = run.frozen
    assert frozen.embed_tokens is not None
    frozen = Frozen(
        frozen.embed_tokens.double(), frozen.target_head.double(), frozen.t2d, frozen.d2t
    )
    return objective_by_loops(wide, frozen, run.config, samples, sum(HELD_OUT_LENGTHS))


def check(row: dict, expected: Objective, rel: float) -> None:
    assert row["losses"] == pytest.approx(expected.losses, rel=rel)
    assert row["loss"] == pytest.approx(expected.loss, rel=rel)
    assert row["rows"] == expected.sums.rows[0]


@pytest.mark.parametrize(
    "objective",
    [
        {"normalization": "mask", "numerics": "plain"},
        {"normalization": "mask", "numerics": "fast"},
        {"normalization": "mask", "numerics": "fast", "survival": 0.3},
        {"normalization": "mask", "numerics": "plain", "survival": 0.3},
        {"normalization": "rows", "numerics": "plain"},
        {"normalization": "rows", "numerics": "fast"},
        {"loss": "nla", "numerics": "plain"},
        {"loss": "lk", "numerics": "fast"},
        {"loss": "lk_alpha", "numerics": "plain"},
    ],
    ids=lambda objective: "-".join(map(str, objective.values())),
)
def test_held_out_loss_equals_plain_loops_over_all_rows(tmp_path, objective):
    """One sample has no trained row in the later steps: it must not count as a row there."""
    recipe = OURS
    if objective.get("loss") in RECIPE.batch_means:
        theirs = {"loss": RECIPE.loss, "batch_means": RECIPE.batch_means}
        recipe = OURS._replace(name="means over the batch", **theirs)
    run = held_out_run(tmp_path, recipe=recipe, dtype="float64", **objective)
    params = run.fns.init(3)
    expected = by_loops(run, params)
    assert expected.sums.rows[-1] == sum(max(s - 5, 0) for s in HELD_OUT_LENGTHS)
    assert min(HELD_OUT_LENGTHS) < 5
    check(evaluate_held_out(run, params), expected, rel=1e-9)


def test_rows_of_eval_jsonl_have_the_held_out_loss(tmp_path):
    problem = make_problem(tmp_path / "features", steps=4, train={"eval_every": 2})
    state = train_in(tmp_path / "run", problem)
    lines = (tmp_path / "run/eval.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(len(row["losses"]) == 4 for row in rows)

    # The last row is that of the state returned.
    run = held_out_run(tmp_path / "again")
    check(rows[-1], by_loops(run, state.params), rel=1e-5)
    assert rows[-1]["loss"] != rows[0]["loss"]


def test_nothing_held_out_gives_an_empty_row(tmp_path):
    run = held_out_run(tmp_path)
    assert evaluate_held_out(run._replace(held_out=[]), run.fns.init(0)) == {}


def test_each_held_out_sample_is_read_once_whatever_the_recipes_order(tmp_path):
    """An order that repeats the first sample is a way to train, not to evaluate."""
    problem = make_problem(tmp_path)
    ours = prepare(*problem, tmp_path / "ours")
    params = ours.fns.init(0)

    def first_alone(n: int, config: e3.Config, place: int) -> int:
        return 0

    recipe = OURS._replace(name="first sample alone", order=first_alone)
    other = prepare(*problem, tmp_path / "other", recipe=recipe)
    assert evaluate_held_out(ours, params) == evaluate_held_out(other, params) != {}


def test_a_recipe_without_a_name_cannot_be_trained(tmp_path):
    """Its runs could be resumed under another one."""
    with pytest.raises(e3.UserError, match=r"recipe\.name is empty.*Recipe\(name="):
        prepare(*make_problem(tmp_path), tmp_path / "run", recipe=OURS._replace(order=stored_order))
