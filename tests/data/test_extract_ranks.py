"""Extraction on several ranks: killed and resumed on any number to the files of one; refusals."""

import json

import pytest

from tests.factories import tiny_model, tiny_tokenizer, write_talks
from tests.train.start_ranks import run_job, torchrun

TALKS = 20  # seven shards of the job

WITHIN_S = 20
"""From a kill to the end of all ranks; 3 and less on a machine that is not busy."""


def write_world(folder):
    tiny_model(num_hidden_layers=5).save_pretrained(folder / "target")
    tiny_tokenizer().save_pretrained(folder / "target")
    write_talks(folder / "talks.jsonl", TALKS)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("ranks"))
    run_job("tests.data.extract_ranks_job", folder)
    return json.loads((folder / "results.json").read_text())


def test_two_ranks_write_the_files_of_one(results):
    assert results["one"]["codes"] == [0] and results["two"]["codes"] == [0, 0], results["two"]
    assert len(results["whole"]) == 16  # seven shards, their sidecars, index and hashes
    assert results["of_two"] == results["whole"]
    assert results["two"]["text"][1] == ""  # rank 0 alone prints
    assert results["two"]["runs"] == [4, 3]  # a run of the target for each shard


def test_killed_ranks_are_resumed_on_any_number_to_the_files_of_one(results):
    for cycle in results["cycles"]:
        assert cycle["again"]["codes"] == [0] * len(cycle["again"]["codes"]), cycle["again"]
        assert cycle["contents"] == results["whole"]
        assert 2 <= len(cycle["kept"]) < 7
        for name, time in cycle["kept"].items():
            assert cycle["later"][name] == time  # not made again


def test_a_killed_rank_ends_the_others_soon(results):
    for cycle in results["cycles"][:2]:
        assert sorted(cycle["codes"])[0] == -9 and all(cycle["codes"]), cycle["codes"]
        assert cycle["seconds"] < WITHIN_S
        assert "Traceback" not in "".join(cycle["text"])


def test_ranks_hold_the_folder_together_against_another_program(results):
    (text,) = results["other"]["text"]
    assert results["other"]["codes"] == [2]
    assert "held: another process is at work there" in text and text.count("\n") == 1
    assert results["held"] == [0, 0]
    assert results["of_held"] == results["whole"]


def test_time_that_ends_leaves_a_complete_folder_of_the_first_shards(results):
    text = results["short"]["text"][0]
    assert results["short"]["codes"] == [0, 0], text
    assert "9 samples" in text and f"{TALKS - 9} left for a call with more time" in text
    shards = [name for name in results["of_short"] if name.endswith("safetensors")]
    assert shards == [f"shard-0000{number}.safetensors" for number in (0, 1, 2, 4, 6)]
    assert results["short_again"]["runs"] == [2]
    assert results["short_again"]["codes"] == [0]
    assert results["of_short_again"] == results["whole"]


def test_size_is_said_before_the_target_runs(results):
    text = results["one"]["text"][0]
    assert f"whole: {TALKS} samples, " in text
    assert " MiB of features; " in text and "are free on the disk" in text
    again = results["cycles"][0]["again"]["text"][0]
    assert " MiB of it there; " in again


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("threads", "threads is 1 on rank 0, 2 on rank 1; start all ranks alike"),
        ("bad_row", "talks.jsonl: 1 of 1 rows is bad"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_line_once(results, name, message):
    found = results[name]
    assert all(found["codes"])
    lines = "".join(found["text"]).splitlines()
    assert sum(message in line for line in lines) == 1, lines
    assert not any("Traceback" in line for line in lines)
    assert not results["refused_exists"]


def test_torchrun_extracts(tmp_path):
    write_world(tmp_path)
    command = ["-m", "eagle3fn.cli", "extract", "--target", tmp_path / "target"]
    command += [
        "--conversations",
        tmp_path / "talks.jsonl",
        "--max-length",
        90,
        "--aux-layers",
        "0,1,3",
    ]
    ended = torchrun(2, *command, "--out", tmp_path / "out", "--dtype", "float32")
    assert ended.codes == [0], ended.text
    assert f"out: {TALKS} samples, " in ended.text
    assert (tmp_path / "out/index.json").is_file()
