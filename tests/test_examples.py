"""The examples run, are short, and use public names alone; commands take their functions."""

import ast
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn import testing
from eagle3fn.base.config import to_dict
from eagle3fn.base.toml import to_toml
from eagle3fn.base.tree import equal
from eagle3fn.cli import main
from tests.small_run import write_run
from tests.train.run_files import read_leaves, rows, same_end

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
OWN = ["objective.loss=own_loss_and_optimizer:total_variation"]
OWN += ["optimizer.name=own_loss_and_optimizer:momentum", "optimizer.learning_rate=0.1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("examples"))


@pytest.fixture(autouse=True)
def _examples_are_importable_and_leave_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def train(run: Path, out: Path, *settings: str) -> int:
    """`eagle3fn train` for 6 steps; its exit code."""
    arguments = ["--target", run / "target", "--features", run / "features"]
    arguments += ["--vocab", run / "vocab.safetensors", "--out", out]
    short = ["train.steps=6", "train.checkpoint_every=3", "train.eval_every=3", "data.held_out=2"]
    for setting in (*short, "data.global_batch=2", "objective.ttt_length=3", *settings):
        arguments += ["--set", setting]
    return main(["train", *map(str, arguments)])


def code_lines(text: str) -> int:
    """Lines of code: no blank lines, comments and docstrings."""
    lines = text.splitlines()
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    counted = 0
    for number, line in enumerate(lines, 1):
        counted += number not in skipped and bool(line.strip()) and line.strip()[0] != "#"
    return counted


def function_lines(text: str, name: str) -> int:
    """Lines of code of a function of a module, without the line of its `def`."""
    (node,) = [x for x in ast.parse(text).body if isinstance(x, ast.FunctionDef) and x.name == name]
    source = ast.get_source_segment(text, node)
    assert source is not None
    return code_lines(source) - 1


def run_example(name: str, *arguments: object) -> None:
    """Run an example as a program, in this process."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


def test_examples_import_the_public_names_alone():
    public = {"eagle3fn": dir(e3), "eagle3fn.testing": dir(testing)}
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("eagle3fn.") for alias in node.names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eagle3fn"):
                assert node.module in public, path
                assert {alias.name for alias in node.names} <= set(public[node.module]), path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_under_sixty_lines_and_in_the_table(path):
    assert len(path.read_text().splitlines()) < 60
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text()


def test_the_table_names_files_and_pictures_that_are_there():
    links = re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text())
    assert links
    assert not [link for link in links if not (EXAMPLES / link).exists()]


# What they share.


def test_a_problem_is_a_runs_with_the_settings_that_are_named(run):
    from problem import open_problem  # pyright: ignore[reportMissingImports]

    data = e3.DataConfig(global_batch=2, held_out=3)
    found = open_problem([str(run)], data=data, train=e3.TrainConfig(steps=5, dtype="float32"))
    assert found.config.data == data and found.config.train.steps == 5
    assert found.config.optimizer == e3.OptimizerConfig()
    assert found.features.folder == run / "features"
    assert (list(found.kept), list(found.held_out)) == ([*range(7)], [7, 8, 9])
    assert found.folder == run

    # The target's tensors, in the run's dtype.
    tensors = e3.read_target_tensors(run / "target", torch.float32)
    assert torch.equal(found.frozen.target_head, tensors.head)
    with pytest.raises(e3.UserError, match="elsewhere"):
        open_problem([str(run), str(run / "elsewhere")])


def test_without_matplotlib_there_is_no_picture_and_the_example_goes_on(
    tmp_path, capsys, monkeypatch
):
    from problem import draw  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw(tmp_path / "x.png", lambda axes: axes.plot([1, 2]))
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# A tiny run is made where none is named.


def test_planted_conversations_have_the_largest_gradients(tmp_path, capsys):
    run_example("planted.py")
    printed = capsys.readouterr().out
    planted, ranked = (ast.literal_eval(found) for found in re.findall(r"\[.*?\]", printed))
    assert len(set(ranked[:5]) & set(planted)) >= 3
    by_gradient, by_loss = (float(found) for found in re.findall(r"by \w+: (.*)", printed))
    assert by_gradient > 0.95
    assert by_loss < 0.7

    (picture,) = tmp_path.rglob("planted.png")
    assert f"picture: {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_change_is_found_and_shrunk_to_two_samples(capsys):
    run_example("check_a_change.py")
    printed = capsys.readouterr().out
    assert "right: equal to ours on 20 problems" in printed
    (lengths,) = re.findall(r"wrong: Case\(lengths=(\(.*?\))", printed)
    rows = ast.literal_eval(printed.rpartition("rows ")[2])
    assert len(ast.literal_eval(lengths)) == 2
    assert rows[0] != rows[1]


def test_own_loss_and_optimizer_train(capsys):
    run_example("own_loss_and_optimizer.py")
    before, after = map(float, re.findall(r"held-out loss \w+ (.*)", capsys.readouterr().out))
    assert after < 0.9 * before


def test_own_loop_without_a_run_exports_a_draft(capsys):
    run_example("own_loop.py")
    draft = capsys.readouterr().out.rpartition("draft: ")[2].strip()
    assert e3.load_draft(draft, torch.bfloat16).config.vocab_size == 300


# The loop.


def test_own_loop_is_at_most_fifteen_lines():
    text = (EXAMPLES / "own_loop.py").read_text()
    assert function_lines(text, "main") <= 15


def test_own_loop_exports_the_draft_that_the_command_line_trains(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()
    run_example("own_loop.py", tmp_path / "run", run / "target")
    assert capsys.readouterr().out.startswith("held-out loss ")

    # The same settings by `eagle3fn train`, which would take others: the same draft, bit for bit.
    sections = {
        "objective": e3.ObjectiveConfig(),
        "optimizer": e3.OptimizerConfig(),
        "data": e3.DataConfig(held_out=2),
        "train": e3.TrainConfig(steps=20),
    }
    own = {name: to_dict(section) for name, section in sections.items()}
    (tmp_path / "own.toml").write_text(to_toml(own))
    arguments = ["--target", run / "target", "--features", run / "features"]
    arguments += ["--vocab", run / "vocab.safetensors", "--out", tmp_path / "trained"]
    arguments += ["--config", tmp_path / "own.toml"]
    assert main(["train", *map(str, arguments)]) == 0
    mine = e3.load_draft(tmp_path / "run/own-draft", torch.bfloat16)
    theirs = e3.load_draft(tmp_path / "trained/draft", torch.bfloat16)
    assert equal(mine.params, theirs.params)
    assert equal(mine.vocab, theirs.vocab)
    untrained = e3.load_draft(tmp_path / "trained/untrained", torch.bfloat16)
    assert not equal(mine.params, untrained.params)


# The loss and the optimizer.


def test_own_loss_and_optimizer_are_at_most_fifteen_lines():
    text = (EXAMPLES / "own_loss_and_optimizer.py").read_text()
    own = [function_lines(text, name) + 1 for name in ("total_variation", "momentum")]
    assert sum(own) <= 15


def problem(run: Path, **objective: Any) -> tuple[e3.Config, e3.Frozen, tuple[e3.Batch, ...]]:
    """A configuration, frozen tensors and micro-batches of the tiny run."""
    vocab_map = e3.load_map(run / "vocab.safetensors")
    tree = e3.target_config(run / "target")
    draft = e3.draft_config_from_target(tree, "target", len(vocab_map.d2t))
    config = e3.Config(
        draft,
        objective=e3.ObjectiveConfig(ttt_length=3, **objective),
        data=e3.DataConfig(global_batch=2),
        train=e3.TrainConfig(steps=6, dtype="float32"),
    )
    target = e3.read_target_tensors(run / "target", torch.float32)
    features = e3.open_features(run / "features")
    batches = next(e3.batches(features, range(8), config, 0, 1))
    return config, e3.make_frozen(target, vocab_map, config), batches


@pytest.mark.parametrize("numerics", ["plain", "fast"])
def test_bind_takes_own_loss_and_optimizer_by_value(run, numerics):
    from own_loss_and_optimizer import (  # pyright: ignore[reportMissingImports]
        momentum,
        total_variation,
    )

    config, frozen, batches = problem(run, numerics=numerics)
    own = momentum(config.optimizer)
    fns = e3.bind(config, frozen, loss=total_variation, optimizer=own)
    state = fns.init_state(fns.init(0))
    after, metrics = fns.step(state, batches, rate=0.1)

    # The first step: p - rate · clipped gradient, and the loss by hand through the plain unroll.
    assert after.opt.keys() == state.params.keys()
    scale = min(1.0, 0.5 / (float(metrics["grad_norm"]) + 1e-6))
    for name, before in state.masters.items():
        grads = after.opt[name]
        torch.testing.assert_close(after.masters[name], before - 0.1 * grads)
    norm = torch.stack([leaf.norm() for leaf in after.opt.values()]).norm()
    torch.testing.assert_close(norm, metrics["grad_norm"] * scale, rtol=1e-4, atol=0)
    assert 0 < float(metrics["aux"].losses[0]) < 1


def test_command_line_takes_them_by_name_with_a_resumed_run(run, tmp_path, capsys):
    assert train(run, tmp_path / "whole", *OWN) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-00000006")
    assert train(run, tmp_path / "resumed", *OWN) == 0
    assert same_end(tmp_path / "whole", tmp_path / "resumed", step=6)

    # They are what was trained with: the loss is at most 1.
    losses = [row["loss"] for row in rows(tmp_path / "whole/metrics.jsonl")]
    assert all(0 < loss < 1 + 0.8 + 0.64 for loss in losses)
    leaves = read_leaves(tmp_path / "whole/checkpoints/step-00000006")
    assert "opt.fc.weight" in leaves and "opt.mu.fc.weight" not in leaves


def test_sums_and_settings_by_role_are_kept_by_a_resumed_run(run, tmp_path, capsys):
    """As a table in `config.toml` and in checkpoints, in any order; another sum is refused."""
    own = '"own_loss_and_optimizer:total_variation" = 0.5'
    settings = ["optimizer.name=lion", "optimizer.learning_rate=1e-4", "optimizer.schedule=wsd"]
    settings += ["optimizer.weight_decay=0.1"]
    settings += ["optimizer.decay_roles=['matrix', 'attention']"]
    assert train(run, tmp_path / "whole", f"objective.loss={{ce = 0.1, {own}}}", *settings) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-00000006")
    turned = [f"objective.loss={{{own}, ce = 0.1}}", *settings]
    assert train(run, tmp_path / "resumed", *turned) == 0
    assert same_end(tmp_path / "whole", tmp_path / "resumed", step=6)
    assert train(run, tmp_path / "resumed") == 0  # it goes on with what it began with

    config = e3.load_config(tmp_path / "whole/config.toml", [])
    weights = {"ce": 0.1, "own_loss_and_optimizer:total_variation": 0.5}
    assert config.objective.loss == weights
    assert config.optimizer.decay_roles == ("attention", "matrix")
    (tmp_path / "again.toml").write_text(to_toml(to_dict(config)))
    assert e3.load_config(tmp_path / "again.toml", []) == config

    capsys.readouterr()
    assert train(run, tmp_path / "resumed", "objective.loss={ce = 0.2, tv = 0.5}") == 2
    assert "objective.loss was {'ce': 0.1, 'own" in capsys.readouterr().err
    draft = ["--draft-config", str(tmp_path / "whole/draft/config.json")]
    assert main(["plan", *draft, "--set", turned[0], "--set", "optimizer.name=sgd"]) == 0
    assert "optimizer state" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("objective.loss=kls", "objective.loss = 'kls': must be one of 'kl', 'rkl'"),
        ("optimizer.name=adam", "optimizer.name = 'adam': must be one of 'adamw', 'muon'"),
        ("optimizer.schedule=cosin", "optimizer.schedule = 'cosin': must be one of 'cosine'"),
        ("objective.loss={kl=1,kls=1}", "objective.loss = 'kls': must be one of 'kl', 'rkl'"),
        ("objective.loss={kl=1,lk_alpha=1}", "objective.loss.lk_alpha: its means over the whole"),
        ("objective.loss={}", "objective.loss = {}: names nothing; write a name"),
        ("objective.loss={kl=0,tv=1}", "objective.loss: the weight of 'kl' is 0.0: must be a num"),
        (
            "objective.kl_decay=1",
            "objective.kl_decay = 1.0: objective.loss = 'kl' does not read it",
        ),
        ("objective.loss=no_such:f", "module 'no_such' cannot be imported"),
        ("optimizer.name=no_such:f", "module 'no_such' cannot be imported"),
        ("objective.loss=math:pi", "'pi' must be a function of module 'math'"),
        ("optimizer.name=math:pi", "'pi' must be a function of module 'math'"),
        (
            "objective.loss=own_loss_and_optimizer:momentum",
            "must be a function of (logits, p_draft, p_full), not of (config)",
        ),
        (
            "optimizer.name=own_loss_and_optimizer:total_variation",
            "must be a function of (config), not of (logits, p_draft, p_full)",
        ),
        ("optimizer.name=copy:copy", "the function returned OptimizerConfig"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line_before_any_work(
    run, tmp_path, capsys, setting, text
):
    capsys.readouterr()
    assert train(run, tmp_path / "refused", setting) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "refused").exists()
