"""`bench.online`: its sides train the same updates, and its numbers are their times."""

import json
import subprocess
import sys
from argparse import Namespace

from bench import online
from bench.memory import status
from bench.online import Rounds, Trained, summary
from bench.online_memory import memory_of_all
from tests.factories import write_talks
from tests.small_run import write_run


def test_rates_and_ratios_by_hand():
    offline = [Trained(tokens=100, seconds=2.0, updating=1.5, first_wait=0.5)]
    offline.append(Trained(100, 1.0, 1.0, 0.5))
    here = [Trained(tokens=100, seconds=4.0, updating=3.0, first_wait=1.0)]
    here.append(Trained(100, 2.0, 1.0, 2.0))
    found = summary(Rounds([50.0, 100.0], {"offline": offline, "here": here}))
    assert found["tokens_per_second"] == {
        "extract": {"by_round": [50.0, 100.0], "median": 75.0},
        "train": {"by_round": [50.0, 100.0], "median": 75.0},
        "extract_and_train": {"by_round": [25.0, 50.0], "median": 37.5},
    }
    side = found["sides"]["here"]
    assert side["tokens_per_second"] == {"by_round": [25.0, 50.0], "median": 37.5}
    assert side["waited"] == {"by_round": [0.25, 0.5], "median": 0.375}
    assert side["first_wait"] == {"by_round": [1.0, 2.0], "median": 1.5}
    assert side["ratio"]["train"] == {"by_round": [0.5, 0.5], "median": 0.5}
    assert side["ratio"]["extract_and_train"] == {"by_round": [1.0, 1.0], "median": 1.0}


def test_sides_train_the_same_tokens(tmp_path, monkeypatch, capsys):
    world = write_run(tmp_path)
    capsys.readouterr()
    words = ["--target", world / "target", "--conversations", world / "talks.jsonl"]
    words += ["--vocab", world / "vocab.safetensors", "--batch", 2, "--rounds", 1]
    words += ["--sides", "here narrow", "here", "--dtype", "float32"]
    words += ["--out", tmp_path / "result.json"]
    monkeypatch.setattr(sys, "argv", ["online", *map(str, words)])
    monkeypatch.setattr(online, "OURS_ALONE", ())  # the tests after this one need these variables
    assert online.main() == 0

    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    sides = result["sides"]
    assert set(sides) == {"offline", "here narrow", "here"}
    assert len({tuple(side["tokens"]) for side in sides.values()}) == 1
    assert all(0 < side["waited"]["median"] < 1 for side in sides.values())
    assert result["updates"] == {"here": 5}


def test_memory_is_read_from_the_training_processes(tmp_path):
    world = write_run(tmp_path)
    options = Namespace(
        target=str(world / "target"),
        conversations=str(write_talks(tmp_path / "many.jsonl", 30)),
        vocab=str(world / "vocab.safetensors"),
        threads=1,
        kinds=["float32"],
        samples=220,
    )
    found = memory_of_all(options)
    assert found["samples"] == 220
    for side in ("files", "online"):
        first, last = found["kinds"]["float32"][side]
        assert 200 <= first["samples"] <= last["samples"] <= 220
        assert 2**26 < first["memory"] < 2**32


def test_status_is_that_of_the_process_that_is_named():
    with subprocess.Popen(["sleep", "60"]) as process:
        other = status("VmRSS", process.pid)
        process.kill()
    assert 0 < other < 2**25 < status("VmRSS")
