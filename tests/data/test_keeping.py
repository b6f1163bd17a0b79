"""Features that are kept as they pass: in which folder, when they are on the disk, each once."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Sample
from eagle3fn.commands.online import kept_features
from eagle3fn.data import keeping as module
from eagle3fn.data.features import FeatureSet, open_features, read_sample
from eagle3fn.data.keeping import Keeper, keeping
from eagle3fn.data.on_demand import OnlineSamples, Widths
from eagle3fn.data.online import MadeFrom, sample_set
from eagle3fn.data.samples import Encoded
from tests.factories import make_config, supervised_sample

SAMPLES = 8
HELD_OUT = 2
HIDDEN = 16
VOCAB = 300


def sample(number: int) -> Sample:
    found = supervised_sample(6, number, VOCAB, HIDDEN)
    states = {name: getattr(found, name).bfloat16() for name in ("aux_hidden", "last_hidden")}
    return found._replace(**states)


def features(fingerprint: str = "this") -> FeatureSet:
    rows = [
        Encoded(f"row{number}", sample(number).input_ids, sample(number).token_mask)
        for number in range(SAMPLES)
    ]
    target = {
        "name": "tiny",
        "config_hash": "0",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "aux_layers": [1, 2, 4],
    }
    online = OnlineSamples(rows, None, Widths(3, HIDDEN, torch.bfloat16))
    made_from = MadeFrom("rows", fingerprint, {"max_length": 128, "remaining": 0})
    return sample_set(rows, target, online, made_from)


@contextmanager
def kept(folder: Path, world: World = World()) -> Iterator[Keeper]:  # noqa: B008
    with keeping(folder, features(), HELD_OUT, world) as keeper:
        yield keeper


def passing(keeper: Keeper, *numbers: int) -> None:
    keeper.passed(numbers, [sample(number) for number in numbers])


def numbers_in(folder: Path) -> list[int]:
    return [int(entry["key"]) for entry in open_features(folder).samples]


# The folder


def test_a_folder_with_anything_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is not of a feature folder"):
        kept(tmp_path).__enter__()
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_kept_folder_goes_on_whatever_is_hidden_in_it(tmp_path):
    with kept(tmp_path / "kept") as keeper:
        passing(keeper, 3)
        keeper.finish()
    (tmp_path / "kept/.nfs0001").touch()
    with kept(tmp_path / "kept") as keeper:
        passing(keeper, 3, 1)
        assert "2 of 8 samples kept" in keeper.finish()
    assert numbers_in(tmp_path / "kept") == [3, 1]


def test_features_of_other_settings_are_refused(tmp_path):
    with kept(tmp_path) as keeper:
        passing(keeper, 3)
        keeper.finish()
    other = keeping(tmp_path, features("other"), HELD_OUT, World())
    with pytest.raises(UserError, match=r"shard-00000\.json: of other conversations"):
        other.__enter__()


def test_where_no_folder_can_be_made_that_is_said(tmp_path, monkeypatch):
    """As in /proc, where also the parent is there; it is no other process's work."""

    def refuse(path: Any, *_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=r"new: no folder can be made there \(No such file"):
        kept(tmp_path / "new").__enter__()


# What is on the disk


def test_what_passed_before_settle_outlives_a_kill(tmp_path):
    """The samples of a shard that is not full are in memory alone until then."""
    with kept(tmp_path) as keeper:
        passing(keeper, 3, 6)
        keeper.settle()
        passing(keeper, 4)
    with kept(tmp_path) as keeper:
        assert keeper.kept == {3, 6}
        passing(keeper, 4)
        keeper.finish()
    assert numbers_in(tmp_path) == [3, 4, 6]
    for place, number in enumerate((3, 4, 6)):
        assert equal(read_sample(open_features(tmp_path), place), sample(number))


def test_a_full_disk_loses_nothing_that_waits(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with kept(tmp_path / "kept") as keeper:
        passing(keeper, 3, 6)
        with monkeypatch.context() as patch:
            patch.setattr("eagle3fn.data.feature_writing.save_file", full)
            with pytest.raises(UserError, match=r"shard-00000\.safetensors: not written \(No sp"):
                keeper.settle()
        keeper.finish()
    assert numbers_in(tmp_path / "kept") == [3, 6]


# Ranks


class Ranks(World):
    """A rank of two in one process; the other one gives `other`."""

    other: Any = None

    def every(self, value: Any) -> list[Any]:
        values = [self.other, self.other]
        values[self.rank] = value
        return values

    def barrier(self) -> None:
        pass


def test_a_failure_of_another_rank_is_raised_here(tmp_path):
    world = Ranks(0, 2)
    with kept(tmp_path, world) as keeper:
        world.other = ([], "kept/shard-00001.safetensors: not written")
        with pytest.raises(UserError, match=r"rank 1: kept/shard-00001\.safetensors: not written"):
            keeper.settle()


def test_ranks_do_not_keep_what_others_have_kept_before_the_last_checkpoint(tmp_path):
    world = Ranks(0, 2)
    with kept(tmp_path, world) as keeper:
        world.other = ([4], None)
        keeper.settle()
        passing(keeper, 4, 5)
        keeper.flush()
        sidecar = json.loads((tmp_path / "shard-00000.json").read_text())
    assert [entry["key"] for entry in sidecar["samples"]] == ["5"]


def test_a_sample_that_two_ranks_have_kept_is_listed_once(tmp_path):
    for rank, numbers in enumerate([(3, 5), (5, 4)]):
        world = Ranks(rank, 2)
        world.other = ([], None)
        keeper = Keeper(tmp_path, features(), HELD_OUT, world)
        keeper.kept = set()
        passing(keeper, *numbers)
        keeper.flush()
    with kept(tmp_path) as keeper:
        assert "3 of 8 samples kept" in keeper.finish()
    assert numbers_in(tmp_path) == [3, 5, 4]
    for place, number in enumerate((3, 5, 4)):
        assert equal(read_sample(open_features(tmp_path), place), sample(number))


def test_a_full_shard_is_written_as_it_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_SHARD", 2)
    with kept(tmp_path) as keeper:
        passing(keeper, 1)
        assert not (tmp_path / "shard-00000.json").exists()
        passing(keeper, 2)
        assert (tmp_path / "shard-00000.json").exists()


def test_what_ended_the_run_comes_before_a_fault_of_keeping(monkeypatch, capsys):
    keeper = SimpleNamespace(finish=lambda: failing("no room"), flush=lambda: failing("no room"))
    monkeypatch.setattr(module, "keeping", lambda *_: nullcontext(keeper))
    config = make_config()
    for ranks in (1, 2):
        run = kept_features("kept", features(), config, World(0, ranks))
        with pytest.raises(UserError, match="a source is gone"), run:
            failing("a source is gone")
        assert "no room" in capsys.readouterr().out


def failing(text: str) -> None:
    raise UserError(text)
