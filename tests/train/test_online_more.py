"""`train --online` on full disks, killed with kept features, and under every option of `train`."""

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eagle3fn import cli
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Sample
from eagle3fn.data import sample_file
from eagle3fn.data.encode import encode_all
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.on_demand import OnlineSamples, Widths
from eagle3fn.data.samples import Encoded, SampleMaker
from eagle3fn.data.source_pool import Pool, Source
from eagle3fn.data.sources import model_source
from eagle3fn.data.stages import Item, Share
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.template import ChatTemplate
from eagle3fn.engines.transformers_process import TransformersProcess
from eagle3fn.train import loop
from tests.small_run import write_run
from tests.stages import leftovers
from tests.train.forked import Ranks
from tests.train.run_files import same_end

PATIENCE_S = 60.0
SETTINGS = (
    "train.steps=7",
    "train.eval_every=3",
    "train.checkpoint_every=2",
    "data.held_out=2",
    "data.global_batch=2",
    "objective.ttt_length=2",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny target, ten conversations, a map, and an offline run on features extracted alone."""
    folder = write_run(tmp_path_factory.mktemp("world"))
    arguments = ["--target", str(folder / "target"), "--conversations", str(folder / "talks.jsonl")]
    arguments += ["--out", str(folder / "alone"), "--max-length", "128", "--batch-tokens", "1"]
    assert cli.main(["extract", *arguments, "--threads", "1"]) == 0
    assert cli.main(offline(folder, folder / "offline")) == 0
    return folder


def common(world: Path, out: Path) -> list[str]:
    arguments = ["train", "--target", str(world / "target"), "--out", str(out), "--threads", "1"]
    arguments += ["--vocab", str(world / "vocab.safetensors")]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    return arguments


def offline(world: Path, out: Path, *more: str) -> list[str]:
    return [*common(world, out), "--features", str(world / "alone"), *more]


def online(world: Path, out: Path, *more: str) -> list[str]:
    arguments = [*common(world, out), "--online", str(world / "talks.jsonl")]
    return [*arguments, "--max-length", "128", "--batch-tokens", "1", *more]


def generated(world: Path, out: Path, *more: str) -> list[str]:
    arguments = [*common(world, out), "--online", str(world / "talks.jsonl"), "--generate"]
    return [*arguments, "--max-length", "128", "--max-new", "6", "--temperature", "1", *more]


def settings(*texts: str) -> tuple[str, ...]:
    return tuple(part for text in texts for part in ("--set", text))


def forked(
    arguments: list[str], log: Path, before: Callable[[], Any] = lambda: None, ranks: int = 1
) -> list[int | None]:
    """Exit codes of the command's ranks, in processes of their own which call `before` first."""

    def work(rank: int) -> int:
        before()
        return cli.main(arguments)

    return Ranks(work, ranks, log).wait(PATIENCE_S)


def killed_before_update(number: int) -> Callable[[], None]:
    """Kill this process in the middle of a training."""

    def before() -> None:
        schedule = loop.schedule_of

        def dying(*arguments: Any) -> Any:
            rate = schedule(*arguments)

            def at(step: int) -> Any:
                if step + 1 == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return rate(step)

            return at

        loop.schedule_of = dying  # of this process alone

    return before


# Full disks


def test_no_room_for_tokens_names_the_folder_of_temporary_files(
    world, tmp_path, capsys, monkeypatch
):
    with open("/dev/full", "w+b") as full, monkeypatch.context() as patch:
        patch.setattr(sample_file, "tempfile", SimpleNamespace(TemporaryFile=lambda: full))
        assert cli.main(online(world, tmp_path / "run")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tempfile.gettempdir()}: not written (No space left on device); make room" in said
    assert "let TMPDIR name a folder on another disk" in said
    assert not list(tmp_path.iterdir())


def test_states_that_a_source_cannot_write_are_named(world, tmp_path):
    """Its process writes them; the folder that they go to is gone here."""
    log = tmp_path / "log"
    process = TransformersProcess(
        sys.executable, world / "target", (1, 2, 3), log, max_length=128, threads=1
    )
    with process, pytest.raises(UserError) as caught:
        process._folder.rmdir()
        list(process.rows([[1, 2, 3]], False))
    said = str(caught.value)
    assert said.startswith(f"transformers: {process._folder}/0.safetensors: not written (No such")
    assert "let TMPDIR name a folder on another disk" in said


def test_no_room_for_kept_features_ends_the_run_which_goes_on_with_room(
    world, tmp_path, monkeypatch, capsys
):
    arguments = online(world, tmp_path / "run", "--keep", str(tmp_path / "kept"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("eagle3fn.data.feature_writing.save_file", full)
        assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "kept/shard-00000.safetensors: not written (No space left on device); make room" in said
    assert not leftovers(tmp_path)

    assert cli.main(arguments) == 0
    assert same_end(world / "offline", tmp_path / "run", 7)
    assert_all_kept(world, tmp_path / "kept")


# Kept features


def assert_all_kept(world: Path, folder: Path) -> None:
    """The folder has each sample of the world once, the held-out ones last, with its bits."""
    kept = open_features(folder)
    alone = open_features(world / "alone")
    numbers = [int(entry["key"]) for entry in kept.samples]
    assert sorted(numbers) == list(range(10))
    assert numbers[-2:] == [8, 9]
    for place, number in enumerate(numbers):
        assert equal(read_sample(kept, place), read_sample(alone, number))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_loses_no_kept_sample_that_was_trained_on(world, tmp_path, ranks):
    """Four updates are an epoch: what is not kept by then will not pass again in this run."""
    keep = ("--keep", str(tmp_path / "kept"), "--set", "train.steps=4")
    arguments = online(world, tmp_path / "run", *keep, "--set", "data.prefetch=0")
    codes = forked(arguments, tmp_path / "killed", killed_before_update(4), ranks)
    assert -signal.SIGKILL in codes
    assert not (tmp_path / "kept/index.json").exists()
    assert forked(arguments, tmp_path / "again", ranks=ranks) == [0] * ranks
    assert_all_kept(world, tmp_path / "kept")


def test_features_are_kept_of_whichever_epoch_they_are_asked_for_in(world, tmp_path):
    arguments = online(world, tmp_path / "run", "--set", "train.steps=8")
    assert cli.main([*arguments, "--max-steps", "5"]) == 0
    assert cli.main([*arguments, "--keep", str(tmp_path / "kept")]) == 0
    numbers = [int(entry["key"]) for entry in open_features(tmp_path / "kept").samples]
    assert len(set(numbers)) == len(numbers) == 8  # three updates, and the held-out ones


# Held-out samples


def test_held_out_samples_are_computed_once_as_far_as_they_fit(world):
    """What is in memory comes at its place, among what is asked for again."""
    model, tokenizer = load_target(str(world / "target"), torch.float32)
    source = model_source(model, (1, 3, 5))
    template = ChatTemplate(tokenizer, stop_ids(model, tokenizer), {})
    known = encode_all(SampleMaker(template, 128), world / "talks.jsonl", 300)
    asked: list[str] = []

    def counting(rows: Sequence[Encoded], dtype: torch.dtype) -> list[Sample]:
        asked.extend(row.id for row in rows)
        return source.features(rows, dtype)

    counted = source._replace(features=counting)
    widths = Widths(3, model.config.hidden_size, torch.float32)
    with Pool([Source("here", lambda _: nullcontext(counted))]) as pool:
        samples = OnlineSamples(known, pool, widths)
        samples.fix([7, 8, 9])
        samples.buffer = sum(len(known[n].input_ids) for n in (7, 9)) * widths.bytes_per_token

        def rolled(*numbers: int) -> list[Sample]:
            shares = [Item(Share([[number]], []), number) for number in numbers]
            return [item.value.bins[0][0] for item in samples.load(iter(shares))]

        first = rolled(3, 7, 9, 8)
        again = rolled(9, 3, 7, 8)
        rolled(7, 9)
    assert asked == [known[n].id for n in (3, 7, 9, 8, 3, 8)]
    assert equal(again, [first[place] for place in (2, 0, 1, 3)])


def test_more_evaluations_ask_for_no_more_samples(world, tmp_path, capsys):
    counts = []
    for every in (2, 7):
        more = settings(f"train.eval_every={every}")
        assert cli.main(online(world, tmp_path / f"run{every}", *more)) == 0
        printed = capsys.readouterr()
        counts += re.findall(r"(\d+) samples rolled out", printed.out + printed.err)
    assert len(counts) == 2
    assert counts[0] == counts[1]


# Options of training


PACKED = ("--set", "data.max_length=128", "--set", "data.pack_tokens=160")


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_answers_are_those_of_a_run_left_alone_after_a_kill(world, tmp_path, ranks):
    whole = generated(world, tmp_path / "whole", *PACKED, "--set", "train.reduce=tree")
    parts = generated(world, tmp_path / "parts", *PACKED, "--set", "train.reduce=tree")
    assert forked(whole, tmp_path / "log", ranks=ranks) == [0] * ranks
    codes = forked(parts, tmp_path / "killed", killed_before_update(4), ranks)
    assert -signal.SIGKILL in codes
    assert forked(parts, tmp_path / "again", ranks=ranks) == [0] * ranks
    assert same_end(tmp_path / "whole", tmp_path / "parts", 7)
    assert not leftovers(tmp_path)


PATIENT = ("train.eval_every=1", "train.steps=9")
CALLS = {
    "patience": [
        settings("train.patience=1", *PATIENT),
        settings("train.patience=3", *PATIENT),
    ],
    "steps": [
        (*settings("train.steps=0", "train.epochs=1"), "--max-steps", "3"),
        settings("train.steps=0", "train.epochs=2"),
    ],
    "recipe": [("--recipe", "specforge")],
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_end_as_they_do_on_files(world, tmp_path, name):
    for more in CALLS[name]:
        assert cli.main(offline(world, tmp_path / "offline", *more)) == 0
        assert cli.main(online(world, tmp_path / "online", *more)) == 0
    last = max((tmp_path / "offline/checkpoints").iterdir()).name
    assert same_end(tmp_path / "offline", tmp_path / "online", int(last.removeprefix("step-")))


def test_other_taps_are_those_of_the_draft(world, tmp_path):
    """Features of other layers are computed online, where a folder has its own alone."""
    tree = json.loads((world / "offline/draft/config.json").read_text())
    tree["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [1, 4, 5]
    del tree["eagle_aux_hidden_state_layer_ids"]
    (tmp_path / "draft.json").write_text(json.dumps(tree))
    more = ("--draft-config", str(tmp_path / "draft.json"))
    taps = ["--draft-config", str(tmp_path / "draft.json")]
    arguments = ["--target", str(world / "target"), "--conversations", str(world / "talks.jsonl")]
    arguments += ["--out", str(tmp_path / "f"), "--max-length", "128", "--batch-tokens", "1"]
    assert cli.main(["extract", *arguments, "--threads", "1", *taps]) == 0
    on_files = [*common(world, tmp_path / "offline"), "--features", str(tmp_path / "f"), *more]
    assert cli.main(on_files) == 0
    assert cli.main(online(world, tmp_path / "online", *more)) == 0
    assert same_end(tmp_path / "offline", tmp_path / "online", 7)


def test_runs_go_on_from_runs_on_files_and_back(world, tmp_path):
    """A folder's features count as others than those computed: the data begins anew."""
    more = ("--set", "train.steps=6")
    for name, kind in (("online", online), ("offline", offline)):
        assert cli.main(kind(world, tmp_path / name, "--max-steps", "3")) == 0
    for name, kind in (("online", online), ("offline", offline)):
        for source in ("online", "offline"):
            begin = ("--from", str(tmp_path / source), *more)
            assert cli.main(kind(world, tmp_path / f"{source}-{name}", *begin)) == 0
    assert same_end(tmp_path / "offline-offline", tmp_path / "online-online", 6)
    assert same_end(tmp_path / "offline-online", tmp_path / "online-offline", 6)
