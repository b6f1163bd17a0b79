"""Training on vLLM's features: online and from files, in one call and in two, on two ranks.

A run on its stored features is what each is compared with, bit for bit. A stand-in answers in place
of vLLM; `test_real_training.py` has vLLM itself, `tests/train/test_online_run.py` other sources.
"""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eagle3fn.cli import main
from eagle3fn.engines.vllm_process import taps_of
from tests.engines.made_rows import CUT, make_target, stand_in, write_answers
from tests.train.run_files import rows, same_end, same_leaves
from tests.train.start_ranks import torchrun

TAPS = (1, 2, 3)  # the default ones of seven layers
STEPS = 6
SETTINGS = (
    f"train.steps={STEPS}",
    "train.eval_every=3",
    "train.checkpoint_every=2",
    "train.dtype=float32",
    "data.held_out=2",
    "data.global_batch=4",
    "data.micro_batch=2",
    "objective.ttt_length=3",
    "train.reduce=tree",
)

ROWS = ["--max-length", CUT, "--dtype", "float32"]
VLLM = ["--engine", "vllm", "--engine-python", sys.executable, "--check", "logits"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A target, conversations, a map, features by transformers and by vLLM, and a run on each."""
    root = tmp_path_factory.mktemp("world")
    made = make_target(root, 10, num_hidden_layers=7, eos_token_id=1)
    write_answers(made._replace(taps=taps_of(TAPS, 7)), root / "answers")
    for path in (root / "answers").glob("*.safetensors"):
        answer = load_file(path)
        states = answer["hidden_states"] * (1 + 2e-6)  # no engine has transformers' bits
        save_file(answer | {"hidden_states": states}, path)

    with pytest.MonkeyPatch.context() as patch:
        stand_in(root / "programs", root / "answers", patch)
        for name, options in (("here", []), ("vllm", VLLM)):
            extract = ["--conversations", root / "talks.jsonl", "--out", root / name]
            assert call(root, "extract", *extract, *ROWS, *options) == 0
    vocab = ["--features", root / "here", "--out", root / "map", "--size", 64]
    assert call(root, "vocab", *vocab) == 0
    for name in ("here", "vllm"):
        assert train(root, root / f"run-{name}", "--features", root / name) == 0
    return root


def call(root: Path, command: str, *arguments: object) -> int:
    """`eagle3fn COMMAND --target …` in this process; its exit code."""
    return main([command, "--target", str(root / "target"), *map(str, arguments)])


def places(root: Path, out: Path, *more: object) -> list[object]:
    """The arguments of `train` but the target and what is trained on."""
    found: list[object] = ["--vocab", root / "map", "--out", out, "--threads", 1]
    for setting in SETTINGS:
        found += ["--set", setting]
    return [*found, *more]


def train(root: Path, out: Path, *more: object) -> int:
    return call(root, "train", *places(root, out), *more)


@pytest.fixture
def online(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The options that put conversations in place of a folder, and the stand-in in vLLM's."""
    stand_in(world / "programs", world / "answers", monkeypatch)
    return ["--online", world / "talks.jsonl", *ROWS, *VLLM]


def test_online_training_has_the_bits_of_training_on_stored_features(world, tmp_path, online):
    """Every leaf of the last state, the rows of all updates and of all evaluations."""
    assert train(world, tmp_path / "run", *online) == 0
    assert same_end(tmp_path / "run", world / "run-vllm", STEPS)


def test_features_that_differ_by_rounding_give_another_state(world):
    """The control: what is compared depends on the features' last bits."""
    last = f"checkpoints/step-{STEPS:08d}"
    assert not same_leaves(world / "run-here" / last, world / "run-vllm" / last)


def test_online_training_in_two_calls_has_the_bits_of_one(world, tmp_path, online):
    """It ends between two checkpoints; the rest has the groups that the whole would have."""
    run = tmp_path / "run"
    assert train(world, run, *online, "--max-steps", 3) == 0
    assert len(rows(run / "metrics.jsonl")) == 3

    assert train(world, run, *online) == 0
    assert same_end(run, world / "run-vllm", STEPS)


def test_training_on_stored_features_in_two_calls_has_the_bits_of_one(world, tmp_path):
    run = tmp_path / "run"
    features = ["--features", world / "vllm"]
    assert train(world, run, *features, "--max-steps", 3) == 0
    assert len(rows(run / "metrics.jsonl")) == 3

    assert train(world, run, *features) == 0
    assert same_end(run, world / "run-vllm", STEPS)


def test_two_ranks_train_on_stored_features_as_one(world, tmp_path):
    command = ["-m", "eagle3fn.cli", "train", "--target", world / "target"]
    where = places(world, tmp_path / "run", "--features", world / "vllm")
    ended = torchrun(2, *command, *where)
    assert ended.codes == [0], ended.text
    assert same_end(tmp_path / "run", world / "run-vllm", STEPS)
