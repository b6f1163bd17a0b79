"""`eagle3fn train --recipe specforge`: one command on SpecForge's files, equal to its script.

And settings of former versions, which are refused with their new names.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eagle3fn.cli import main
from eagle3fn.data.vocab import build_map
from eagle3fn.specforge import compare_runs, script
from eagle3fn.train.checkpoint import checkpoints
from tests.specforge.script_data import TINY, script_arguments, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SpecForge's files, and the map where its script would have left it and elsewhere."""
    root = write_data(tmp_path_factory.mktemp("data"))
    counts = torch.randint(50, (TINY.vocab_size,), generator=torch.Generator().manual_seed(1))
    vocab_map = build_map(counts, TINY.draft_vocab_size)
    options = script.parser().parse_args([*script_arguments(root, root / "cache"), *out(root)])
    for path in (root / "map.pt", script.cached_map(options)):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vocab_map._asdict(), path)
    return root


def out(folder: Path) -> list[str]:
    return ["--output-dir", str(folder)]


def train(data: Path, run: Path, *more: str) -> list[str]:
    """The command line on SpecForge's files, with the settings of `script_arguments`."""
    arguments = ["train", "--target", str(data / "target"), "--features", str(data / "features")]
    arguments += ["--vocab", str(data / "map.pt"), "--draft-config", str(data / "draft.json")]
    arguments += ["--out", str(run)]
    for setting in (
        "data.max_length=40",
        "data.micro_batch=2",
        "data.global_batch=4",
        "data.prefetch=0",
        "optimizer.learning_rate=1e-2",
        "optimizer.schedule_steps=20",
        "train.steps=5",
        "train.seed=3",
    ):
        arguments += ["--set", setting]
    return [*arguments, *more]


SCRIPT = "--draft-accumulation-steps 2 --max-num-steps 10 --total-steps 20 --seed 3"


def tensors(run: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything in a run's newest checkpoint, and its exported draft; `scratch` is overwritten."""
    checkpoint = checkpoints(run / "checkpoints")[-1]
    dcp_to_torch_save(checkpoint, scratch)
    found = torch.load(scratch, weights_only=True)
    assert {"params.fc.weight", "masters.fc.weight", "opt.mu.fc.weight"} < found.keys()
    for name, value in load_file(run / "draft" / "model.safetensors").items():
        found[f"draft.{name}"] = value
    return found


def test_the_command_trains_as_specforges_script(data: Path, tmp_path: Path) -> None:
    """Five updates of two micro-batches, into the second epoch: every number and every bit."""
    by_script = tmp_path / "script"
    line = script_arguments(data, data / "cache", *SCRIPT.split(), *out(by_script))
    assert script.main(line) == 0
    by_command = tmp_path / "command"
    assert main(train(data, by_command, "--recipe", "specforge")) == 0

    first = compare_runs.read_run(by_script)
    assert len(first) == 5
    assert compare_runs.first_difference(first, compare_runs.read_run(by_command)) is None

    expected = tensors(by_script, tmp_path / "scratch.pt")
    found = tensors(by_command, tmp_path / "scratch.pt")
    assert len(expected) > 4 * 12
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_dataflow_recipe_has_another_order(data: Path, tmp_path: Path) -> None:
    for name in ("specforge", "specforge-dataflow"):
        assert main(train(data, tmp_path / name, "--recipe", name)) == 0
    shuffled = compare_runs.read_run(tmp_path / "specforge")
    stored = compare_runs.read_run(tmp_path / "specforge-dataflow")
    found = compare_runs.first_difference(shuffled, stored)
    assert found is not None
    assert found.step == 1


def test_a_run_goes_on_under_its_recipe_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(train(data, tmp_path, "--recipe", "specforge")) == 0
    assert main(train(data, tmp_path, "--recipe", "specforge")) == 0
    capsys.readouterr()
    assert main(train(data, tmp_path, "--recipe", "specforge-dataflow")) == 2
    line = capsys.readouterr().err
    assert "another recipe (specforge, now specforge-dataflow)" in line


def test_specforges_files_train_without_its_recipe(data: Path, tmp_path: Path) -> None:
    assert main(train(data, tmp_path, "--set", "train.eval_every=5")) == 0
    assert (tmp_path / "draft" / "model.safetensors").is_file()


def test_settings_win_over_the_recipes(data: Path, tmp_path: Path) -> None:
    more = ("--recipe", "specforge", "--set", "objective.teacher=compact", "--set", "train.steps=1")
    assert main(train(data, tmp_path, *more)) == 0
    text = (tmp_path / "config.toml").read_text()
    assert 'teacher = "compact"' in text
    assert 'numerics = "plain"' in text


@pytest.mark.parametrize("setting", ["train.init=target", "objective.numerics=fast"])
def test_settings_that_specforge_does_not_read_are_refused(
    data: Path, tmp_path: Path, setting: str, capsys: pytest.CaptureFixture
) -> None:
    arguments = train(data, tmp_path / "run", "--recipe", "specforge", "--set", setting)
    assert main(arguments) == 2
    name, _, value = setting.partition("=")
    assert f"{name} = {value!r}: SpecForge's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_means_over_the_batch_need_the_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without it the refusal names the losses by row, and the recipe."""
    setting = ("--set", "objective.loss=lk_alpha")
    assert main(train(data, tmp_path, *setting)) == 2
    line = capsys.readouterr().err
    assert "objective.loss = 'lk_alpha'" in line
    assert "write nla or lk" in line
    assert "--recipe specforge" in line

    # With it, one micro-batch an update.
    split = ("--set", "data.global_batch=4", "--set", "data.micro_batch=2")
    assert main(train(data, tmp_path, *setting, "--recipe", "specforge", *split)) == 2
    assert "data.micro_batch = 2: must be 4" in capsys.readouterr().err
    one = ("--set", "data.global_batch=2", "--set", "data.micro_batch=2")
    more = ("--set", "train.steps=1", "--recipe", "specforge", *one)
    assert main(train(data, tmp_path, *setting, *more)) == 0


OLD = [
    ("objective.numerics=legacy", "write objective.numerics=plain"),
    ("optimizer.schedule=legacy", "write --recipe specforge"),
    ("optimizer.accumulation=legacy", "write optimizer.accumulation=params"),
    ("optimizer.horizon=5", "write optimizer.schedule_steps"),
    ("train.init=legacy", "write --recipe specforge"),
    ("data.mask_alignment=legacy", "write --recipe specforge"),
    ("data.mask_alignment=serving", "leave it out"),
    ("data.order=legacy", "write --recipe specforge"),
    ("data.order=stored", "specforge-dataflow"),
]


@pytest.mark.parametrize(("setting", "instead"), OLD, ids=[setting for setting, _ in OLD])
def test_old_settings_are_refused_with_one_line(
    data: Path, tmp_path: Path, setting: str, instead: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(train(data, tmp_path / "run", "--set", setting)) == 2
    line = capsys.readouterr().err
    name, _, _ = setting.partition("=")
    assert line.startswith(f"eagle3fn train: --set: {name} = ")
    assert instead in line
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_old_settings_in_a_file_are_refused_with_its_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\norder = "legacy"\n')
    for command in (
        train(data, tmp_path / "run", "--config", str(path)),
        ["plan", "--draft-config", str(data / "draft.json"), "--config", str(path)],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert f"{path}: data.order = 'legacy': write --recipe specforge" in line
        assert line.count("\n") == 1
