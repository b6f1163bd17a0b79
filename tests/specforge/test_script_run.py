"""SpecForge's script's arguments on our side: which are taken, what they mean, and runs by them."""

import ast
import math
import os
import subprocess
import sys
from argparse import Action, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import recipe_step
from bench.recipe_step import DRAFT, recipe_config
from eagle3fn import specforge
from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.errors import UserError
from eagle3fn.specforge import compare_runs, script
from eagle3fn.specforge.oracle import Oracle, OracleMissingError
from tests.specforge.script_data import TINY, script_arguments, write_data

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--target-model-path", "t", "--train-data-path", "c", "--output-dir", "o"]
OFFLINE = [*NEEDED, "--train-hidden-states-path", "f"]


def options(*more: str) -> Namespace:
    return script.parser().parse_args([*OFFLINE, *more])


# Which arguments are taken


def described(parser: ArgumentParser) -> dict[str, dict[str, Any]]:
    """What a parser accepts, by option."""

    def one(action: Action) -> dict[str, Any]:
        choices = list(action.choices) if action.choices else None
        if "--sglang-attention-backend" in action.option_strings:
            choices = None
        # An option with one value and no type takes text.
        takes_text = action.nargs is None and action.const is None
        return {
            "type": action.type or (str if takes_text else None),
            "default": action.default,
            "nargs": action.nargs,
            "const": action.const,
            "choices": choices,
            "required": action.required,
        }

    found = {}
    for action in parser._actions:
        for text in action.option_strings:
            if action.dest != "help":
                found[text] = one(action)
    return found


def specforge_parser(oracle: Oracle) -> ArgumentParser:
    """The parser of SpecForge's script, from its sources; neither file is run."""
    root = Path(str(oracle.optimizer.__file__)).parent
    names: dict[str, Any] = {
        "argparse": __import__("argparse"),
        "ArgumentParser": ArgumentParser,
        "ATTENTION_BACKEND_CHOICES": ["flashinfer"],
    }
    future = "from __future__ import annotations\nfrom dataclasses import dataclass"
    for path, kind in (
        (root / "args.py", ast.ClassDef),
        (root.parent / "scripts/train_eagle3.py", ast.FunctionDef),
    ):
        chosen = []
        for node in ast.parse(path.read_text()).body:
            wanted = ("TrackerArgs", "SGLangBackendArgs", "build_parser")
            if isinstance(node, kind) and node.name in wanted:
                chosen.append(node)
        module = ast.Module([*ast.parse(future).body, *chosen], [])
        exec(compile(module, str(path), "exec"), names)
    return names["build_parser"]()


def test_every_option_of_specforges_script_is_taken(commit: Oracle) -> None:
    theirs = described(specforge_parser(commit))
    assert len(theirs) > 70
    assert described(script.parser()) == theirs


def test_options_are_read_by_the_script_where_their_row_says_used() -> None:
    text = Path(script.__file__).read_text()
    for option in script.OPTIONS:
        read = f"options.{option.dest}" in text
        assert read == (option.effect == "used"), option.name
        assert bool(option.remedy) == (option.effect == "refused"), option.name
    assert len({option.name for option in script.OPTIONS}) == len(script.OPTIONS)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--is-vlm"], "--is-vlm: vision-language targets are not supported"),
        (["--tp-size", "2"], "--tp-size = 2: every rank holds the whole draft"),
        (["--attention-backend", "usp"], "--attention-backend = 'usp': must be one of sdpa, "),
        (["--sp-ulysses-size", "2"], "--sp-ulysses-size = 2"),
        (["--sp-ring-size", "4"], "--sp-ring-size = 4"),
        (["--tp-size", "0"], "--tp-size = 0"),
        (["--ckpt-dir", "d"], "--ckpt-dir = 'd': not there; leave it out"),
        (["--eval-data-path", "e"], "--eval-data-path = 'e'"),
        (["--eval-hidden-states-path", "e"], "--eval-hidden-states-path = 'e'"),
        (["--embedding-key", "wte"], "--embedding-key = 'wte': must be a key that ends in"),
        (["--lm-head-key", "out.weight"], "--lm-head-key = 'out.weight'"),
    ],
)
def test_unsupported_options_are_refused_by_name(
    more: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    assert script.main([*OFFLINE, *more]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"train_eagle3_fn: {named}")
    assert line.count("\n") == 1


def test_online_training_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert script.main(NEEDED) == 2
    assert "--train-hidden-states-path is missing" in capsys.readouterr().err


def test_options_without_effect_are_listed_if_given() -> None:
    more = ["--report-to", "wandb", "--sglang-ep-size", "2", "--no-shard-target-output"]
    found = script.idle(options(*more, "--seed", "3", "--sglang-piecewise-cuda-graph-tokens", "4"))
    assert set(found) == {
        "--report-to",
        "--sglang-ep-size",
        "--shard-target-output",
        "--sglang-piecewise-cuda-graph-tokens",
    }
    assert script.idle(options()) == []


# What they mean


def test_arguments_become_the_recipes_configuration() -> None:
    more = "--batch-size 2 --draft-accumulation-steps 3 --ttt-length 3 --max-length 99 --seed 4"
    late = "--learning-rate 0.1 --save-interval 9 --total-steps 50 --compact-teacher"
    config = script.config_of(options(*more.split(), *late.split()), TINY, 13, device="cpu")
    expected = specforge.recipe(
        TINY,
        objective={"ttt_length": 3, "teacher": "compact"},
        optimizer={"learning_rate": 0.1, "schedule_steps": 50},
        data={"max_length": 99, "micro_batch": 2, "global_batch": 6},
        train={"steps": 20, "seed": 4, "checkpoint_every": 9},
    )
    assert config == expected.config
    assert config.objective.numerics == "plain"
    assert config.objective.normalization == "rows"
    assert config.objective.decay == 0.8
    assert config.optimizer.accumulation == "params"
    assert config.train.init == "random"
    assert config.train.dtype == "bfloat16"


def test_losses_by_acceptance_keep_their_scale() -> None:
    config = script.config_of(options("--lk-loss-type", "lambda", "--kl-scale", "0.5"), TINY, 5)
    assert config.objective.loss == "lk_lambda"
    assert config.objective.kl_scale == 0.5


@pytest.mark.parametrize("name", ["--batch-size", "--draft-accumulation-steps", "--num-epochs"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} = 0: must be at least 1"):
        script.length_of(options(name, "0"), 5)


@given(
    samples=st.integers(1, 30),
    batch=st.integers(1, 4),
    share=st.integers(1, 4),
    epochs=st.integers(1, 3),
    most=st.none() | st.integers(1, 40),
)
def test_a_run_is_as_long_as_specforges_loop(
    samples: int, batch: int, share: int, epochs: int, most: int | None
) -> None:
    """Its loop, counted micro-batch by micro-batch."""
    counter = 0
    updates = 0
    for _ in range(epochs):
        for _ in range(samples // batch):
            if most is None or counter < most:
                counter += 1
                updates += counter % share == 0

    found = Namespace(
        batch_size=batch,
        draft_accumulation_steps=share,
        num_epochs=epochs,
        max_num_steps=most,
        total_steps=None,
    )
    if updates == 0:
        with pytest.raises(UserError, match="fewer than"):
            script.length_of(found, samples)
        return
    length = script.length_of(found, samples)
    assert length.steps == updates
    assert length.schedule_steps == epochs * math.ceil((samples // batch) / share)


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def under_torchrun(ranks: int, line: list[str]) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(ranks), str(ROOT / "scripts/train_eagle3_fn.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *line], check=False, env=environment, capture_output=True, text=True
    )


def test_a_run_under_torchrun_and_its_resumption(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fixed = script_arguments(data, tmp_path / "cache", "--max-num-steps", "5")
    done = under_torchrun(1, [*fixed, "--output-dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "counted from the features" in done.stdout
    assert "no effect here: --build-dataset-num-proc" in done.stdout
    first = compare_runs.read_run(tmp_path / "run")
    assert len(first) == 5
    assert (tmp_path / "run/draft/model.safetensors").is_file()

    # The same in this process.
    plain = [*fixed, "--output-dir", str(tmp_path / "plain")]
    assert script.main(plain) == 0
    assert compare_runs.first_difference(first, compare_runs.read_run(tmp_path / "plain")) is None

    # Once more it must be said that it goes on.
    capsys.readouterr()
    assert script.main(plain) == 2
    assert "--resume" in capsys.readouterr().err
    assert script.main([*plain, "--resume"]) == 0


def test_two_ranks_train_the_same_global_batch(data: Path, tmp_path: Path) -> None:
    """Two ranks of one micro-batch against one rank of two: equal updates, to rounding in bf16."""
    fixed = script_arguments(data, tmp_path / "cache", "--total-steps", "20")
    two = [*fixed, "--max-num-steps", "3", "--output-dir", str(tmp_path / "two")]
    one = [*fixed, "--max-num-steps", "6", "--draft-accumulation-steps", "2"]
    one += ["--output-dir", str(tmp_path / "one")]
    done = under_torchrun(2, two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert script.main(one) == 0

    of_two = compare_runs.read_run(tmp_path / "two")
    of_one = compare_runs.read_run(tmp_path / "one")
    assert len(of_two) == len(of_one) == 3
    for a, b in zip(of_two, of_one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["learning_rate"] == b["learning_rate"]


def test_both_scripts_are_equal_step_by_step(commit: Oracle, data: Path, tmp_path: Path) -> None:
    """SpecForge's `main()` and ours on the same arguments, from the seed on, into the second epoch.

    The control: its own script in stored order is its dataflow launcher, and is not equal.
    """
    # The checkout's folder datasets/ can be imported too: it has no module `config`.
    for package in ("datasets.config", "accelerate"):
        pytest.importorskip(package, reason=f"SpecForge's script imports {package}")
    from bench import specforge_script as their_script
    from bench.against_specforge import COMPARED, against

    line = script_arguments(data, tmp_path / "cache", "--max-num-steps", "5", "--ttt-length", "3")
    result, theirs = against(commit, line, tmp_path)
    assert result["equal"]
    assert result["steps"] == [5, 5]
    assert result["unequal_values"] == 0
    assert len({row["loss"] for row in theirs.rows}) == 5
    assert all(row["grad_norm"] > 0 for row in theirs.rows)

    longer = [*line, "--total-steps", "10000"]
    stored = their_script.run_script(commit, longer, tmp_path / "both", stored=True)
    dataflow = their_script.run_dataflow(commit, line, tmp_path / "dataflow")
    for name in COMPARED:
        assert [row[name] for row in stored.rows] == [row[name] for row in dataflow.rows], name
    losses = [[row["loss"] for row in side.rows] for side in (dataflow, theirs)]
    assert losses[0] != losses[1]


def test_without_datasets_the_message_has_the_remedy(
    commit: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import specforge_script as their_script

    monkeypatch.setitem(sys.modules, "datasets.config", None)
    with pytest.raises(OracleMissingError, match="pip install datasets"):
        their_script.run_script(commit, [], tmp_path)


# The recipe in scripts/recipes


@pytest.mark.parametrize("length", ["0", "2"])
def test_a_step_without_a_trained_row_is_refused(
    length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe_step", "--length", length])
    monkeypatch.setattr(recipe_step, "one_step", lambda _: {})
    with pytest.raises(SystemExit, match="2"):
        recipe_step.main()


def test_the_7b_recipes_commands_are_the_measured_steps(tmp_path: Path) -> None:
    """Its commands, run with stand-ins for the programs: arguments that the script takes."""
    for name in ("eagle3fn", "torchrun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\n')
        program.chmod(0o755)
    shell = ROOT / "scripts/recipes/qwen2.5-7b.sh"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([shell, "target", "talks", "out", "--seed", "5"], check=True, env=environment)

    line = (tmp_path / "torchrun.txt").read_text().splitlines()
    found = script.parser().parse_args(line[line.index("--target-model-path") :])
    script.refuse(found)
    assert found.seed == 5
    assert Path(found.draft_model_config) == DRAFT

    draft = draft_config_from_json(found.draft_model_config)
    config = script.config_of(found, draft, 1000)
    assert config.optimizer == recipe_config(draft).optimizer
    assert config.objective == recipe_config(draft).objective
    assert draft.hidden_size == 3584
    assert draft.intermediate_size == 18944
    assert draft.num_attention_heads == 28
    assert draft.num_key_value_heads == 4
    assert draft.draft_vocab_size == 16000
    assert draft.vocab_size == 152064
    assert "Not run: no weights" in shell.read_text()
