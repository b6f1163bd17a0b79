"""The command line from a tiny target to an evaluated draft, and what it answers to bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import locked
from eagle3fn.base.sections import ObjectiveConfig, OptimizerConfig, TrainConfig
from eagle3fn.base.toml import read_toml
from eagle3fn.base.tree import equal
from eagle3fn.cli import main
from eagle3fn.data.parts import begun_threads
from eagle3fn.data.synthesize import Settings, synthesize
from eagle3fn.data.vocab import load_map, read_map, save_map
from eagle3fn.train.defaults import Choice
from tests import devices
from tests.factories import make_map, tiny_model, tiny_template, tiny_tokenizer, write_talks
from tests.train.run_files import rows, same_end
from tests.train.start_ranks import ROOT, Ended, torchrun
from tests.train.two_ranks import compare

STEPS = 8


def settings(*texts: str) -> list[str]:
    """`--set` before each setting."""
    arguments = []
    for text in texts:
        arguments += ["--set", text]
    return arguments


SETTINGS = settings(
    "train.eval_every=4",
    "train.checkpoint_every=3",
    "data.held_out=2",
    "objective.ttt_length=2",
    "data.global_batch=2",
)
TREE = settings(
    "data.global_batch=4",
    "objective.survival=0.7",
    "train.reduce=tree",
    f"train.steps={STEPS}",
)
DIVERGING = settings("optimizer.learning_rate=1e30", "optimizer.warmup_ratio=0.0")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a target, conversations, features, a map and a finished run of 8 steps."""
    root = tmp_path_factory.mktemp("work")
    model = tiny_model(eos_token_id=1, num_hidden_layers=7)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")

    talks = write_talks(root / "talks.jsonl", 10)
    prompts = [json.dumps({"prompt": text}) for text in ("hello", "how many", "list")]
    (root / "prompts.jsonl").write_text("\n".join(prompts))

    features = root / "features"
    extract = ["--conversations", talks, "--out", features, "--max-length", 128]
    assert call(root, "extract", *extract) == 0
    assert call(root, "vocab", "--features", features, "--out", root / "map", "--size", 64) == 0
    assert train(root, root / "run") == 0
    return root


def call(root: Path, command: str, *arguments: object) -> int:
    """`eagle3fn COMMAND --target …` in this process; its exit code."""
    return main([command, "--target", str(root / "target"), *map(str, arguments)])


def places(root: Path, out: Path) -> list[object]:
    """The options of `train` that name files, but the target."""
    return ["--features", root / "features", "--vocab", root / "map", "--out", out]


def train(root: Path, out: Path, *more: object, steps: int = STEPS) -> int:
    """A run in this process. The last of two equal options wins, so `more` may name other files."""
    arguments = [*places(root, out), *SETTINGS, *settings(f"train.steps={steps}"), *more]
    return call(root, "train", *arguments)


def on_ranks(ranks: int, root: Path, out: Path, *more: object) -> Ended:
    """The same run by torchrun, with equal bits asked for and twice the samples an update."""
    command = ["-m", "eagle3fn.cli", "train", "--target", root / "target"]
    return torchrun(ranks, *command, *places(root, out), *SETTINGS, *TREE, *more)


def copy_run(work: Path, out: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(work / "run", out)
    return out


def with_config(target: Path, out: Path, **changes: Any) -> Path:
    """A copy of a target with other values in its `config.json`."""
    shutil.copytree(target, out)
    tree = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(tree | changes))
    return out


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


# Runs.


def on_device(device: str) -> list[str]:
    """Settings for a run on a device; the stand-in for a card is there in its own thread alone."""
    where = settings(f"train.device={device}")
    if devices.STAND_IN:
        where += settings("data.prefetch=0")
    return where


def test_run_on_a_device_leaves_rows_and_a_draft(work, tmp_path, device):
    run = tmp_path / "run"
    assert train(work, run, *on_device(device)) == 0
    assert steps_in(run / "metrics.jsonl") == list(range(1, STEPS + 1))
    draft = load_file(run / "draft/model.safetensors")
    assert draft
    assert all(bool(leaf.count_nonzero()) for leaf in draft.values())


@pytest.mark.skipif(
    devices.STAND_IN, reason="a checkpoint is not read into tensors of the device of shapes alone"
)
def test_run_on_a_device_resumes_to_the_same_bits(work, tmp_path, device):
    """Its last two steps are made again, from the checkpoint of step 6."""
    whole = tmp_path / "whole"
    again = tmp_path / "again"
    assert train(work, whole, *on_device(device)) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/step-00000008")
    assert train(work, again, *on_device(device)) == 0
    assert same_end(whole, again, STEPS)


def test_run_leaves_the_files_that_the_readme_names(work):
    run = work / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "eval.jsonl", "checkpoints", "untrained"}
    assert steps_in(run / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert steps_in(run / "eval.jsonl") == [0, 4, 8]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000008"]


def test_rows_of_an_evaluation_have_loss_and_rates(work):
    for row in rows(work / "run/eval.jsonl"):
        assert row.keys() >= {"step", "loss", "losses", "accuracy", "acceptance", "rows"}
        assert len(row["losses"]) == 2


def test_resolved_configuration_repeats_the_run(work, tmp_path):
    out = tmp_path / "again"
    assert call(work, "train", *places(work, out), "--config", work / "run/config.toml") == 0
    assert same_end(out, work / "run", STEPS)


def test_run_starts_from_a_draft_and_resumes_without_it(work, tmp_path):
    """Step 0 is the draft as it was; a run that goes on does not read its folder."""
    given = shutil.copytree(work / "run/draft", tmp_path / "given")
    start = settings(f"train.init={given}")
    run = tmp_path / "run"
    assert train(work, run, *start) == 0
    before = load_file(given / "model.safetensors")
    assert equal(load_file(run / "untrained/model.safetensors"), before)
    assert not equal(load_file(run / "draft/model.safetensors"), before)
    first, other = (rows(folder / "eval.jsonl")[0]["loss"] for folder in (run, work / "run"))
    assert first < other  # what was trained already

    whole = shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(run / "checkpoints/step-00000008")
    shutil.rmtree(given)
    assert train(work, run, *start) == 0
    assert same_end(run, whole, STEPS)


def test_the_draft_of_a_run_has_a_card_of_its_data(work):
    text = (work / "run/draft/README.md").read_text()
    totals = json.loads((work / "features/index.json").read_text())["totals"]
    supervised = f"{totals['supervised']} supervised tokens"
    assert f"features: {totals['samples']} samples, {supervised}" in text
    best = max(rows(work / "run/eval.jsonl")[1:], key=lambda row: row["accepted_length"])
    assert f"| {best['step']} |" in text and f"{best['accepted_length']:.3f}" in text
    assert str(work) not in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rope_theta": 5e5, "rope_parameters": None}, "its rope_theta is 500000.0"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5], "eagle_config": None}, "its aux_layers"),
        (None, "'random', or the folder of a draft"),
    ],
)
def test_another_draft_is_no_start(work, tmp_path, change, text, capsys):
    given = tmp_path / "given"
    if change:
        shutil.copytree(work / "run/draft", given)
        tree = json.loads((given / "config.json").read_text())
        (given / "config.json").write_text(json.dumps(tree | change))
    assert train(work, tmp_path / "run", *settings(f"train.init={given}")) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_killed_run_resumes_to_the_same_bits(work, tmp_path):
    out = tmp_path / "killed"
    metrics = out / "metrics.jsonl"
    command = [sys.executable, "-m", "eagle3fn.cli", "train", "--target", work / "target"]
    command += [*places(work, out), *SETTINGS, *settings(f"train.steps={STEPS}")]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and lines_in(metrics) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    # A line half written, and a checkpoint half written.
    with metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    shutil.copytree(
        work / "run/checkpoints/step-00000006", out / "checkpoints/.step-00000006.x.tmp"
    )
    assert train(work, out) == 0
    assert same_end(out, work / "run", STEPS)


def lines_in(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_minutes_choose_the_number_of_steps_once(work, tmp_path):
    out = tmp_path / "run"
    assert train(work, out, "--minutes", 0.01, steps=0) == 0
    steps = json.loads((out / "horizon.json").read_text())["steps"]
    assert steps == len(rows(out / "metrics.jsonl")) >= 1

    assert train(work, out, "--minutes", 0.01, steps=0) == 0
    assert json.loads((out / "horizon.json").read_text())["steps"] == steps


# Threads.


def test_run_keeps_the_number_of_threads_that_it_began_with(work, tmp_path, capsys, monkeypatch):
    out = copy_run(work, tmp_path / "run")
    horizon = json.loads((out / "horizon.json").read_text())
    assert horizon["threads"] == torch.get_num_threads() == 1
    tree = settings("train.reduce=tree")
    expect_refusal(capsys, train(work, out, *tree, "--threads", 3), "begun with 1 thread, now")

    # Without a number given, from its file; of a run of earlier versions from the checkpoint.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert train(work, out) == 0
    assert capsys.readouterr().out.startswith(f"1 thread: as it began ({out}/horizon.json)")
    del horizon["threads"]
    (out / "horizon.json").write_text(json.dumps(horizon))
    assert train(work, out) == 0
    place = out / "checkpoints/step-00000008/meta.json"
    assert capsys.readouterr().out.startswith(f"1 thread: as it began ({place})")


def test_extraction_keeps_the_number_of_threads_that_it_began_with(work, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    features = work / "features"
    options = ["--conversations", work / "talks.jsonl", "--out", features, "--max-length", 128]
    assert call(work, "extract", *options) == 0
    begun = f"1 thread: as it began ({features}/shard-00000.json)"
    assert capsys.readouterr().out.startswith(begun)


def test_cut_off_synthesis_keeps_the_number_of_threads_that_it_began_with(tmp_path):
    model, template = tiny_model(), tiny_template()
    out = tmp_path / "talks.jsonl"
    assert begun_threads(out) is None

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(model, template, out, 50, Settings(batch=2), on_progress=stop)
    kept = begun_threads(out)
    assert kept is not None and kept.count == torch.get_num_threads()
    synthesize(model, template, out, 2, Settings(batch=2))
    assert begun_threads(out) is None


# Settings that nobody names.


def test_settings_that_nobody_names_are_chosen_said_and_kept(work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    arguments = [*places(work, out), *settings("train.steps=1", "optimizer.warmup_ratio=0.5")]
    capsys.readouterr()
    assert call(work, "train", *arguments) == 0
    said = capsys.readouterr().out
    assert ", optimizer.learning_rate=0.001 (by hidden size 16)\n" in said
    assert "data.held_out=1 (those that the vocabulary map was not counted on)" in said
    config = read_toml(out / "config.toml")
    assert config["data"]["held_out"] == 1
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert config["optimizer"]["warmup_ratio"] == 0.5  # it was named

    # Another version, which would choose otherwise.
    def other(draft, samples, device):
        return [Choice("optimizer.learning_rate", 0.5, "of a later version")]

    monkeypatch.setattr("eagle3fn.train.defaults.chosen_defaults", other)
    assert call(work, "train", *arguments) == 0
    assert f"as the run began, {out}/config.toml" in capsys.readouterr().out
    assert read_toml(out / "config.toml") == config


def test_nothing_is_chosen_under_a_recipe(work, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*places(work, out), *settings("train.steps=1"), "--recipe", "specforge"]
    capsys.readouterr()
    assert call(work, "train", *arguments) == 0
    assert "chosen: " not in capsys.readouterr().out
    config = read_toml(out / "config.toml")
    assert config["optimizer"]["learning_rate"] == OptimizerConfig().learning_rate
    assert config["objective"]["ttt_length"] == ObjectiveConfig().ttt_length
    assert config["data"]["held_out"] == 0


def test_vocabulary_takes_its_size_from_the_data(work, tmp_path, capsys):
    assert call(work, "vocab", "--features", work / "features", "--out", tmp_path / "map") == 0
    said = capsys.readouterr().out
    assert re.search(r"map: 300 of 300 tokens, 100.00% .*, 100.00% in 1 held-out samples\n", said)


def test_map_says_what_it_has_and_a_run_holds_out_the_same(work, tmp_path, capsys):
    made = ["--features", work / "features", "--out", tmp_path / "map", "--held-out", 3]
    assert call(work, "vocab", *made, "--size", 64) == 0
    said = capsys.readouterr().out
    assert re.search(r"of the target's own choices in them, at \d+ places, are in the map\n", said)
    assert "always in the map: <|im_start|>, <|im_end|>\n" in said
    vocab_map = load_map(tmp_path / "map")
    assert vocab_map.t2d[:2].all()

    # What was said is in the file too.
    stored = read_map(tmp_path / "map").provenance
    assert stored["held_out"] == 3 and stored["always"] == [0, 1]
    (share,) = map(float, re.findall(r"([\d.]+)% of the target's own", said))
    assert stored["choices_held_out"] == pytest.approx(share / 100, abs=1e-4)

    # A run holds out the same samples, and says where it doesn't.
    def trained(out: str, *more: object) -> str:
        run = [
            "--features",
            work / "features",
            "--vocab",
            tmp_path / "map",
            "--out",
            tmp_path / out,
        ]
        capsys.readouterr()
        assert call(work, "train", *run, *settings("train.steps=1"), *more) == 0
        return capsys.readouterr().out

    text = trained("a")
    assert "data.held_out=3 (those that the vocabulary map was not counted on)" in text
    assert "map held out 3" not in text
    assert "run eagle3fn vocab --held-out 4" in trained("b", *settings("data.held_out=4"))

    # A map may serve other features: its coverage of them is said.
    extract = ["--conversations", work / "talks.jsonl", "--out", tmp_path / "few"]
    assert call(work, "extract", *extract, "--max-length", 128, "--limit", 6) == 0
    text = trained("c", "--features", tmp_path / "few")
    assert re.search(r"counted on other samples than \S+few has; .* it has \d", text)
    assert "data.held_out=0 (a tenth of 6 samples, at most 24)" in text


def test_draft_vocabulary_beyond_the_targets_is_refused(work, tmp_path, capsys):
    made = ["--features", work / "features", "--out", tmp_path / "map"]
    code = call(work, "vocab", *made, "--size", 301)
    expect_refusal(capsys, code, "draft_vocab_size = 301", "[1, 300]")
    code = call(work, "vocab", *made, "--size", 1)
    expect_refusal(capsys, code, "draft_vocab_size = 1", "at least 2")
    assert not (tmp_path / "map").exists()


# Whose answers these are.


def test_answers_of_others_are_named_with_what_to_do(work, tmp_path, capsys):
    # A target that is sure of what it writes, which is letters alone.
    sure = tmp_path / "sure"
    shutil.copytree(work / "target", sure)
    model = tiny_model(eos_token_id=1, num_hidden_layers=7)
    letters = tiny_tokenizer()("bcdfghijklm", add_special_tokens=False).input_ids
    weight = model.lm_head.weight
    sharp = 50 * weight[letters]
    weight[:] = 0
    weight[letters] = sharp
    model.generation_config.eos_token_id = 1
    model.save_pretrained(sure)

    def said(command: str, *arguments: object) -> str:
        capsys.readouterr()
        assert main([command, "--target", str(sure), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    # It answers the prompts of others' conversations.
    talks, own = work / "talks.jsonl", tmp_path / "own.jsonl"
    limits = ["--temperature", 0, "--max-new", 40]
    text = said("regenerate", "--conversations", talks, "--out", own, *limits)
    assert re.search(r"own.jsonl: 10 conversations, 10 answers, \d+ of them cut at 40", text)

    # Others' answers are distinguished from these, by `extract` and by `train`.
    foreign = "the answers are not the target's own"
    length = ["--max-length", 128]
    text = said("extract", "--conversations", talks, "--out", tmp_path / "a", *length)
    assert foreign in text
    assert f"regenerate --target {sure} --conversations {talks} --out OWN.jsonl" in text
    text = said("extract", "--conversations", own, "--out", tmp_path / "b", *length)
    assert foreign not in text
    said("vocab", "--features", tmp_path / "b", "--out", tmp_path / "map", "--size", 64)
    run = ["--vocab", tmp_path / "map", "--out", tmp_path / "run", *settings("train.steps=1")]
    assert foreign in said("train", "--features", tmp_path / "a", *run)


# Ranks.


def test_two_ranks_train_as_one_and_one_resumes_for_them_to_the_same_bits(work, tmp_path):
    """Among the files compared is `eval.jsonl`, with the held-out loss."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "tests.train.two_ranks", "--work", tmp_path / "work"]
    command += ["--kill-after", 4, "--out", result, "--", "--target", work / "target"]
    command += ["--features", work / "features", "--vocab", work / "map", *SETTINGS, *TREE]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    found = json.loads(result.read_text())
    assert found["equal"]
    assert found["resumed_from"] in (3, 6)
    for part in found["compared"].values():
        assert len(part) == 4
        assert all(part.values())
    log = (tmp_path / "work/several.log").read_text()
    assert len(re.findall(r"held-out accepted length \d", log)) == 3
    assert all("loss" in row for row in rows(tmp_path / "work/one/eval.jsonl"))


def test_differences_between_two_runs_are_named(work, tmp_path):
    other = copy_run(work, tmp_path / "run")
    assert all(compare(other, work / "run").values())
    for name in ("metrics.jsonl", "eval.jsonl"):
        text = (other / name).read_text()
        (other / name).write_text(text.replace('"accuracy": [', '"accuracy": [0.5, '))
    (other / "draft/config.json").write_text("{}")
    assert list(compare(other, work / "run").values()) == [True, False, False, False]


def test_two_ranks_without_a_named_batch_train_on_a_sample_each(work, tmp_path):
    command = ["-m", "eagle3fn.cli", "train", "--target", work / "target"]
    given = [*places(work, tmp_path / "run"), *settings("train.steps=1", "train.dtype=float32")]
    ended = torchrun(2, *command, *given)
    assert ended.codes == [0], ended.text
    assert ended.text.count("data.global_batch=2 (data.micro_batch = 1 on each of 2 ranks)") == 1


def test_ranks_that_do_not_divide_the_batch_are_refused_once(work, tmp_path):
    ended = on_ranks(2, work, tmp_path / "run", *settings("data.global_batch=3"))
    assert ended.codes == [1]
    message = "make 3 micro-batches an update, 2 ranks must divide them"
    assert ended.text.count(message) == 1, ended.text


# Evaluation.


def test_evaluation_is_lossless_and_the_report_has_its_numbers(work, tmp_path, capsys):
    stage = tmp_path / "demo"
    shutil.copytree(work / "features", stage / "features")
    shutil.copytree(work / "run", stage / "train")
    (stage / "stages.json").write_text('{"train": 1.5, "evaluate": 2.0}')
    untrained = work / "run/untrained"
    arguments = ["--draft", untrained, "--untrained", untrained, "--tasks", 2, "--max-new", 8]
    arguments += ["--prompts", work / "prompts.jsonl", "--out", stage / "evaluation.json"]
    assert call(work, "evaluate", *arguments) == 0
    assert main(["report", "--run", str(stage)]) == 0

    table = capsys.readouterr().out
    for label in ("faster", "same text", "accepted length", "training", "wall seconds"):
        assert label in table
    report = json.loads((stage / "report.json").read_text())
    assert report["lossless"] is True
    assert report["prompts"] == "prompts.jsonl"
    assert report["wall_s"] == 3.5
    samples = sum(each["samples"] for each in report["data"]["lengths"])
    assert samples == report["data"]["samples"] > 0
    assert report["target"] and report["planned_steps"] == report["steps"]
    assert report.keys() >= {
        "accepted_length",
        "acceptance_by_position",
        "tokens_per_s",
        "plain_tokens_per_s",
        "train_tokens_per_s",
        "supervised_tokens",
        "untrained_accepted_length",
    }
    assert (stage / "report.html").read_text().startswith("<!DOCTYPE html>")


# Refusals: exit code 2 and one line that names what is wrong.


def expect_refusal(capsys, code: int, *texts: str) -> None:
    assert code == 2
    error = capsys.readouterr().err
    for text in texts:
        assert text in error


def test_features_that_are_missing_or_damaged_are_refused(work, tmp_path, capsys):
    out = tmp_path / "run"
    missing = ["--features", tmp_path / "none"]
    expect_refusal(capsys, train(work, out, *missing), "none", "extract")

    broken = tmp_path / "features"
    shutil.copytree(work / "features", broken)
    shard = broken / "shard-00000.safetensors"
    named = ["--features", broken]

    # Cut.
    shard.write_bytes(shard.read_bytes()[:-100])
    expect_refusal(capsys, train(work, out, *named), "shard-00000.safetensors", "bytes")

    # With a NaN.
    tensors = load_file(work / "features/shard-00000.safetensors")
    key = next(name for name in tensors if name.endswith("aux_hidden"))
    tensors[key][1, 2] = float("nan")
    save_file(tensors, shard)
    expect_refusal(capsys, train(work, out, *named), "shard-00000.safetensors")

    # Gone.
    shard.unlink()
    expect_refusal(capsys, train(work, out, *named), "shard-00000.safetensors", "missing")
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (settings("objective.ttt_length=0"), ["objective.ttt_length", "at least 1"]),
        (
            settings("objective.loss=kls"),
            ["objective.loss = 'kls'", "'kl', 'rkl'"],
        ),
        (settings("objective.lenght=3"), ["unknown key objective.lenght; did you mean"]),
        (settings("data.held_out=10"), ["data.held_out"]),
        (settings("draft.max_position_embeddings=4"), ["max_position_embeddings = 4"]),
        (["--config", "no.toml"], ["no.toml"]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(work, tmp_path, capsys, arguments, texts):
    expect_refusal(capsys, train(work, tmp_path / "run", *arguments), *texts)


def test_values_that_a_field_does_not_list_are_refused():
    with pytest.raises(UserError, match=r"train\.reduce = .mean.: must be .sum. or .tree."):
        TrainConfig(reduce="mean")  # pyright: ignore


def test_map_of_another_target_is_refused(work, tmp_path, capsys):
    vocab_map = make_map(300, 64, torch.Generator().manual_seed(0))
    made_for = {"target": "other/model", "target_hash": "0" * 64}
    save_map(tmp_path / "map", vocab_map, made_for)
    code = train(work, tmp_path / "run", "--vocab", tmp_path / "map")
    expect_refusal(capsys, code, "other/model")


def test_checkpoint_of_another_configuration_is_refused(work, tmp_path, capsys):
    out = copy_run(work, tmp_path / "run")
    code = train(work, out, *settings("optimizer.learning_rate=0.5"))
    expect_refusal(capsys, code, "optimizer.learning_rate was", "is 0.5")


def test_damaged_checkpoint_is_refused(work, tmp_path, capsys):
    out = copy_run(work, tmp_path / "run")
    state = next((out / "checkpoints").glob("*8/*.distcp"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    expect_refusal(capsys, train(work, out), state.name, "damaged")


def test_loss_that_is_not_finite_stops_with_the_samples_named(work, tmp_path, capsys):
    code = train(work, tmp_path / "run", *DIVERGING)
    expect_refusal(capsys, code, "not finite", "row", "learning_rate")


def test_refused_call_leaves_the_run_as_it_was(work, tmp_path, capsys):
    out = copy_run(work, tmp_path / "run")
    before = {}
    for path in out.iterdir():
        if path.is_file() and path.name != ".lock":
            before[path.name] = path.read_bytes()

    other_rate = settings("optimizer.learning_rate=0.5")
    expect_refusal(capsys, train(work, out, *other_rate), "learning_rate")
    expect_refusal(capsys, train(work, out, steps=5), "train.steps")
    expect_refusal(capsys, train(work, out, "--minutes", 3), "--minutes")
    expect_refusal(capsys, train(work, out, "--minutes", 3, steps=0), "chosen by steps")
    for name, content in before.items():
        assert (out / name).read_bytes() == content, name


def test_damaged_record_of_the_steps_is_refused(work, tmp_path, capsys):
    out = copy_run(work, tmp_path / "run")
    (out / "horizon.json").write_text("[]")
    expect_refusal(capsys, train(work, out), "horizon.json")


def test_second_process_in_a_folder_is_refused(work, tmp_path, capsys):
    with locked(tmp_path / "run"):
        expect_refusal(capsys, train(work, tmp_path / "run"), "another process")
    assert train(work, tmp_path / "run") == 0


def test_features_of_other_taps_are_refused(work, tmp_path, capsys):
    code = train(work, tmp_path / "run", *settings("draft.aux_layers=[0,2,3]"))
    expect_refusal(capsys, code, "index.json", "[0, 2, 3]")


def test_features_of_another_head_are_refused_before_training(work, tmp_path, capsys):
    """Same configuration, other weights: fine-tuned, or read from another file."""
    target = shutil.copytree(work / "target", tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    code = train(work, tmp_path / "run", "--target", target)
    expect_refusal(capsys, code, "lm_head.weight", "not the head that the features were made with")
    assert not (tmp_path / "run").exists()


def test_features_of_another_target_are_refused(work, tmp_path, capsys):
    other = with_config(work / "target", tmp_path / "target", rms_norm_eps=0.25)
    arguments = [*places(work, tmp_path / "run"), *SETTINGS, *settings("train.steps=2")]
    code = main(["train", "--target", str(other), *map(str, arguments)])
    expect_refusal(capsys, code, "another target")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data.max_length=3"], "no row to train"),
        (["train.device=nowhere"], "nowhere"),
        (["data.a=1", "data.a.b=2"], "not a section"),
        (["train.seed=99999999999999999"], "train.seed"),
        (["optimizer.eps=-1.0"], "optimizer.eps"),
        (['draft.rope_scaling={rope_type="llama3"}'], "rope_scaling.factor"),
        (["draft.max_position_embeddings=20"], "row"),
    ],
)
def test_refusal_is_one_line(work, tmp_path, capsys, overrides, text):
    capsys.readouterr()
    assert train(work, tmp_path / "run", *settings(*overrides)) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1, error


def test_output_folder_that_is_a_file_is_refused(work, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    expect_refusal(capsys, train(work, taken), "taken")


@pytest.mark.parametrize("minutes", ["nan", "-1", "0", "x"])
def test_minutes_must_be_a_positive_number(minutes):
    named = ["--target", "t", "--features", "f", "--vocab", "v", "--out", "o"]
    with pytest.raises(SystemExit) as error:
        main(["train", *named, "--minutes", minutes])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "16"},
        {"draft_vocab_size": "64"},
        {"num_attention_heads": 0, "head_dim": None},
        {"eagle_config": 3},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": 3}},
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
        {"rope_theta": "x"},
        {"architectures": [1]},
        {"rms_norm_eps": -1},
    ],
)
def test_malformed_draft_configuration_is_refused(work, tmp_path, capsys, change):
    tree = json.loads((work / "run/untrained/config.json").read_text())
    draft = tmp_path / "draft.json"
    draft.write_text(json.dumps(tree | change))
    code = train(work, tmp_path / "run", "--draft-config", draft)
    expect_refusal(capsys, code, "draft.json")


@pytest.mark.parametrize("option", ["--config", "--draft-config", "--set"])
def test_an_option_that_is_empty_is_refused(work, tmp_path, capsys, option):
    code = train(work, tmp_path / "run", option, "")
    expect_refusal(capsys, code, f"{option}: is empty; name one, or leave it out")
    assert not (tmp_path / "run").exists()


def test_taps_are_those_that_are_named(work, tmp_path, capsys):
    features = tmp_path / "features"
    words = ["--conversations", work / "talks.jsonl", "--out", features, "--max-length", 128]
    assert call(work, "extract", *words, "--aux-layers", "0,2,5") == 0
    index = json.loads((features / "index.json").read_text())
    assert index["target"]["aux_layers"] == [0, 2, 5]

    for taps, named in (("5,2", "must ascend"), ("0,99", "each must be in [0, 7)")):
        words[3] = tmp_path / "refused"
        expect_refusal(capsys, call(work, "extract", *words, "--aux-layers", taps), named)
        assert not (tmp_path / "refused").exists()


def test_unreadable_conversations_are_refused(work, tmp_path, capsys):
    talks = tmp_path / "talks.jsonl"
    out = tmp_path / "features"

    def extract(max_length: int) -> int:
        arguments = ["--conversations", talks, "--out", out, "--max-length", max_length]
        return call(work, "extract", *arguments)

    talks.write_text((work / "talks.jsonl").read_text() + "{broken\n")
    expect_refusal(capsys, extract(128), "talks.jsonl:11", "not JSON")
    talks.write_text("")
    expect_refusal(capsys, extract(128), "talks.jsonl")
    expect_refusal(capsys, extract(9999), "9999", "256")
    assert not out.exists()


def test_vision_language_target_is_refused_by_name(work, tmp_path, capsys):
    target = with_config(work / "target", tmp_path / "vlm", vision_config={"depth": 1})
    arguments = ["--conversations", str(work / "talks.jsonl"), "--out", str(tmp_path / "x")]
    code = main(["extract", "--target", str(target), *arguments])
    expect_refusal(capsys, code, "vision")
