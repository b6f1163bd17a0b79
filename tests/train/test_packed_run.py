"""Runs on packed rows: the samples and losses of padded ones, and bit-identical resumes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import eagle3fn as e3
from eagle3fn.base.launch import World
from eagle3fn.base.tree import equal
from eagle3fn.data.pipeline import batches
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.memory import plan_memory
from eagle3fn.train.run import check_world, prepare
from tests.factories import make_config
from tests.train.run_files import rows
from tests.train.run_problem import Problem, make_problem, train_in
from tests.train.start_ranks import ROOT

STEPS = 4
PACK = 26
"""Tokens of a row: of a batch of four samples, 7 to 12 tokens each, two rows."""


def packed(problem: Problem, tokens: int = PACK, batch: int = 4, **train: object) -> Problem:
    """A problem whose micro-batches are packed rows; with 0 tokens, the same padded."""
    data = replace(
        problem.config.data, max_length=13, global_batch=batch, pack_tokens=tokens, prefetch=0
    )
    settings = replace(problem.config.train, **train)
    return problem._replace(config=replace(problem.config, data=data, train=settings))


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    return make_problem(tmp_path / "features", STEPS, ttt_length=3)


@pytest.mark.parametrize("survival", [1.0, 0.6])
def test_packed_run_has_the_updates_of_a_padded_one(tmp_path, survival):
    """In fp32 to rounding, with the same tokens, rows and draws; and the same evaluation."""
    given = make_problem(tmp_path / "features", STEPS, ttt_length=3, survival=survival)
    train_in(tmp_path / "padded", packed(given, tokens=0))
    train_in(tmp_path / "packed", packed(given))
    metrics = [rows(tmp_path / name / "metrics.jsonl") for name in ("padded", "packed")]
    pairs = list(zip(*metrics, strict=True))
    assert len(pairs) == STEPS
    for one, other in pairs:
        assert (one["tokens"], one["rows"]) == (other["tokens"], other["rows"])
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)

    # The held-out samples are evaluated one by one, so an untrained draft's row has the same bits.
    first, *rest = rows(tmp_path / "padded/eval.jsonl")
    same, *others = rows(tmp_path / "packed/eval.jsonl")
    assert first == same
    assert others[-1]["loss"] == pytest.approx(rest[-1]["loss"], rel=1e-5)


def test_held_out_evaluation_does_not_read_the_setting(problem, tmp_path):
    run = prepare(*packed(problem), tmp_path / "run")
    seen = []

    def forward_loss(params, batch):
        seen.append(batch.starts)
        return run.fns.forward_loss(params, batch)

    watched = run._replace(fns=run.fns._replace(forward_loss=forward_loss))
    assert evaluate_held_out(watched, run.fns.init(0)) != {}
    assert seen == [None] * len(run.held_out)


def test_update_has_as_many_rows_as_its_samples_fill(problem):
    config = packed(problem, reduce="tree").config
    made = list(batches(problem.features, range(6), config, 0, 3))
    for micro in made:
        tokens = [int(batch.attention_mask.sum()) for batch in micro]
        assert len(micro) == 2 and max(tokens) <= PACK
        assert all(batch.starts is not None for batch in micro)

    # Each rank has one of them; of four ranks two have nothing to train.
    for world in (2, 4):
        shares = [
            next(batches(problem.features, range(6), config, 0, 1, r, world)) for r in range(world)
        ]
        every = [batch for share in shares for batch in share]
        assert len(every) == world
        assert equal(every[:2], list(made[0]))
        for batch in every[2:]:
            assert not batch.row_mask.any() and not batch.attention_mask.any()
            assert equal(batch.row_counts, made[0][0].row_counts)


def test_resumed_run_ends_as_the_whole(problem, tmp_path):
    given = packed(problem, checkpoint_every=2)
    whole = train_in(tmp_path / "whole", given)
    train_in(tmp_path / "run", given, max_steps=2)
    assert equal(train_in(tmp_path / "run", given), whole)
    assert rows(tmp_path / "run/metrics.jsonl") == rows(tmp_path / "whole/metrics.jsonl")


def test_padded_run_does_not_go_on_packed(problem, tmp_path):
    train_in(tmp_path / "run", packed(problem, 0), max_steps=2)
    with pytest.raises(e3.UserError, match=r"data\.pack_tokens was 0, is 26; set it back, or"):
        train_in(tmp_path / "run", packed(problem))


def test_killed_run_of_packed_rows_resumes_on_more_ranks_to_the_same_bits():
    """From one rank to two, of which one has a row without a sample."""
    command = [sys.executable, "-m", "tests.train.kill_resume", "--kills", "1", "--ranks", "1,2"]
    command += ["--pack", "300", "--seed", "3", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == counts["equal"] == 1
    assert counts["lost"] == counts["repeated"] == 0


# Settings


def test_any_number_of_ranks_shares_packed_rows():
    config = make_config()
    padded = replace(config, data=e3.DataConfig(global_batch=4))
    with pytest.raises(e3.UserError, match=r"3 ranks must divide them.*set data\.pack_tokens"):
        check_world(padded, World(0, 3))
    data = e3.DataConfig(max_length=13, global_batch=4, pack_tokens=PACK)
    assert check_world(replace(config, data=data), World(0, 3)) is None


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"pack_tokens": 100}, r"data\.pack_tokens = 100: must be 0, or at least data\.max_length"),
        ({"pack_tokens": -1}, r"data\.pack_tokens = -1: must be at least 0"),
        (
            {"pack_tokens": 4096, "global_batch": 2, "micro_batch": 2},
            r"data\.micro_batch = 2: must be 1, its default, where data\.pack_tokens = 4096 makes",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, named):
    with pytest.raises(e3.UserError, match=named):
        e3.DataConfig(**data)


def test_plan_counts_the_sum_of_gradients_where_rows_can_be_several():
    config = make_config()

    def gradients(ranks: int, **data: int) -> int:
        chosen = replace(config, data=e3.DataConfig(max_length=16, global_batch=8, **data))
        return plan_memory(chosen, ranks).held["gradients"]

    assert gradients(1, pack_tokens=64) == gradients(1)
    assert gradients(1, pack_tokens=128) == gradients(8) < gradients(1)
    assert gradients(2, pack_tokens=64) == gradients(8)
