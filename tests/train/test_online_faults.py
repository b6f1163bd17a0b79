"""`train --online` whose sources answer wrongly, or are killed, as its trainers are."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.draft_config import aux_layers
from eagle3fn.cli import main
from eagle3fn.data.encode import encode_all
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.target import load_target
from eagle3fn.engines.vllm_process import taps_of
from tests import kill_online
from tests.engines.made_rows import Made, stand_in, write_answers
from tests.factories import make_draft, talk, tiny_template
from tests.small_run import write_run
from tests.train.run_files import rows

STEPS = 9
CUT = 128
BEFORE = 26  # rows that the engine gives before: enough for three updates


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny target, a map, 24 different conversations, and what a right vLLM gives of them."""
    root = write_run(tmp_path_factory.mktemp("world"))
    talks = []
    for number in range(24):
        turns = talk("q" * (1 + number % 5), "answer " * (1 + number % 7))
        talks.append(json.dumps({"id": f"row{number}", "conversations": turns}) + "\n")
    (root / "many.jsonl").write_text("".join(talks))

    model, _ = load_target(root / "target", torch.float32)
    layers = aux_layers(make_draft(16, 300, 256), 7)
    encoded = list(encode_all(SampleMaker(tiny_template(), CUT), root / "many.jsonl", 300))
    made = Made(root / "target", root / "many.jsonl", model, encoded, taps_of(layers, 7))
    write_answers(made, root / "answers")
    return root


def train(world: Path, out: Path) -> int:
    arguments = ["--target", world / "target", "--online", world / "many.jsonl", "--out", out]
    arguments += ["--vocab", world / "vocab.safetensors", "--max-length", CUT, "--threads", 1]
    arguments += ["--engine", "vllm", "--engine-python", sys.executable, "--check", "logits"]
    arguments += ["--dtype", "float32", "--batch-tokens", 1]
    for setting in (
        f"train.steps={STEPS}",
        "train.eval_every=100",
        "train.checkpoint_every=100",
        "data.held_out=2",
        "data.global_batch=2",
        "objective.ttt_length=2",
    ):
        arguments += ["--set", setting]
    return main(["train", *map(str, arguments)])


def without_names(tensors):
    return {"states": tensors["hidden_states"], "token_ids": tensors["token_ids"]}


def with_states(change):
    return lambda tensors: {**tensors, "hidden_states": change(tensors["hidden_states"])}


def with_nan(states):
    states[2, 1, 3] = torch.nan
    return states


WRONG = {
    "taps": (with_states(lambda states: states[:, 1:]), "it must run with"),
    "width": (with_states(lambda states: states[:, :, :-1]), "have shape"),
    "names": (without_names, "states of shape None"),
    "zeros": (with_states(torch.zeros_like), "all zero at"),
    "nan": (with_states(with_nan), "not finite"),
    "ids": (lambda tensors: {**tensors, "token_ids": tensors["token_ids"] + 1}, "token 0 is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_row_ends_the_run_with_one_line_after_what_was_trained_is_saved(
    world, tmp_path, monkeypatch, capsys, name
):
    change, named = WRONG[name]
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in (world / "answers").glob("*.safetensors"):
        tensors = {key: value.contiguous() for key, value in change(load_file(path)).items()}
        save_file(tensors, wrong / path.name)
    stand_in(
        tmp_path / "programs", world / "answers", monkeypatch, rows=BEFORE, wrong_files=str(wrong)
    )

    out = tmp_path / "run"
    assert train(world, out) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("eagle3fn train: vLLM"), last
    assert named in last

    steps = [row["step"] for row in rows(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert 1 <= len(steps) < STEPS
    assert [each.name for each in (out / "checkpoints").glob("step-*")] == [
        f"step-{len(steps):08d}"
    ]


def test_run_survives_the_kill_of_a_source_and_of_the_trainer(tmp_path):
    (cycle,) = kill_online.run_cycles(2, random.Random(5), tmp_path, ranks=(1,))
    assert len(cycle.kills) == 2
    steps = {kill.victim: kill.step for kill in cycle.kills}
    assert steps.keys() == {"source", "trainer"}
    assert steps["trainer"] > 3  # the first checkpoint is there: the second call resumes
    assert cycle.calls == 2
    assert cycle.equal
    assert (cycle.lost, cycle.repeated, cycle.left, cycle.running) == (0, 0, [], 0)
