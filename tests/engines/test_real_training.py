"""Training on vLLM's own features: what a run of the stored ones would be, and near transformers'.

vLLM's bits depend on what it computes together, and are not promised. So the features that passed
online are stored and trained on again, bit for bit; with transformers' they agree to rounding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Sample
from eagle3fn.cli import main
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features
from eagle3fn.data.online import features_of
from eagle3fn.data.pipeline import batches
from eagle3fn.data.samples import Encoded
from eagle3fn.data.vocab import build_map
from eagle3fn.engines.vllm_process import VllmProcess
from tests.engines.made_rows import CUT, LAYERS, Made, make_target
from tests.factories import tiny_template
from tests.serving import python_of
from tests.train.run_files import rows

pytestmark = pytest.mark.engines

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # no heads of 8 on a CPU
STEPS = 4
SIZE = 256  # the draft vocabulary's: it has most of the choices of the target's 300 tokens


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def problem(made: Made) -> tuple[e3.Config, Any]:
    """A configuration of one pass over the rows, and its functions."""
    draft = draft_config_from_target(made.model.config.to_dict(), "tiny", SIZE)
    config = e3.Config(
        draft,
        e3.ObjectiveConfig(ttt_length=3),
        e3.OptimizerConfig(learning_rate=1e-2),
        e3.DataConfig(global_batch=2, micro_batch=1),
        e3.TrainConfig(steps=STEPS, dtype="float32"),
    )
    counts = torch.stack([torch.bincount(row.input_ids, minlength=300) for row in made.rows])
    vocab = build_map(counts.sum(0), SIZE)
    frozen = e3.Frozen(
        embed_tokens=made.model.model.embed_tokens.weight,
        target_head=made.model.lm_head.weight,
        t2d=vocab.t2d,
        d2t=vocab.d2t,
        target_norm=made.model.model.norm.weight,
    )
    return config, e3.bind(config, frozen)


def test_online_updates_by_vllm_are_those_of_the_same_features_stored(tmp_path: Path) -> None:
    """Batches, metrics and states, through the pool that `train --online` has."""
    made = make_target(tmp_path, **WIDE)
    config, functions = problem(made)
    numbers = range(len(made.rows))
    passed: dict[str, Sample] = {}

    names = (python_of("vllm"), made.target, made.taps, tmp_path / "log")
    with VllmProcess(*names, max_length=CUT, dtype=torch.float32) as engine:
        source = engine_source(engine, made.target, LAYERS, check="hf")

        def recorded(group: Sequence[Encoded], stored: torch.dtype) -> list[Sample]:
            samples = source.features(group, stored)
            passed.update((row.id, one) for row, one in zip(group, samples, strict=True))
            return samples

        with features_of(source._replace(features=recorded), made.rows) as found:
            online = list(batches(found, numbers, config, 0, STEPS))
    assert len(passed) == len(numbers)

    # The samples that passed, written by `extract` and read.
    replay = source._replace(features=lambda group, stored: [passed[row.id] for row in group])
    out = tmp_path / "out"
    extract(replay, tiny_template(), made.talks, out, max_length=CUT, stored=torch.float32)
    offline = list(batches(open_features(out), numbers, config, 0, STEPS))
    assert equal(offline, online)

    left = right = functions.init_state(functions.init(0))
    for stored, computed in zip(offline, online, strict=True):
        left, left_metrics = functions.step(left, stored)
        right, right_metrics = functions.step(right, computed)
        assert equal(left, right)
        assert torch.equal(left_metrics["grad_norm"], right_metrics["grad_norm"])
        assert left_metrics["grad_norm"] > 0


def test_command_trains_by_vllm_as_by_transformers_to_rounding(tmp_path: Path) -> None:
    """Every update's loss, from the start on; and the run goes on where it ended."""
    made = make_target(tmp_path, **WIDE, num_hidden_layers=7, eos_token_id=1)
    talks = ["--max-length", CUT, "--dtype", "float32"]

    def call(command: str, *more: object) -> int:
        return main([command, "--target", str(made.target), *map(str, more)])

    features = tmp_path / "features"
    assert call("extract", "--conversations", made.talks, "--out", features, *talks) == 0
    vocab = tmp_path / "map"
    assert call("vocab", "--features", features, "--out", vocab, "--size", 64) == 0

    settings: list[object] = ["--vocab", vocab, "--threads", 1]
    for setting in (
        "train.steps=4",
        "train.dtype=float32",
        "train.eval_every=2",
        "data.global_batch=2",
        "data.held_out=2",
    ):
        settings += ["--set", setting]
    assert call("train", "--features", features, "--out", tmp_path / "here", *settings) == 0
    by = ["--engine", "vllm", "--engine-python", python_of("vllm"), "--check", "hf"]
    online = ["--online", made.talks, *talks, *by, "--out", tmp_path / "there", *settings]
    for calls in (1, 2):
        assert call("train", *online, "--max-steps", 2) == 0
        assert len(rows(tmp_path / "there/metrics.jsonl")) == 2 * calls

    ours = rows(tmp_path / "here/metrics.jsonl")
    theirs = rows(tmp_path / "there/metrics.jsonl")
    for one, other in zip(ours, theirs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-2)
