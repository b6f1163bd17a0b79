"""A run goes on in a folder of which files are damaged, missing or somebody else's."""

import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import eagle3fn as e3
from eagle3fn.base.files import locked
from eagle3fn.base.toml import read_toml
from eagle3fn.data.features import open_features
from eagle3fn.train import loop
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.defaults import begun_settings
from eagle3fn.train.events import Events
from eagle3fn.train.loop import ROWS
from eagle3fn.train.track import append_row, cut_rows
from eagle3fn.use.report import write_report
from tests.factories import supervised_sample, write_folder
from tests.train.run_files import rows, same_end
from tests.train.run_problem import (
    HELD_OUT_LENGTHS,
    HIDDEN,
    LENGTHS,
    VOCAB,
    Problem,
    make_problem,
    train_in,
)
from tests.train.saved_checkpoint import rewrite_meta
from tests.use.finished_run import write_run

STEPS = 4
STOPPED = 3  # before its checkpoint, the newest is that of step 2


class Stopped(Exception):
    """Ends a run from outside."""


class Begun(NamedTuple):
    """A run, whole, and a copy of its folder where it was stopped after step 3."""

    problem: Problem
    whole: Path
    out: Path

    def go_on(self) -> list[str]:
        """Go on to the end; what was said besides where the run goes on."""
        said: list[str] = []
        train_in(self.out, self.problem, events=Events(on_notice=said.append))
        for line in said:
            assert len(line.splitlines()) == 1
        return [line for line in said if not line.startswith("resumed from step ")]

    def refused(self) -> str:
        """The line with which the run ends at once."""
        with pytest.raises(e3.UserError) as caught:
            self.go_on()
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    def lines(self, name: str) -> list[str]:
        return (self.out / name).read_text().splitlines()

    def write(self, name: str, lines: list[str]) -> None:
        (self.out / name).write_text("\n".join(lines) + "\n")

    @property
    def is_whole(self) -> bool:
        """Whether it ended as the run that nothing happened to."""
        return same_end(self.out, self.whole, STEPS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    folder = tmp_path_factory.mktemp("damaged")
    train = {"eval_every": 2, "checkpoint_every": 1}
    problem = make_problem(folder / "features", STEPS, train=train)
    train_in(folder / "whole", problem)

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == STOPPED:
            raise Stopped

    with pytest.raises(Stopped):
        train_in(folder / "stopped", problem, events=Events(on_step=stop))
    return Begun(problem, folder / "whole", folder / "stopped")


@pytest.fixture
def begun(made: Begun, tmp_path: Path) -> Begun:
    shutil.copytree(made.out, tmp_path / "run")
    return made._replace(out=tmp_path / "run")


def test_run_that_is_not_damaged_says_nothing(begun):
    assert begun.go_on() == []
    assert begun.is_whole


def test_half_a_row_at_the_end_is_said_and_left_out(begun):
    with (begun.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (said,) = begun.go_on()
    assert said.endswith("in a line without an end) left out; all others are kept")
    assert begun.is_whole


def test_last_row_of_zeros_is_said(begun):
    """A disk that lost its power leaves zeros in place of what was not flushed."""
    lines = begun.lines("eval.jsonl")
    (begun.out / "eval.jsonl").write_text("\n".join([*lines[:-1], "\0" * len(lines[-1])]))
    said = cut_rows(begun.out / "eval.jsonl", 2, ROWS["eval.jsonl"])
    assert f"line {len(lines)} (not JSON" in said


def step_row(step: str, value: str = "1.5") -> str:
    """A row of either file, as JSON."""
    row = f'"tokens": 1, "seconds": 1.5, "loss": {value}, "accepted_length": {value}'
    return f'{{"step": {step}, {row}}}'


INSERTED = [
    ('{"step" 5}', "not JSON (Expecting ':' delimiter, column 9))"),
    ("[1, 2]", "no object)"),
    ('{"loss": 1.0}', "no number under step)"),
    (step_row("true"), "no number under step)"),
    (step_row("-1"), "no number under step)"),
    (step_row("1.0"), "no number under step)"),
    (step_row("4", '"x"'), "no number under"),
    ('{"step": NaN}', "not JSON (NaN is no number of JSON))"),
    ("[" * 5000, "not JSON (nested more than 64 deep))"),
    ("9" * 5000, "not JSON (a whole number of 5000 digits))"),
    (step_row("2"), "step 2 once more)"),
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize(("text", "reason"), INSERTED, ids=range(len(INSERTED)))
def test_lines_that_are_no_rows_are_said_and_the_rows_kept(begun, name, text, reason):
    """A line came between the others, and the last one is half written."""
    lines = begun.lines(name)
    begun.write(name, [*lines[:2], text, *lines[2:], lines[0][:20]])
    said = cut_rows(begun.out / name, 2, ROWS[name])
    assert said.startswith(f"{begun.out / name}: line 3 ({reason}")
    assert said.endswith(") left out; all others are kept")
    assert begun.lines(name) == [line for line in lines if json.loads(line)["step"] <= 2]


def test_damaged_line_is_said_once_and_the_run_goes_on(begun):
    lines = begun.lines("metrics.jsonl")
    begun.write("metrics.jsonl", [lines[0], "{", *lines[1:]])
    (said,) = begun.go_on()
    assert said.startswith(f"{begun.out}/metrics.jsonl: line 2 (not JSON")
    assert begun.is_whole


def test_rows_that_report_would_refuse_are_said_and_left_out(begun):
    lines = begun.lines("metrics.jsonl")
    damaged = json.dumps(json.loads(lines[1]) | {"loss": "x"})
    begun.write("metrics.jsonl", [lines[0], damaged, lines[2]])
    (said,) = begun.go_on()
    assert "line 2 (no number under loss) left out; 1 rows are lost, of step 2 first" in said
    assert [row["step"] for row in rows(begun.out / "metrics.jsonl")] == [1, 3, 4]


def test_rows_that_are_lost_are_said(begun):
    lines = begun.lines("metrics.jsonl")
    (begun.out / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + "\n".join(lines[1:]).encode())
    (said,) = begun.go_on()
    assert (
        "line 1 (not JSON (not UTF-8, byte 1)) left out; 1 rows are lost, of step 1 first" in said
    )
    assert [row["step"] for row in rows(begun.out / "metrics.jsonl")] == [2, 3, 4]


def test_rows_out_of_order_are_put_in_order(begun):
    lines = begun.lines("metrics.jsonl")
    begun.write("metrics.jsonl", [lines[2], lines[1], lines[0]])
    assert begun.go_on() == []
    assert begun.is_whole


@pytest.mark.parametrize(("name", "lost"), [("metrics.jsonl", [3, 4]), ("eval.jsonl", [4])])
def test_run_without_its_rows_goes_on(begun, name, lost):
    (begun.out / name).unlink()
    (said,) = begun.go_on()
    assert said.startswith(f"{begun.out / name}: ")
    assert "are lost" in said or said.endswith("no row up to step 2 is there")
    assert "kept" not in said
    assert [row["step"] for row in rows(begun.out / name)] == lost
    other = {"metrics.jsonl": "eval.jsonl", "eval.jsonl": "metrics.jsonl"}[name]
    assert same_end(begun.out, begun.whole, STEPS, (other,))


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_rows_are_written_to_no_other_place(begun, tmp_path, name, kind):
    outside = tmp_path / "outside"
    if kind == "link":
        shutil.copy(begun.out / name, outside)
    before = outside.read_bytes() if outside.exists() else None
    (begun.out / name).unlink()
    if kind == "pipe":
        os.mkfifo(begun.out / name)
    elif kind == "folder":
        (begun.out / name).mkdir()
    else:
        (begun.out / name).symlink_to(outside)

    assert name in begun.refused()
    assert (outside.read_bytes() if outside.exists() else None) == before


def test_run_without_any_complete_checkpoint_is_not_begun_again(begun):
    rows_before = begun.lines("metrics.jsonl")
    folder = begun.out / "checkpoints"
    for meta in folder.glob("*/meta.json"):
        meta.unlink()
    text = begun.refused()
    assert f"{folder}/step-00000002: no meta.json in it" in text
    assert f"delete {folder} to begin it again" in text
    assert begun.lines("metrics.jsonl") == rows_before


def test_newer_checkpoint_that_is_not_complete_is_said(begun):
    (begun.out / "checkpoints/step-00000003").mkdir()
    (said,) = begun.go_on()
    older = begun.out / "checkpoints/step-00000002"
    assert said == f"step-00000003: not complete, so the run goes on from {older}"
    assert begun.is_whole


def test_run_without_checkpoints_says_that_it_begins_again(begun):
    shutil.rmtree(begun.out / "checkpoints")
    said = begun.go_on()
    place = begun.out / "metrics.jsonl"
    assert said[0] == f"{place}: begun again without its 3 rows, no checkpoint is there"
    assert begun.is_whole


def test_what_a_killed_save_left_is_removed_and_links_are_not_followed(begun, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_text("x")
    folder = begun.out / "checkpoints"
    (folder / ".step-00000004.tmp").symlink_to(tmp_path / "outside")
    (folder / ".step-00000003.tmp").mkdir()
    (folder / ".step-00000003.tmp/__0_0.distcp").write_text("half")
    assert begun.go_on() == []
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["kept"]
    assert not list(folder.glob(".*"))
    assert begun.is_whole


def test_what_a_kill_left_while_a_checkpoint_was_published_is_removed(begun):
    """After the rename, what was replaced is removed; before it, that comes back."""
    folder = begun.out / "checkpoints"
    newest = folder / "step-00000002"
    shutil.copytree(newest, folder / f".{newest.name}.abcdefgh.old/{newest.name}")
    (folder / f".{newest.name}.abcdefgh.tmp/{newest.name}").mkdir(parents=True)
    (folder / ".step-00000001.abcdefgh.old").mkdir()
    (folder / "step-00000001").rename(folder / ".step-00000001.abcdefgh.old/step-00000001")
    assert begun.go_on() == []
    assert not list(folder.glob(".*"))
    assert begun.is_whole


def test_somebody_elses_file_in_a_checkpoints_place_is_not_replaced(begun):
    rows_before = begun.lines("metrics.jsonl")
    folder = begun.out / "checkpoints/step-00000003"
    folder.mkdir()
    (folder / "meta.json.part").touch()
    (folder / "__0_0.distcp").touch()
    assert f"{folder}: holds meta.json.part, and only what eagle3fn wrote" in begun.refused()
    assert begun.lines("metrics.jsonl") == rows_before

    # What a checkpoint has is replaced.
    (folder / "meta.json.part").unlink()
    (said,) = begun.go_on()
    assert said.startswith("step-00000003: not complete")
    assert begun.is_whole


def test_somebody_elses_file_in_an_older_checkpoint_is_not_removed_with_it(begun):
    path = begun.out / "checkpoints/step-00000001/thesis.txt"
    path.write_text("years")
    begun.go_on()
    assert path.read_text() == "years"
    assert begun.is_whole


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000003"])
@pytest.mark.parametrize("kind", ["link", "file", "dangling link"])
def test_what_is_no_folder_in_the_place_of_checkpoints_is_refused(begun, tmp_path, name, kind):
    """A link would be followed: another run's checkpoints would be removed."""
    path = begun.out / name
    other = tmp_path / "other"
    if path.exists():
        path.rename(other)
    else:
        other.mkdir()
    before = sorted(other.rglob("*"))
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    kind = "file" if kind == "file" else "link"
    assert f"{path}: is a {kind}, not a folder; remove it" in begun.refused()
    assert sorted(other.rglob("*")) == before


def bad_values(kind: type) -> list[Any]:
    """Values that a setting of this type must not have."""
    values: list[Any] = [None, [], {}, [[]], -1, 10**30, "x", True, 1.5]
    return [value for value in values if type(value) is not kind or value in (-1, 10**30, "x")]


@pytest.mark.parametrize("name", ["steps", "chosen_by"])
def test_damaged_horizon_is_refused(begun, name):
    path = begun.out / "horizon.json"
    kept = json.loads(path.read_text())
    for value in bad_values({"steps": int, "chosen_by": str}[name]):
        path.write_text(json.dumps(kept | {name: value}))
        text = begun.refused()
        assert f"{path}: {name} = " in text
        assert "train into another folder" in text
    for text in ("", "[]", "5", "{", '{"threads": 1}'):
        path.write_text(text)
        assert str(path) in begun.refused()


def test_damaged_settings_are_refused_by_name(begun):
    path = begun.out / "config.toml"
    good = path.read_text()
    assert begun_settings(begun.out) is not None

    changes = {
        "seed = 0": ("seed = [0]", r"train\.seed"),
        "[data]": ("[other]\n[[data]]", "data is no section"),
        "global_batch = 2": ("global_batch = 0", r"data\.global_batch"),
        "decay = 0.8": ("decay = nan", r"objective\.decay"),
        "prefetch = 2": ("prefetch = 1000000000", r"data\.prefetch"),
    }
    for old, (new, message) in changes.items():
        assert old in good
        path.write_text(good.replace(old, new, 1))
        read_toml(path)
        with pytest.raises(e3.UserError, match=rf"config\.toml: {message}"):
            begun_settings(begun.out)


@pytest.mark.parametrize("name", ["best", "skipped", "in_a_row", "waited", "uncounted", "other"])
def test_values_of_the_loop_are_checked(begun, name):
    path = begun.out / "checkpoints/step-00000002"
    extra = json.loads((path / "meta.json").read_text())["extra"]
    for value in (None, [], {}, "x", True, -1, 10**30, *([1.5] if name != "best" else [])):
        rewrite_meta(path, extra=extra | {name: value})
        assert f"meta.json: extra.{name} is" in begun.refused()


# Two at once.


def test_second_training_into_a_folder_is_refused_and_harms_nothing(begun):
    with locked(begun.out):
        assert "another process is at work there" in begun.refused()
    assert begun.go_on() == []
    assert begun.is_whole


def test_report_of_a_run_that_goes_on(begun, tmp_path):
    """Written after each step, while the run's folder is held."""
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "train")
    begun = begun._replace(out=begun.out.rename(tmp_path / "train"))
    seen = []

    def report(row: dict[str, Any], total: int) -> None:
        write_report(tmp_path)
        seen.append(row["step"])

    train_in(begun.out, begun.problem, events=Events(on_step=report))
    assert seen == [3, 4]
    assert begun.is_whole


def test_features_that_are_rewritten_end_the_run_at_their_next_sample(begun, tmp_path):
    """By those of another target, of the same names and sizes; the last good state is kept."""
    config = begun.problem.config
    folder = shutil.copytree(begun.problem.features.folder, tmp_path / "features")
    data = replace(config.data, prefetch=0)
    problem = begun.problem._replace(
        config=replace(config, data=data), features=open_features(folder)
    )

    def rewrite(row: dict[str, Any], total: int) -> None:
        lengths = (*LENGTHS, *HELD_OUT_LENGTHS)
        others = [supervised_sample(n, 50 + i, VOCAB, HIDDEN) for i, n in enumerate(lengths)]
        write_folder(folder, others, VOCAB, HIDDEN)

    with pytest.raises(e3.UserError) as caught:
        train_in(begun.out, problem, events=Events(on_step=rewrite))
    assert re.match(rf"{folder}/shard-\d+\.safetensors: its bytes have changed", str(caught.value))
    assert [row["step"] for row in rows(begun.out / "metrics.jsonl")] == [1, 2, 3]
    assert checkpoints(begun.out / "checkpoints")[-1].name == "step-00000003"
    assert begun.go_on() == ["data.prefetch: 2, was 0"]
    assert begun.is_whole


# Faults of the disk.


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_in_the_rows_names_the_file_and_loses_nothing(begun, monkeypatch):
    """The room is used up in the middle of the last row."""

    def append(path: Path, row: dict[str, Any]) -> None:
        room = path.stat().st_size + 100 if row["step"] == STEPS else 2**30
        with files_of_at_most(room):
            append_row(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_row", append)
        assert f"{begun.out}/metrics.jsonl" in begun.refused()
    assert len(begun.lines("metrics.jsonl")) == STEPS - 1
    assert checkpoints(begun.out / "checkpoints")[-1].name == "step-00000003"
    assert begun.go_on() == []
    assert begun.is_whole
