"""`eagle3fn train` as people call it again: longer, elsewhere, from a draft."""

import json
import shutil
from pathlib import Path

import pytest

from eagle3fn.base.toml import read_toml
from eagle3fn.cli import main
from tests.small_run import SIZE, write_run
from tests.train.run_files import rows, same_rows

STEPS = 4
SETTINGS = ("data.held_out=2", "objective.ttt_length=2", "train.checkpoint_every=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, features, a map and a finished run."""
    root = write_run(tmp_path_factory.mktemp("work"))
    assert train(root, root / "run", *SETTINGS, f"train.steps={STEPS}") == 0
    return root


def train(root: Path, out: Path, *settings: str, more: tuple[object, ...] = ()) -> int:
    """`eagle3fn train` in this process; its exit code."""
    arguments = ["--target", root / "target", "--features", root / "features"]
    arguments += ["--vocab", root / "vocab.safetensors", "--out", out, *more]
    for setting in settings:
        arguments += ["--set", setting]
    return main(["train", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a call that was refused."""
    assert code == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    return line


def test_same_call_again_says_that_it_is_finished(work, capsys):
    before = rows(work / "run/metrics.jsonl")
    assert train(work, work / "run") == 0
    said = capsys.readouterr().out
    assert f"{work}/run: finished, step 4 of 4 is its last one" in said
    assert f"{work}/run/draft: the best draft of 4 steps" in said
    assert rows(work / "run/metrics.jsonl") == before


def test_longer_run_needs_its_new_length_alone(work, tmp_path, capsys):
    out = shutil.copytree(work / "run", tmp_path / "run")
    assert train(work, out, "train.steps=6") == 0
    said = capsys.readouterr().out
    for line in ("resumed from step 4 of 6", "train.steps: 6, was 4", "learning rate: "):
        assert line in said
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert "the best draft of 6 steps" in said

    line = refused(capsys, train(work, out, "train.steps=5"))
    assert "train.steps = 5: " in line and "has made 6" in line


def test_run_goes_on_elsewhere_under_what_is_named_alone(work, tmp_path, capsys):
    out = tmp_path / "new"
    source = ("--from", work / "run/checkpoints/step-00000002")
    assert train(work, out, "optimizer.learning_rate=0.02", more=source) == 0
    said = capsys.readouterr().out
    assert f"settings that are not named: those of {source[1]}" in said
    assert f"goes on from step 2 of {source[1]}, to step 4" in said
    assert "optimizer.learning_rate: 0.02, was 0.001" in said

    config = read_toml(out / "config.toml")
    begun = read_toml(work / "run/config.toml")
    assert config.pop("optimizer") == begun.pop("optimizer") | {"learning_rate": 0.02}
    assert config == begun
    assert not same_rows(out, work / "run", ("metrics.jsonl",))

    # Where it is from is on the draft's card, without a path of this machine.
    text = (out / "draft/README.md").read_text()
    assert "| went on from | step 2 of the run run; optimizer.learning_rate: 0.02, was " in text
    assert str(work) not in text

    # The same call again resumes, and one that names the folder alone.
    for more in (source, ()):
        assert train(work, out, "optimizer.learning_rate=0.02", more=more) == 0
        assert f"{out}: finished, step 4 of 4" in capsys.readouterr().out


def test_longer_elsewhere_from_the_newest_under_a_recipe(work, tmp_path, capsys):
    """A recipe's own settings come before those of the checkpoint; the others are that one's."""
    out = tmp_path / "new"
    more = ("--from", work / "run", "--recipe", "specforge")
    named = ("train.steps=5", "optimizer.name=muon")
    assert train(work, out, *named, more=more) == 0
    said = capsys.readouterr().out
    assert "objective.numerics: plain, was fast" in said
    assert "recipe: specforge, was none" in said
    config = read_toml(out / "config.toml")
    assert config["objective"]["ttt_length"] == 2
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]

    assert train(work, out, *named, more=more) == 0
    assert "finished, step 5 of 5" in capsys.readouterr().out


def test_an_optimizer_without_a_chosen_rate_needs_one(work, tmp_path, capsys):
    """Once: a run that goes on keeps its own, and so does one that goes on from it."""
    out = tmp_path / "run"
    named = (*SETTINGS, "train.steps=2", "optimizer.name=sgd")
    line = refused(capsys, train(work, out, *named))
    assert "optimizer.learning_rate: none is chosen for optimizer.name = 'sgd'; name one" in line
    line = refused(capsys, train(work, out, *named, more=("--recipe", "specforge")))
    assert "none is chosen for optimizer.name = 'sgd'" in line
    assert not out.exists()

    assert train(work, out, *named, "optimizer.learning_rate=0.5") == 0
    assert train(work, out, "optimizer.name=sgd", "train.steps=3") == 0
    assert read_toml(out / "config.toml")["optimizer"]["learning_rate"] == 0.5
    new, source = tmp_path / "new", ("--from", out)
    assert train(work, new, "optimizer.name=sgd", "train.steps=4", more=source) == 0
    assert read_toml(new / "config.toml")["optimizer"]["learning_rate"] == 0.5
    line = refused(
        capsys, train(work, tmp_path / "lion", "optimizer.name=lion", "train.steps=4", more=source)
    )
    assert "none is chosen for optimizer.name = 'lion'" in line


def test_a_trained_draft_gets_a_lower_rate(work, tmp_path, capsys):
    start = f"train.init={work}/run/draft"
    assert train(work, tmp_path / "run", *SETTINGS, "train.steps=1", start) == 0
    said = capsys.readouterr().out
    rate = read_toml(tmp_path / "run/config.toml")["optimizer"]["learning_rate"]
    assert rate == 3.3e-4
    assert f"learning_rate={rate} (from a trained draft, a third of 0.001)" in said


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (("optimizer.name=adamw",), "optimizer.name was 'muon', is 'adamw'"),
        ((), "nothing is left to train; set train.steps above 4"),
        (("train.init=random",), "train.init was target, is random"),
    ],
)
def test_what_cannot_go_on_elsewhere_is_refused(work, tmp_path, capsys, settings, text):
    steps = ("train.steps=9",) if settings else ()
    line = refused(
        capsys, train(work, tmp_path / "new", *settings, *steps, more=("--from", work / "run"))
    )
    assert text in line
    assert not (tmp_path / "new").exists()


def test_run_is_not_continued_elsewhere_in_its_own_folder(work, capsys):
    line = refused(capsys, train(work, work / "run", more=("--from", work / "run")))
    assert f"--out {work}/run: is --from too" in line
    more = ("--from", work / "run/checkpoints/step-00000002")
    line = refused(capsys, train(work, work / "run", more=more))
    assert "holds a run of its own" in line


@pytest.mark.parametrize("place", ["draft", "sub/draft", "."])
def test_draft_to_start_from_is_not_written_over(work, tmp_path, capsys, place):
    """A run's own draft, or a draft's folder as a run's; by a link too."""
    out = tmp_path / "new"
    start = out / place
    shutil.copytree(work / "run/draft", start, dirs_exist_ok=True)
    linked = tmp_path / "linked"
    linked.symlink_to(start)
    before = sorted(out.rglob("*"))
    for named in (start, linked):
        line = refused(capsys, train(work, out, *SETTINGS, f"train.init={named}"))
        assert f"--out {out}: train.init = {named} lies there, and" in line
    assert sorted(out.rglob("*")) == before


def test_start_from_a_draft_says_whose_rows_the_head_has(work, tmp_path, capsys):
    """Over another vocabulary, of another size: the tokens that both have are counted."""
    vocab = tmp_path / "map.safetensors"
    named = ["--target", work / "target", "--features", work / "features", "--size", SIZE // 4]
    assert main(["vocab", *map(str, [*named, "--out", vocab])]) == 0
    start = f"train.init={work}/run/draft"
    code = train(work, tmp_path / "run", start, "train.steps=1", more=("--vocab", vocab))
    assert code == 0
    line = f"its head has rows of 64 of 64 draft tokens; {SIZE - 64} of its own are left out"
    assert line in capsys.readouterr().out
    horizon = json.loads((tmp_path / "run/horizon.json").read_text())
    assert horizon["chosen_by"] == "steps"

    # A run that goes on reads no draft, and says none.
    assert train(work, tmp_path / "run", more=("--vocab", vocab)) == 0
    assert "its head has rows" not in capsys.readouterr().out


def test_switches_are_named_once(work, tmp_path, capsys):
    """A run that goes on, in its folder or another, has the draft that it began with."""
    named = ("draft.fc_norm=true", "draft.num_hidden_layers=2", "draft.draft_window=9")
    out = tmp_path / "run"
    assert train(work, out, *SETTINGS, *named, "train.steps=2") == 0
    assert train(work, out, "train.steps=3") == 0
    assert train(work, tmp_path / "new", "train.steps=4", more=("--from", out)) == 0
    for folder in (out, tmp_path / "new"):
        draft = read_toml(folder / "config.toml")["draft"]
        assert (draft["fc_norm"], draft["num_hidden_layers"], draft["draft_window"]) == (True, 2, 9)

    # Another one is still refused, in both.
    capsys.readouterr()
    for folder, more in ((out, ()), (tmp_path / "other", ("--from", out))):
        changed = ("draft.fc_norm=false", "train.steps=9")
        line = refused(capsys, train(work, folder, *changed, more=more))
        assert "draft.fc_norm was True, is False" in line
