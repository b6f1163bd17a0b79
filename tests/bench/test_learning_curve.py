"""The learning curve: which samples a size has, runs that are kept, and what is drawn of them."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import curve_runs, learning_curve
from bench.curve_runs import Part, first_samples, part_of
from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import DataConfig
from eagle3fn.base.types import Params
from eagle3fn.data.features import FeatureSet
from eagle3fn.train.run import Run
from tests.factories import make_draft
from tests.small_run import write_run


def features_of(*supervised: int) -> FeatureSet:
    samples = [{"supervised": count} for count in supervised]
    return FeatureSet(Path("features"), samples, {}, None, None, {})


def test_a_size_is_the_first_samples_that_reach_it():
    features = features_of(5, 4, 3, 2, 9)
    assert part_of(features, 1, held_out=2) == Part(1, 5)
    assert part_of(features, 5, held_out=2) == Part(1, 5)
    assert part_of(features, 6, held_out=2) == Part(2, 9)
    assert part_of(features, 12, held_out=2) == Part(3, 12)


@pytest.mark.parametrize("size", [13, 0])
def test_a_size_that_is_not_there_is_refused(size):
    """The held-out samples' tokens do not count."""
    with pytest.raises(UserError, match=rf"--sizes {size}: features has \d+ supervised tokens"):
        part_of(features_of(5, 4, 3, 2, 9), size, held_out=2)


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 3))
def test_every_epoch_has_the_first_samples_once(samples, more, seed):
    config = Config(make_draft(32, 64, 32), data=DataConfig(global_batch=1))
    order = first_samples(Part(samples, 0)).order
    numbers = [order(samples + more, config, place) for place in range(3 * samples)]
    for epoch in range(3):
        chosen = numbers[epoch * samples : (epoch + 1) * samples]
        assert Counter(chosen) == Counter(range(samples))


def row(side: str, size: int, seed: int, held_out: float, decoded: float) -> dict[str, Any]:
    return {
        "side": side,
        "size": size,
        "seed": seed,
        "supervised_tokens": size + 3,
        "held_out": held_out,
        "decoded": decoded,
    }


def test_curve_by_hand():
    rows = [row("ours", 20, 0, 2.0, 1.5), row("ours", 10, 0, 1.0, 1.25)]
    rows.append(row("ours", 20, 1, 3.0, 1.75))
    found = learning_curve.curve(rows)
    assert found == {
        "ours": {
            "held_out": [
                {"supervised_tokens": 13, "mean": 1.0, "least": 1.0, "largest": 1.0},
                {"supervised_tokens": 23, "mean": 2.5, "least": 2.0, "largest": 3.0},
            ],
            "decoded": [
                {"supervised_tokens": 13, "mean": 1.25, "least": 1.25, "largest": 1.25},
                {"supervised_tokens": 23, "mean": 1.625, "least": 1.5, "largest": 1.75},
            ],
        }
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("curve"))


class Calls:
    """A stand-in for SpecForge's training, which leaves the draft as it starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[list[int], int, float]] = []
        monkeypatch.setattr(learning_curve, "load_oracle", lambda commit: SimpleNamespace())
        monkeypatch.setattr(learning_curve, "about", lambda oracle: {"oracle": "a stand-in"})
        monkeypatch.setattr(curve_runs, "train_specforge", self.train)
        monkeypatch.setattr(curve_runs, "train", self.ours)
        self.own = 0

    def train(self, oracle: Any, run: Run, params: Params, steps: int) -> tuple[Params, Any]:
        self.trained.append((run.train, steps, run.config.optimizer.learning_rate))
        return params, {}

    def ours(self, *args: Any, **options: Any) -> Any:
        self.own += 1
        from eagle3fn.train.loop import train

        return train(*args, **options)


def call(monkeypatch: pytest.MonkeyPatch, small: Path, out: Path, *words: object) -> None:
    (small / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    arguments = ["--target", small / "target", "--features", small / "features"]
    arguments += ["--vocab", small / "vocab.safetensors", "--prompts", small / "prompts.jsonl"]
    arguments += ["--epochs", 1, "--held-out", 2, "--tasks", 1, "--max-new", 4, "--out", out]
    arguments += ["--draft-length", 2]
    monkeypatch.setattr("sys.argv", ["learning_curve.py", *map(str, [*arguments, *words])])
    learning_curve.main()


def test_runs_are_kept_and_more_sizes_added(small: Path, tmp_path, monkeypatch, capsys):
    out = tmp_path / "curve"
    calls = Calls(monkeypatch)
    call(monkeypatch, small, out, "--sizes", 10, "--specforge-rate", 0.002)
    assert calls.own == 1
    ((numbers, steps, rate),) = calls.trained
    assert (steps, rate) == (len(numbers), 0.002)
    result = json.loads((out / "result.json").read_text())
    assert [one["side"] for one in result["runs"]] == ["ours", "specforge"]
    for one in result["runs"]:
        assert one["samples"] == len(numbers)
        assert one["steps"] == steps
        assert one["supervised_tokens"] >= 10
        assert one["held_out"] >= 1 and one["decoded"] >= 1
        assert one["lossless"] is True
    assert result["oracle"] == "a stand-in"
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("held out ") == 2

    # The finished runs are read, the new size is trained.
    call(monkeypatch, small, out, "--sizes", 40, 10, "--specforge-rate", 0.002)
    assert (calls.own, len(calls.trained)) == (2, 2)
    assert len(calls.trained[1][0]) > len(numbers)
    again = json.loads((out / "result.json").read_text())
    assert again["runs"][:2] == result["runs"]
    assert [one["size"] for one in again["runs"]] == [10, 10, 40, 40]

    # Other settings would be another curve.
    with pytest.raises(UserError, match=r"settings\.json: the folder holds runs with other set"):
        call(monkeypatch, small, out, "--sizes", 10)


def test_impossible_settings_are_refused_before_anything_is_written(small, tmp_path, monkeypatch):
    Calls(monkeypatch)
    with pytest.raises(UserError, match="--sizes 1000000: "):
        call(monkeypatch, small, tmp_path / "curve", "--sizes", 10, 1000000)
    with pytest.raises(UserError, match="--epochs = 0: must be at least 1"):
        call(monkeypatch, small, tmp_path / "curve", "--epochs", 0)
    assert not (tmp_path / "curve").exists()
