"""The old script's arguments in our hands: which are taken, what they mean, and two runs compared."""

import ast
import json
import math
import os
import subprocess
import sys
from argparse import Action, ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import recipe_step
from bench.recipe_step import DRAFT, recipe_config
from bench.specforge_data import untie, write_ckpts
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.draft_config import DraftConfig, draft_config_from_json
from eagle3fn.base.errors import UserError
from eagle3fn.data.extract import extract
from eagle3fn.model.table import init_params, shapes
from eagle3fn.specforge import compare_runs, script
from eagle3fn.specforge.feature_files import find_ckpts
from eagle3fn.specforge.oracle import Oracle, OracleMissingError
from eagle3fn.train.optimizer import make_schedule
from tests.factories import tiny_model, tiny_tokenizer, write_talks

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--target-model-path", "t", "--train-data-path", "c", "--output-dir", "o"]
OFFLINE = [*NEEDED, "--train-hidden-states-path", "f"]
TINY = DraftConfig(16, 24, 2, 1, 8, 300, 64, 16, 256)


def options(*more: str) -> Any:
    found = script.parser().parse_args([*OFFLINE, *more])
    found.target_batch_size = found.batch_size
    return found


def described(parser: ArgumentParser) -> dict[str, tuple]:
    def one(action: Action) -> tuple:
        choices = None if "--sglang-attention-backend" in action.option_strings else action.choices
        kind = action.type or (str if action.nargs is None and action.const is None else None)
        return (
            kind,
            action.default,
            action.nargs,
            action.const,
            choices and list(choices),
            action.required,
        )

    return {
        text: one(action)
        for action in parser._actions
        for text in action.option_strings
        if action.dest != "help"
    }


def test_every_option_of_the_old_script_is_taken(commit: Oracle) -> None:
    root = Path(str(commit.optimizer.__file__)).parent
    names: dict[str, Any] = {"argparse": __import__("argparse"), "ArgumentParser": ArgumentParser}
    for path, wanted in (
        (root / "args.py", ast.ClassDef),
        (root.parent / "scripts/train_eagle3.py", ast.FunctionDef),
    ):
        kept = [node for node in ast.parse(path.read_text()).body if isinstance(node, wanted)]
        chosen = [
            node
            for node in kept
            if node.name in ("TrackerArgs", "SGLangBackendArgs", "build_parser")
        ]
        future = ast.parse(
            "from __future__ import annotations\nfrom dataclasses import dataclass"
        ).body
        names["ATTENTION_BACKEND_CHOICES"] = ["flashinfer"]
        exec(compile(ast.Module([*future, *chosen], []), str(path), "exec"), names)
    old, ours = described(names["build_parser"]()), described(script.parser())
    assert len(old) > 70 and old == ours


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--is-vlm"], "--is-vlm"),
        (["--tp-size", "2"], "--tp-size = 2"),
        (["--attention-backend", "usp"], "--attention-backend = 'usp'"),
        (["--sp-ulysses-size", "2"], "--sp-ulysses-size = 2"),
        (["--sp-ring-size", "4"], "--sp-ring-size = 4"),
        (["--tp-size", "0"], "--tp-size = 0"),
        (["--ckpt-dir", "d"], "--ckpt-dir = 'd'"),
        (["--eval-data-path", "e"], "--eval-data-path = 'e'"),
        (["--eval-hidden-states-path", "e"], "--eval-hidden-states-path = 'e'"),
        (["--embedding-key", "wte"], "--embedding-key = 'wte'"),
        (["--lm-head-key", "out.weight"], "--lm-head-key = 'out.weight'"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    more: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    assert script.main([*OFFLINE, *more]) == 2
    line = capsys.readouterr().err
    assert named in line and line.count("\n") == 1 and line.startswith("train_eagle3_fn: ")


def test_online_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert script.main(NEEDED) == 2 and "--train-hidden-states-path" in capsys.readouterr().err


def test_options_without_effect_are_listed_if_given() -> None:
    given_ones = [
        "--report-to",
        "wandb",
        "--sglang-ep-size",
        "2",
        "--no-shard-target-output",
        "--seed",
        "3",
    ]
    assert set(script.idle(options(*given_ones))) == {
        "--report-to", "--sglang-ep-size", "--shard-target-output"
    }  # fmt: skip
    assert script.idle(options()) == []


def test_every_option_is_used_or_refused_or_listed() -> None:
    text = (ROOT / "scripts/train_eagle3_fn.py").read_text()
    for name in vars(options()):
        spelled = name.replace("_", "-")
        known = spelled in script.IDLE or spelled.startswith(script.IDLE_GROUPS)
        assert known != (
            f"options.{name}" in text or f'"{spelled}"' in text.split("def refuse")[1]
        ), name


def test_arguments_become_the_old_settings() -> None:
    more = "--batch-size 2 --draft-accumulation-steps 3 --ttt-length 3 --max-length 99 --seed 4 --compact-teacher"
    late = "--learning-rate 0.1 --save-interval 9 --total-steps 50"
    config = script.config_of(options(*more.split(), *late.split()), TINY, 13)
    loss, update, data, plan = config.objective, config.optimizer, config.data, config.train
    assert (loss.numerics, loss.normalization, loss.loss, loss.teacher, loss.ttt_length, loss.decay) == (
        "legacy", "rows", "kl", "compact", 3, 0.8
    )  # fmt: skip
    assert (update.schedule, update.accumulation, update.learning_rate, update.horizon) == (
        "legacy",
        "legacy",
        0.1,
        50,
    )
    assert (data.mask_alignment, data.order, data.micro_batch, data.global_batch, data.max_length) == (
        "legacy", "legacy", 2, 6, 99
    )  # fmt: skip
    assert (plan.init, plan.seed, plan.steps, plan.checkpoint_every, plan.dtype) == (
        "legacy",
        4,
        20,
        9,
        "bfloat16",
    )


def test_losses_by_acceptance_keep_their_scale() -> None:
    config = script.config_of(options("--lk-loss-type", "lambda", "--kl-scale", "0.5"), TINY, 5)
    assert (config.objective.loss, config.objective.kl_scale) == ("lk_lambda", 0.5)


@given(
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.none() | st.integers(1, 40),
)
def test_a_run_is_as_long_as_the_old_loop(
    samples: int, batch: int, share: int, epochs: int, most: int | None
) -> None:
    """The old loop, counted micro-batch by micro-batch."""
    counter = updates = 0
    for _ in range(epochs):
        for _ in range(samples // batch):
            if most is None or counter < most:
                counter += 1
                updates += counter % share == 0
    found = SimpleNamespace(
        target_batch_size=batch, draft_accumulation_steps=share, num_epochs=epochs, max_num_steps=most,
        total_steps=None, batch_size=batch,
    )  # fmt: skip
    if updates == 0:
        with pytest.raises(UserError, match="fewer than"):
            script.length_of(found, samples)  # pyright: ignore[reportArgumentType]
        return
    length = script.length_of(found, samples)  # pyright: ignore[reportArgumentType]
    assert length == (updates, epochs * math.ceil((samples // batch) / share))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_start_is_that_of_torchs_layers(seed: int) -> None:
    """One generator, seeded as the old script seeds the process: the embedding first, then every matrix."""
    torch.manual_seed(seed)
    torch.nn.Embedding(TINY.vocab_size, TINY.hidden_size, 0)
    layers = {
        n: torch.nn.Linear(*shape[::-1], bias=False)
        for n, shape in shapes(TINY).items()
        if len(shape) == 2
    }
    params = init_params(TINY, seed, torch.bfloat16, init="legacy")
    assert list(params) == list(shapes(TINY))
    for name, value in params.items():
        wanted = (
            layers[name].weight.detach().bfloat16() if value.ndim == 2 else torch.ones_like(value)
        )
        assert torch.equal(value, wanted), name


def test_the_schedule_can_span_more_than_the_run() -> None:
    long = OptimizerConfig(schedule="legacy", horizon=100)
    rates = [make_schedule(replace(long, horizon=0), 100)(n) for n in range(20)]
    assert [make_schedule(long, 20)(n) for n in range(20)] == rates
    assert rates != [make_schedule(replace(long, horizon=0), 20)(n) for n in range(20)]
    with pytest.raises(UserError, match="horizon = -1"):
        OptimizerConfig(horizon=-1)


def write_run(path: Path, count: int = 4, **changes: Any) -> Path:
    rows = [
        {
            "step": n,
            "loss": 1.0 / n,
            "accuracy": [0.5, 0.25],
            "acceptance": [0.1, 0.2],
            "grad_norm": n + 0.5,
        }
        for n in range(1, count + 1)
    ]
    for name, value in changes.items():
        rows[2][name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_equal_runs_are_equal_and_one_ulp_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old = write_run(tmp_path / "old.jsonl")
    assert compare_runs.main([str(old), str(write_run(tmp_path / "new.jsonl")), "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == "equal at every step: 4 of 4" and json.loads(shown[-1])["equal"] is True
    assert len(shown) == 2 + 4 + 2
    for name, value, label in (
        ("loss", math.nextafter(1 / 3, 1), "loss"), ("grad_norm", 3.25, "grad_norm"),
        ("accuracy", [0.5, 0.3], "accuracy[1]"), ("acceptance", [0.1], "acceptance[1]"),
    ):  # fmt: skip
        new = write_run(tmp_path / "new.jsonl", 4, **{name: value})
        assert compare_runs.main([str(old), str(new), "--steps", "1"]) == 1
        assert (
            capsys.readouterr().out.splitlines()[-1].startswith(f"first unequal step: 3, {label} ")
        )


def test_a_shorter_run_is_not_equal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old, new = write_run(tmp_path / "old.jsonl"), write_run(tmp_path / "new.jsonl", 3)
    assert compare_runs.main([str(old), str(new)]) == 1
    assert "first unequal step: 4, which the new run does not have" in capsys.readouterr().out
    assert compare_runs.main([str(new), str(old)]) == 1
    assert "which the old run does not have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_text(""), "no rows"),
        (lambda p: p.write_text(p.read_text()[:-20]), ":4: not JSON"),
        (lambda p: write_run(p, loss=math.nan), ":3: loss holds nan"),
        (lambda p: write_run(p, acceptance=[0.1, math.inf]), ":3: acceptance holds inf"),
        (lambda p: write_run(p, grad_norm=None), ":3: grad_norm is None"),
        (lambda p: write_run(p, accuracy=0.5), ":3: accuracy is 0.5: must be a list"),
        (lambda p: write_run(p, step=4), ":3: step 4: must be 3"),
        (lambda p: p.write_text("7\n"), ":1: step 7: must be 1"),
        (lambda p: write_run(p, loss=10**400), ":3: loss holds 1000"),
    ],
)
def test_damaged_runs_are_refused(
    tmp_path: Path, damage: Any, named: str, capsys: pytest.CaptureFixture
) -> None:
    old, folder = write_run(tmp_path / "old.jsonl"), tmp_path / "new"
    folder.mkdir()
    damage(write_run(folder / "metrics.jsonl"))
    assert compare_runs.main([str(old), str(folder)]) == 2
    line = capsys.readouterr().err
    assert named in line and "metrics.jsonl" in line and line.count("\n") == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied target, its untied copy, features as `.ckpt`, conversations and a draft's configuration."""
    root = tmp_path_factory.mktemp("old")
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(root / "tied")
    tiny_tokenizer().save_pretrained(root / "tied")
    talks = write_talks(root / "talks.jsonl", 7)
    extract(model, tiny_tokenizer(), talks, root / "found", (1, 1, 1), max_length=40)
    untie(root / "tied", root / "target")
    assert write_ckpts(root / "found", root / "features") == 7
    sizes = {
        name: getattr(TINY, name)
        for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
    }
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "draft_vocab_size": 64,
        "hidden_act": "silu",
    }
    sizes |= {
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e4,
        "num_hidden_layers": 1,
    }
    draft = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "tie_word_embeddings": False,
    } | sizes
    (root / "draft.json").write_text(json.dumps(draft))
    return root


def arguments(data: Path, cache: Path, *more: str) -> list[str]:
    places = {
        "target-model-path": data / "target", "draft-model-config": data / "draft.json", "cache-dir": cache,
        "train-data-path": data / "talks.jsonl", "train-hidden-states-path": data / "features",
    }  # fmt: skip
    named = [text for name, path in places.items() for text in (f"--{name}", str(path))]
    fixed = "--chat-template qwen --attention-backend sdpa --max-length 40 --batch-size 2 --learning-rate 1e-2"
    return [
        *named,
        *fixed.split(),
        "--dataloader-num-workers",
        "0",
        "--build-dataset-num-proc",
        "1",
        *more,
    ]


def test_the_files_sort_as_the_old_tool_sorts_them(tmp_path: Path) -> None:
    for name in ("a/x.ckpt", "a-b/y.ckpt", "a/w.ckpt.gz", "z.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_ckpts(tmp_path) == [
        tmp_path / name for name in ("a-b/y.ckpt", "a/w.ckpt.gz", "a/x.ckpt", "z.ckpt")
    ]


def under_torchrun(ranks: int, line: list[str]) -> subprocess.CompletedProcess:
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*start, str(ROOT / "scripts/train_eagle3_fn.py"), *line]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)


def test_a_run_under_torchrun_and_its_resumption(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fixed = arguments(data, tmp_path / "cache", "--max-num-steps", "5")
    done = under_torchrun(1, [*fixed, "--output-dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "counted from the features" in done.stdout and "--build-dataset-num-proc" in done.stdout
    first = compare_runs.read_run(tmp_path / "run")
    assert len(first) == 5 and (tmp_path / "run/draft/model.safetensors").is_file()
    plain = [*fixed, "--output-dir", str(tmp_path / "plain")]
    assert script.main(plain) == 0
    assert compare_runs.first_difference(first, compare_runs.read_run(tmp_path / "plain")) is None
    capsys.readouterr()
    assert script.main(plain) == 2 and "--resume" in capsys.readouterr().err
    assert script.main([*plain, "--resume"]) == 0


def test_two_ranks_train_the_same_global_batch(data: Path, tmp_path: Path) -> None:
    """Two ranks of one micro-batch against one rank of two: the same update, to rounding in bf16."""
    fixed = arguments(data, tmp_path / "cache", "--total-steps", "20")
    done = under_torchrun(
        2, [*fixed, "--max-num-steps", "3", "--output-dir", str(tmp_path / "two")]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = [
        "--max-num-steps",
        "6",
        "--draft-accumulation-steps",
        "2",
        "--output-dir",
        str(tmp_path / "one"),
    ]
    assert script.main([*fixed, *one]) == 0
    two, alone = (compare_runs.read_run(tmp_path / name) for name in ("two", "one"))
    assert len(two) == len(alone) == 3
    for a, b in zip(two, alone, strict=True):
        assert (
            a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            and a["learning_rate"] == b["learning_rate"]
        )


def test_both_scripts_are_equal_step_by_step(commit: Oracle, data: Path, tmp_path: Path) -> None:
    """The old `main()` and ours on the same arguments, from the seed on, into the second epoch; and the control."""
    for package in (
        "datasets.config",
        "accelerate",
    ):  # the checkout's folder datasets/ can be imported too
        pytest.importorskip(package, reason=f"the old script imports {package}")
    from bench.against_specforge import COMPARED, against
    from bench.specforge_script import run_dataflow, run_script

    line = arguments(data, tmp_path / "cache", "--max-num-steps", "5", "--ttt-length", "3")
    result, old = against(commit, line, tmp_path)
    assert result["equal"] and result["steps"] == [5, 5] and result["unequal_values"] == 0
    assert len({row["loss"] for row in old.rows}) == 5 and all(
        row["grad_norm"] > 0 for row in old.rows
    )
    stored = run_script(
        commit, [*line, "--total-steps", "10000"], tmp_path / "both", stored=True
    )
    new = run_dataflow(commit, line, tmp_path / "dataflow")
    for name in COMPARED:
        assert [row[name] for row in stored.rows] == [row[name] for row in new.rows], name
    assert [row["loss"] for row in new.rows] != [row["loss"] for row in old.rows]


def test_without_datasets_it_says_what_to_install(
    commit: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.specforge_script import run_script

    monkeypatch.setitem(sys.modules, "datasets.config", None)
    with pytest.raises(OracleMissingError, match="pip install datasets"):
        run_script(commit, [], tmp_path)


@pytest.mark.parametrize("length", ["0", "2"])
def test_a_step_without_a_trained_row_is_refused(
    length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe_step", "--length", length])
    monkeypatch.setattr(recipe_step, "one_step", lambda _: {})
    with pytest.raises(SystemExit, match="2"):
        recipe_step.main()


def test_the_recipe_has_the_full_draft_shapes(tmp_path: Path) -> None:
    """Its commands, run with stand-ins for the programs: the arguments are the script's, the shapes performance's."""
    for name in ("eagle3fn", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\n')
        (tmp_path / name).chmod(0o755)
    script = ROOT / "scripts/recipes/qwen2.5-7b.sh"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([script, "target", "talks", "out", "--seed", "5"], check=True, env=environment)
    line = (tmp_path / "torchrun.txt").read_text().splitlines()
    found = script.parser().parse_args(line[line.index("--target-model-path") :])
    script.refuse(found)
    draft = draft_config_from_json(found.draft_model_config)
    found.target_batch_size = found.batch_size
    assert found.seed == 5 and Path(found.draft_model_config) == DRAFT
    config = script.config_of(found, draft, 1000)
    assert (
        config.optimizer == recipe_config(draft).optimizer
        and config.objective == recipe_config(draft).objective
    )
    assert (draft.hidden_size, draft.intermediate_size, draft.num_attention_heads) == (
        3584,
        18944,
        28,
    )
    assert (draft.num_key_value_heads, draft.draft_vocab_size, draft.vocab_size) == (
        4,
        16000,
        152064,
    )
    assert "Not run: no weights" in script.read_text()
