"""`--from`: a run that goes on from another's checkpoint, in a folder of its own."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.tree import equal
from eagle3fn.base.types import TrainState
from eagle3fn.data.features import open_features
from eagle3fn.data.order import shuffled
from eagle3fn.train import loop, ready, schedules
from eagle3fn.train.branch import read_branch
from eagle3fn.train.loop import Events
from eagle3fn.train.recipe import OURS
from tests.factories import make_draft, make_map, supervised_sample, write_folder
from tests.train.run_files import rows, same_end, same_leaves
from tests.train.run_problem import DRAFT_VOCAB, HIDDEN, VOCAB, Problem, make_problem, train_in
from tests.train.start_ranks import torchrun

STEPS = 6
BRANCHED = 2
CHECKPOINT = f"checkpoints/step-{BRANCHED:08d}"


class Call(NamedTuple):
    """A call that went to the run's end: its state, what was said, the published drafts' steps."""

    state: TrainState
    said: list[str]
    best: list[int]


def call(out: Path, problem: Problem, **options: Any) -> Call:
    said: list[str] = []
    best: list[int] = []
    events = Events(
        on_notice=said.append, on_draft=lambda params, frozen, row: best.append(row["step"])
    )
    state = train_in(out, problem, events=events, **options)
    assert all(len(line.splitlines()) == 1 for line in said)
    return Call(state, said, best)


def changed(problem: Problem, **sections: dict[str, Any]) -> Problem:
    """The problem under other settings, by section."""
    config = problem.config
    parts = {name: replace(getattr(config, name), **part) for name, part in sections.items()}
    return problem._replace(config=replace(config, **parts))


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    train = {"eval_every": 2, "checkpoint_every": 2, "keep_last": 9, "reduce": "tree"}
    return make_problem(tmp_path_factory.mktemp("branch") / "features", STEPS, train=train)


@pytest.fixture(scope="module")
def source(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, with all its checkpoints."""
    out = tmp_path_factory.mktemp("source") / "run"
    train_in(out, problem)
    return out


@pytest.fixture
def others(problem: Problem, tmp_path: Path) -> Problem:
    """The problem with other samples."""
    folder = tmp_path / "others"
    samples = [supervised_sample(8 + i, 70 + i, VOCAB, HIDDEN) for i in range(10)]
    write_folder(folder, samples, VOCAB, HIDDEN)
    return problem._replace(features=open_features(folder))


# The same run, elsewhere


def test_nothing_changed_has_the_bits_of_the_run_itself(problem, source, tmp_path):
    """State, rows and held-out rows; and it says where it goes on from."""
    found = call(tmp_path / "new", problem, source=source / CHECKPOINT)
    assert found.said == [f"goes on from step 2 of {source / CHECKPOINT}, to step 6"]
    assert same_end(tmp_path / "new", source, STEPS)
    assert found.best[0] == BRANCHED

    branch = read_branch(tmp_path / "new")
    assert branch is not None
    assert (branch.run, branch.step, branch.changes) == ("run", BRANCHED, [])


def test_run_of_two_ranks_goes_on_from_one_of_one(problem, source, tmp_path):
    """To the same bits, as sums are taken by the tree."""
    ended = torchrun(2, "-m", "tests.train.branch_job", source / CHECKPOINT, tmp_path / "new")
    assert ended.codes == [0], ended.text
    meta = json.loads((tmp_path / f"new/checkpoints/step-{STEPS:08d}/meta.json").read_text())
    assert meta["world"] == 2
    assert same_end(tmp_path / "new", source, STEPS)


def test_run_of_a_folder_goes_on_from_its_newest_checkpoint(problem, source, tmp_path):
    longer = changed(problem, train={"steps": STEPS + 1})
    found = call(tmp_path / "new", longer, source=source)
    assert found.said[0] == f"goes on from step 6 of {source}/checkpoints/step-00000006, to step 7"
    assert [row["step"] for row in rows(tmp_path / "new/metrics.jsonl")] == list(range(1, 8))


def test_second_call_resumes_even_where_the_source_is_gone(problem, source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    out = tmp_path / "new"
    whole = call(out, problem, source=copy / CHECKPOINT).state
    shutil.rmtree(out / f"checkpoints/step-{STEPS:08d}")
    shutil.rmtree(copy)

    again = call(out, problem, source=copy / CHECKPOINT)
    assert again.said[0].startswith("resumed from step 4 of 6, ")
    assert equal(again.state, whole)
    assert same_end(out, source, STEPS)

    without = call(out, problem)
    assert "finished" in without.said[0]


# Under other settings and data


def test_what_has_changed_is_said_and_kept(problem, source, tmp_path):
    other = changed(
        problem,
        objective={"ttt_length": 2, "loss": "nla"},
        optimizer={"learning_rate": 0.5},
        train={"seed": 3},
    )
    out = tmp_path / "new"
    found = call(out, other, source=source / CHECKPOINT)
    assert found.said[1:-1] == [
        "objective.loss: nla, was kl",
        "objective.ttt_length: 2, was 4",
        "optimizer.learning_rate: 0.5, was 0.01",
        "train.seed: 3, was 0",
    ]
    written = rows(out / "metrics.jsonl")
    assert found.said[-1] == (
        f"learning rate: {written[1]['learning_rate']:.3g} at step 2, from step 3 on "
        f"{written[2]['learning_rate']:.3g}, the rate of a run of 6 steps"
    )
    branch = read_branch(out)
    assert branch is not None and branch.changes == found.said[1:]

    # The rows before are the source's; the step itself is evaluated anew, over two unroll steps.
    assert written[:BRANCHED] == rows(source / "metrics.jsonl")[:BRANCHED]
    held_out = rows(out / "eval.jsonl")
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    assert [len(row["accuracy"]) for row in held_out] == [4, 2, 2, 2]
    assert found.best[0] == BRANCHED


class Watched:
    """An order that records the steps that it is asked for, of the samples trained on."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, n: int, config: e3.Config, place: int) -> int:
        step, sample = divmod(place, config.data.global_batch)
        if sample == 0:
            self.steps.append(step)
        return shuffled(n, config, place)


def steps_asked(out: Path, problem: Problem, source: Path | None) -> list[int]:
    """The data order's steps that a run trains on."""
    order = Watched()
    recipe = OURS._replace(name="watched", order=order)
    call(out, changed(problem, data={"prefetch": 0}), recipe=recipe, source=source)
    return order.steps


def test_other_features_begin_at_their_first_epoch(others, source, tmp_path):
    out = tmp_path / "new"
    assert steps_asked(out, others, source / CHECKPOINT) == [0, 1, 2, 3]

    # A resumed run goes on in that order.
    shutil.rmtree(out / f"checkpoints/step-{STEPS:08d}")
    assert steps_asked(out, others, None) == [2, 3]


@pytest.mark.parametrize(
    ("batch", "expected"), [(2, [2, 3, 4, 5]), (4, [1, 2, 3, 4]), (3, [2, 3, 4, 5])]
)
def test_same_features_go_on_after_the_samples_trained_on(
    problem, source, tmp_path, batch, expected
):
    """Four samples were: of updates of three, the next whole one begins with the seventh."""
    other = changed(problem, data={"global_batch": batch})
    assert steps_asked(tmp_path / "new", other, source / CHECKPOINT) == expected


def test_epochs_and_minutes_count_from_where_the_data_begins(others, source, tmp_path):
    """Five samples are trained on, two an update: three epochs have seven updates."""
    epochs = changed(others, train={"steps": 0, "epochs": 3})
    found = call(tmp_path / "epochs", epochs, source=source / CHECKPOINT)
    assert int(found.state.step) == BRANCHED + 7

    free = changed(others, train={"steps": 0})
    found = call(tmp_path / "minutes", free, source=source / CHECKPOINT, minutes=1e-3)
    added = int(found.state.step) - BRANCHED
    assert added >= 1
    found = call(tmp_path / "minutes", free, minutes=3e-3)
    assert int(found.state.step) == BRANCHED + 3 * added


# What is refused


REFUSED: dict[str, tuple[Callable[[Problem], Problem], str]] = {
    "shape": (
        lambda problem: problem._replace(
            config=replace(problem.config, draft=make_draft(intermediate_size=28))
        ),
        r"draft\.intermediate_size was 24, is 28; .*train\.init",
    ),
    "dtype": (
        lambda problem: changed(problem, train={"dtype": "float64"}),
        r"train\.dtype was 'float32', is 'float64'; .*train\.init",
    ),
    "start": (
        lambda problem: changed(problem, train={"init": "target"}),
        r"train\.init was random, is target: .*no start is read",
    ),
    "optimizer": (
        lambda problem: changed(problem, optimizer={"name": "muon"}),
        r"optimizer\.name was 'adamw', is 'muon'; .*train\.init",
    ),
    "more held out": (
        lambda problem: changed(problem, data={"held_out": problem.config.data.held_out + 1}),
        r"data\.held_out was 5, is 6, of features that .*; set data\.held_out=5, or",
    ),
    "fewer held out": (
        lambda problem: changed(problem, data={"held_out": problem.config.data.held_out - 1}),
        r"data\.held_out was 5, is 4, of the same features: .*; set data\.held_out=5, or",
    ),
    "vocabulary": (
        lambda problem: problem._replace(
            vocab_map=make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(5))
        ),
        r"written for other vocabulary map; .*train\.init",
    ),
    "steps": (
        lambda problem: changed(problem, train={"steps": BRANCHED}),
        r"train\.steps = 2: .*has made them, so nothing is left",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_state_is_made_of_is_refused_and_nothing_is_written(problem, source, tmp_path, name):
    change, message = REFUSED[name]
    with pytest.raises(e3.UserError, match=message) as caught:
        call(tmp_path / "new", change(problem), source=source / CHECKPOINT)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_samples_that_a_run_before_the_last_trained_on_are_not_held_out(
    problem, others, source, tmp_path
):
    """The last one trained on others, and was ended once in between."""
    train_in(tmp_path / "others", others, source=source / CHECKPOINT, max_steps=1)
    train_in(tmp_path / "others", changed(others, train={"steps": STEPS}))
    longer = {"steps": STEPS + 1}
    more = changed(problem, data={"held_out": 6}, train=longer)
    with pytest.raises(e3.UserError, match=r"data\.held_out was 5, is 6, of .*data\.held_out=5"):
        call(tmp_path / "more", more, source=tmp_path / "others")
    assert not (tmp_path / "more").exists()

    # As many may be, and fewer: these count from then on.
    fewer = changed(problem, data={"held_out": 4}, train=longer)
    train_in(tmp_path / "fewer", fewer, source=tmp_path / "others")
    again = changed(others, train={"steps": STEPS + 2})
    train_in(tmp_path / "again", again, source=tmp_path / "fewer")
    back = changed(problem, train={"steps": STEPS + 3})
    with pytest.raises(e3.UserError, match=r"data\.held_out was 4, is 5, of "):
        call(tmp_path / "back", back, source=tmp_path / "again")


class Optimizers(NamedTuple):
    """Settings of `[optimizer]` of a run and of one that is to go on from it, and what is said."""

    before: dict[str, Any]
    after: dict[str, Any]
    message: str


OTHERS = {
    "no momentum any more": Optimizers(
        {"name": "sgd"},
        {"momentum": 0.0},
        r"holds the state of another optimizer, before optimizer\.momentum: 0\.0, was 0\.95 \("
        r"rank 0: 'opt\.[a-z.]+' is no leaf of the state\); set the optimizer back, or .*init=",
    ),
    "more matrices": Optimizers(
        {"name": "muon"},
        {"matrices": "all"},
        r"of another optimizer, before optimizer\.matrices: all, was attention .*train\.init=",
    ),
    "the same leaves": Optimizers(
        {"name": "lion"}, {"name": "sgd"}, r"optimizer\.name was 'lion', is 'sgd'; .*train\.init="
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizers_state_is_refused_and_is_not_called_damaged(problem, tmp_path, name):
    before, after, message = OTHERS[name]
    old = changed(problem, optimizer=before)
    train_in(tmp_path / "old", old, max_steps=2)
    with pytest.raises(e3.UserError, match=message) as caught:
        call(tmp_path / "new", changed(old, optimizer=after), source=tmp_path / "old")
    assert "delete" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_schedule_that_is_replaced_may_be_gone(problem, tmp_path, monkeypatch):
    """Its last rate is not said then."""
    (tmp_path / "my_own_rate.py").write_text("def ok(config, total): return lambda step: 1e-3\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = changed(problem, optimizer={"schedule": "my_own_rate:ok"})
    train_in(tmp_path / "old", mine, max_steps=2)

    (tmp_path / "my_own_rate.py").unlink()
    monkeypatch.delitem(sys.modules, "my_own_rate")
    schedules._kept_schedule.cache_clear()
    constant = changed(problem, optimizer={"schedule": "constant"})
    found = call(tmp_path / "new", constant, source=tmp_path / "old")
    assert "learning rate: from step 3 on 0.01, the rate of a run of 6 steps" in found.said


@pytest.mark.parametrize("place", ["with_horizon", "described"])
def test_checkpoint_that_its_run_removes_meanwhile_is_gone_not_damaged(
    problem, source, tmp_path, monkeypatch, place
):
    copy = shutil.copytree(source, tmp_path / "copy")
    before = getattr(ready, place)

    def removed(*args: Any) -> Any:
        shutil.rmtree(copy / CHECKPOINT)
        return before(*args)

    monkeypatch.setattr(ready, place, removed)
    with pytest.raises(e3.UserError, match=r"step-00000002: gone since .*; call again") as caught:
        faster = changed(problem, optimizer={"learning_rate": 0.5})
        call(tmp_path / "new", faster, source=copy / CHECKPOINT)
    assert "damaged" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_folder_without_a_checkpoint_is_refused(problem, tmp_path):
    with pytest.raises(e3.UserError, match=r"--from .*: no checkpoint is there; name a run's"):
        call(tmp_path / "new", problem, source=tmp_path)
    assert not (tmp_path / "new").exists()


def test_folder_with_another_run_is_refused(problem, source, tmp_path):
    own = shutil.copytree(source, tmp_path / "own")
    before = sorted(own.rglob("*"))
    with pytest.raises(e3.UserError, match=r"holds a run of its own, .*leave --from out"):
        call(own, problem, source=source / CHECKPOINT)
    shutil.rmtree(own / "checkpoints")
    with pytest.raises(e3.UserError, match="holds a run of its own"):
        call(own, problem, source=source / CHECKPOINT)
    assert {*own.rglob("*")} < {*before}

    call(tmp_path / "new", problem, source=source / CHECKPOINT)
    with pytest.raises(e3.UserError, match=r"goes on from .*step-00000002, not from --from"):
        call(tmp_path / "new", problem, source=source)


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_rows_of_something_else_are_not_written_over(problem, source, tmp_path, name):
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(e3.UserError, match=rf"holds a {name} of something else, .*remove it"):
        call(tmp_path, problem, source=source / CHECKPOINT)
    assert (tmp_path / name).read_text() == "mine\n"
    assert not (tmp_path / "from.json").exists()


# Kills


class Killed(Exception):
    """Ends a call from inside, as a kill would."""


@pytest.mark.parametrize(
    "place", ["write_horizon", "cut_rows", "append_row", "_save", "_report", "save_checkpoint"]
)
def test_call_that_was_killed_anywhere_is_called_again(
    problem, source, tmp_path, monkeypatch, place
):
    """Before the first checkpoint only with `--from`: nothing else takes the folder for a run."""

    def killed(*args: Any, **options: Any) -> None:
        raise Killed

    out = tmp_path / "new"
    with monkeypatch.context() as patched:
        patched.setattr(loop, place, killed)
        with pytest.raises(Killed):
            call(out, problem, source=source / CHECKPOINT)

    if place != "_report":
        with pytest.raises(e3.UserError, match=r"was to go on from .* call it with --from"):
            call(out, problem)
        with pytest.raises(e3.UserError, match=r"to go on from .*-00000002 again, or") as caught:
            call(out, problem, source=source)
        assert "leave --from out" not in str(caught.value)
    found = call(out, problem, source=source / CHECKPOINT)
    assert same_end(out, source, STEPS)
    assert same_leaves(out / CHECKPOINT, source / CHECKPOINT)
    assert "step 2 of " in found.said[0]


@pytest.mark.parametrize("name", ["named", "run", "step", "changes"])
def test_damaged_from_json_is_refused(problem, source, tmp_path, name):
    out = tmp_path / "new"
    call(out, problem, source=source / CHECKPOINT)
    path = out / "from.json"
    kept = json.loads(path.read_text())
    for value in (None, [[]], {}, True):
        path.write_text(json.dumps(kept | {name: value}))
        with pytest.raises(e3.UserError, match=rf"from\.json: damaged \({name} "):
            read_branch(out)
