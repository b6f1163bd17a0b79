"""`eagle3fn train --dry-run`, `--max-steps`, `--track`, and a map that counts no row."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eagle3fn.base.files import locked
from eagle3fn.base.types import VocabMap
from eagle3fn.cli import main
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.target_tensors import read_target_tensors
from eagle3fn.data.vocab import read_map, save_map
from eagle3fn.train import dry_run
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.dry_run import DryRun
from tests.small_run import write_run
from tests.train.run_files import same_end

STEPS = 4
VOCAB = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("small"))


def arguments(run: Path, out: Path, *more: str, held_out: int = 2) -> list[str]:
    settings = {
        "objective.ttt_length": 2,
        "train.eval_every": 2,
        "train.dtype": "float32",
        "data.held_out": held_out,
    }
    if "--minutes" not in more:
        settings["train.steps"] = STEPS
    sets = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    where = ["--target", str(run / "target"), "--features", str(run / "features")]
    vocab = ["--vocab", str(run / "vocab.safetensors"), "--threads", "1"]
    return ["train", *where, *vocab, "--out", str(out), *sets, *more]


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_dry_run_says_the_plan_and_writes_nothing(small, tmp_path, capsys):
    before = tree(small)
    out = tmp_path / "run"
    assert main(arguments(small, out, "--dry-run")) == 0
    found = capsys.readouterr().out
    assert not out.exists() and tree(tmp_path) == [] and tree(small) == before
    assert "a rank of 1 holds at least" in found
    (engines,) = [line for line in found.splitlines() if line.startswith("engines: ")]
    every = "vllm, sglang, llamacpp, speculators, eagle"
    assert engines == f"engines: {every} can represent this draft"
    chosen = f"train.steps = {STEPS} chose the number of updates"
    assert f"  {STEPS} updates, 3 evaluations, 1 checkpoint; {chosen}\n" in found
    assert "the first batch\n  1 samples, " in found and "of which the loss counts " in found
    assert "one update\n  loss " in found and "gradient norm" in found
    assert re.search(
        r"\n  memory (rose by \d.* at its peak, state and update|at its peak not above that of "
        r"reading the data before); the plan's sum without frozen tensors is \d",
        found,
    )
    assert "all of it\n  about " in found and found.endswith("nothing was written\n")


def stamps(folder: Path) -> dict[Path, int]:
    return {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")}


def tried(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    """What a dry run of a call says; its folder is left as it is."""
    out = Path(line[line.index("--out") + 1])
    before = stamps(out)
    capsys.readouterr()
    assert main([*line, "--dry-run"]) == 0
    assert stamps(out) == before
    return capsys.readouterr().out


def test_a_dry_runs_loss_is_that_of_the_update_that_comes_next(small, tmp_path, capsys):
    out = tmp_path / "run"
    line = arguments(small, out)
    new = tried(capsys, line)
    assert main([*line, "--max-steps", "2"]) == 0
    begun = tried(capsys, line)
    assert main(line) == 0
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    for found, row in ((new, rows[0]), (begun, rows[2])):
        assert f"loss {row['loss']:.4f}, gradient norm {row['grad_norm']:.4f}" in found
        counted = f"of which the loss counts {row['counted']:.1%}"
        assert f"{row['tokens']} tokens, {row['rows']} supervised rows, {counted}" in found

    # What is left of a run that has begun.
    assert "  2 of 4 updates left, 1 evaluation, 1 checkpoint; train.steps = 4 chose" in begun
    assert "the next batch\n" in begun and "what is left\n  about " in begun
    over = tried(capsys, line)
    assert "\n  ended at step 4 of 4, nothing is left to train; train.steps = 4 chose" in over
    assert "batch" not in over.split("the run\n")[1] and "one update" not in over


def test_a_run_that_its_patience_has_ended_has_nothing_left(small, tmp_path, capsys):
    """Nor more than that, where more updates are asked for."""
    out = tmp_path / "run"
    more = ("--set", "optimizer.learning_rate=1e-30", "--set", "train.patience=1")
    line = arguments(small, out, *more, "--set", "train.steps=20", "--set", "train.eval_every=1")
    assert main(line) == 0
    found = tried(capsys, [*line, "--set", "train.steps=50"])
    assert "\n  ended at step 2 of 50, by train.patience, nothing is left to train; " in found


def test_a_dry_run_does_not_read_the_draft_that_a_run_began_from(small, tmp_path, capsys):
    assert main(arguments(small, tmp_path / "first")) == 0
    start = ("--set", f"train.init={tmp_path}/draft")
    os.rename(tmp_path / "first/draft", tmp_path / "draft")
    line = arguments(small, tmp_path / "run", *start)
    assert main([*line, "--max-steps", "2"]) == 0
    shutil.rmtree(tmp_path / "draft")
    assert "2 of 4 updates left" in tried(capsys, line)


@pytest.mark.parametrize(
    ("more", "chosen"),
    [
        (("--minutes", "0.01"), "--minutes 0.01"),
        (("--set", "train.steps=0", "--set", "train.epochs=2"), "train.epochs = 2"),
    ],
)
def test_a_dry_run_says_what_chose_the_number_of_updates(small, tmp_path, capsys, more, chosen):
    assert main(arguments(small, tmp_path / "run", "--dry-run", *more)) == 0
    assert f"; {chosen} chose the number of updates\n" in capsys.readouterr().out


def test_memory_of_an_update_is_the_rise_on_the_cpu_and_all_of_a_card(monkeypatch, small, capsys):
    """The plan's sum beside it is of the same: without the frozen tensors, which were there."""
    peaks = iter([1 << 30, 5 << 30])
    found: list[DryRun] = []
    monkeypatch.setattr("eagle3fn.train.dry_run.peak_bytes", lambda device: next(peaks))
    describe = dry_run.describe_dry_run
    monkeypatch.setattr(
        dry_run, "describe_dry_run", lambda one: (found.append(one), describe(one))[1]
    )
    assert main(arguments(small, small / "no run", "--dry-run")) == 0
    assert "  memory rose by 4.00 GiB at its peak, state and update; " in capsys.readouterr().out
    plan = found[0].plan
    held = {"frozen tensors": plan.needed - (3 << 20)}
    one = found[0]._replace(plan=plan._replace(held={"others": 3 << 20} | held))
    assert "; the plan's sum without frozen tensors is 3.00 MiB\n" in describe(one)
    update = found[0].update
    assert update is not None
    on_card = describe(one._replace(device="cuda:0", update=update._replace(peak=5 << 30)))
    assert "  5.00 GiB allocated on cuda:0 at its peak; the plan's sum is " in on_card
    assert "not above that of reading the data before" in describe(
        one._replace(update=update._replace(peak=0))
    )


@pytest.mark.parametrize("more", [["--track", "wandb"], ["--max-steps", "3"]])
def test_what_a_dry_run_would_not_heed_is_refused(small, tmp_path, capsys, more):
    assert main(arguments(small, tmp_path / "run", "--dry-run", *more)) == 2
    assert f"{more[0]} with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate was "),
        ("train.steps=2", "train.steps = 2"),
        ("draft.fc_norm=true", "draft.fc_norm was False, is True"),
    ],
)
def test_a_dry_run_refuses_what_the_run_in_its_folder_would(
    small, tmp_path, capsys, setting, message
):
    out = tmp_path / "run"
    assert main(arguments(small, out, "--max-steps", "3")) == 0
    capsys.readouterr()
    assert main(arguments(small, out, "--dry-run", "--set", setting)) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(small: Path) -> Path:
    """A run's folder, two of its updates made."""
    out = small / "stopped"
    assert main(arguments(small, out, "--max-steps", "2")) == 0
    return out


def changed(path: Path, data: bytes | None) -> None:
    """Another content for a file, or none; a folder is removed."""
    if path.is_dir():
        shutil.rmtree(path)
    elif data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def folder_at(path: Path) -> None:
    changed(path, None)
    path.mkdir()


NEWEST = Path("checkpoints/step-00000002")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "state cut": (lambda out: os.truncate(out / NEWEST / "__0_0.distcp", 9), "have changed"),
    "state empty": (lambda out: changed(out / NEWEST / "__0_0.distcp", b""), "have changed"),
    "state gone": (lambda out: changed(out / NEWEST / "__0_0.distcp", None), "is no file"),
    "draft cut": (lambda out: os.truncate(out / NEWEST / "draft.safetensors", 9), "have changed"),
    "foreign": (lambda out: (out / "draft/mine").touch(), "draft: holds mine, and only"),
    "foreign first": (lambda out: (out / "untrained/mine").touch(), "untrained: holds mine"),
    "draft gone": (lambda out: changed(out / "draft", None), "draft: gone, and the run's draft up"),
    "draft a file": (
        lambda out: (changed(out / "draft", None), (out / "draft").touch()),
        "draft: is a file, not a folder",
    ),
    "rows": (lambda out: folder_at(out / "metrics.jsonl"), "metrics.jsonl: is a folder, not a"),
    "held-out rows": (lambda out: folder_at(out / "eval.jsonl"), "eval.jsonl: is a folder, not"),
    "lock": (lambda out: folder_at(out / ".lock"), ".lock: is a folder, not a file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_before_anything_is_written(
    small, stopped, tmp_path, capsys, name
):
    """By a dry run as by the run itself, a longer one too."""
    damage, message = DAMAGE[name]
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(out)
    before = stamps(out)
    capsys.readouterr()
    for more in (("--dry-run",), ("--set", "train.steps=9")):
        assert main(arguments(small, out, *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert {path: stamps(out)[path] for path in before if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_a_dry_run_where_another_process_trains_is_refused(small, stopped, capsys):
    with locked(stopped):
        assert main(arguments(small, stopped, "--dry-run")) == 2
    assert "another process is at work there" in capsys.readouterr().err


def test_a_users_own_settings_are_not_replaced_by_the_resolved_ones(small, tmp_path, capsys):
    own = tmp_path / "run/config.toml"
    own.parent.mkdir()
    own.write_text("# mine\n[train]\nsteps = 2\n")
    for more in (("--config", str(own)), (), ("--dry-run",)):
        assert main(arguments(small, own.parent, *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{own}: is there and no run's, and the run's own would replace it" in line
    assert [path.name for path in own.parent.iterdir() if path.name != ".lock"] == ["config.toml"]
    assert own.read_text().startswith("# mine")

    # A run's own is replaced; without a checkpoint too.
    out = tmp_path / "other"
    assert main(arguments(small, out, "--config", str(own), "--max-steps", "1")) == 0
    shutil.rmtree(out / "checkpoints")
    assert main(arguments(small, out, "--config", str(out / "config.toml"))) == 0


def test_a_call_of_few_updates_says_how_to_go_on(small, tmp_path, capsys):
    assert main(arguments(small, tmp_path / "whole")) == 0
    assert "best draft of 4 steps, by held-out accepted length" in capsys.readouterr().out
    few = arguments(small, tmp_path / "run", "--max-steps", "3")
    assert main(few) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped, step 3 of 4 is saved; resume with eagle3fn train --target ")
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000003"]
    assert main(few) == 0
    assert "best draft of 4 steps" in capsys.readouterr().out
    assert same_end(tmp_path / "run", tmp_path / "whole", STEPS)


def test_a_draft_that_was_compared_with_none_is_the_newest(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(small, out, held_out=0)) == 0
    said = capsys.readouterr()
    assert f"{out}/draft: the draft after 4 steps; no sample was held out" in said.out
    written = "".join(path.read_text() for path in out.rglob("*.md"))
    names = " ".join(path.name for path in out.rglob("*"))
    for text in (said.out, said.err, written, names):
        assert "best" not in text.lower()


def test_too_many_held_out_samples_are_refused_before_anything_else_is_said(
    small, tmp_path, capsys
):
    count = len(open_features(small / "features").samples)
    given = [*arguments(small, tmp_path / "run"), "--set", f"data.held_out={count}"]
    assert main(given) == 2
    said = capsys.readouterr()
    assert f"data.held_out = {count}: must be below the number of samples" in said.err
    assert len((said.out + said.err).strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def never_chosen(small: Path) -> Tensor:
    """A hundred tokens that are the target's most likely ones nowhere in the features."""
    head = read_target_tensors(small / "target", torch.float32).head
    features = open_features(small / "features")
    count = torch.zeros(VOCAB, dtype=torch.int64)
    for number in range(len(features.samples)):
        hidden = read_sample(features, number).last_hidden.float()
        count += torch.bincount((hidden @ head.T).argmax(-1), minlength=VOCAB)
    return (count == 0).nonzero()[:100, 0]


def test_a_map_that_counts_no_row_is_refused_before_anything_is_written(small, tmp_path, capsys):
    """Its tokens are those that the target is never surest of."""
    run = tmp_path / "made"
    run.mkdir()
    for name in ("target", "features"):
        (run / name).symlink_to(small / name)
    stored = read_map(small / "vocab.safetensors")
    kept = never_chosen(small)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    vocab_map = VocabMap(t2d, kept - torch.arange(len(kept)))
    save_map(run / "vocab.safetensors", vocab_map, stored.provenance)

    assert main(arguments(run, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "none has its most likely token in the draft vocabulary" in error
    assert "eagle3fn vocab" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", ["nothere", "wandb,nothere", "wandb,", ""])
def test_a_tracker_that_is_none_is_refused(small, tmp_path, capsys, names):
    with pytest.raises(SystemExit) as caught:
        main(arguments(small, tmp_path / "run", "--track", names))
    assert caught.value.code == 2
    assert "must be of tensorboard, wandb, trackio" in capsys.readouterr().err


def test_a_missing_tracker_is_refused_before_anything_is_written(
    small, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("eagle3fn.use.trackers.find_spec", lambda name: None)
    assert main(arguments(small, tmp_path / "run", "--track", "trackio,wandb")) == 2
    assert "--track trackio: the package trackio is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
