"""The command line from a tiny target to an evaluated draft, and what it answers to bad input."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.config import TrainConfig
from eagle3fn.base.errors import UserError
from eagle3fn.cli import main
from eagle3fn.train import bind, loop
from eagle3fn.train.checkpoint import read_leaves
from tests import devices
from tests.data_tools import tiny_model, tiny_tokenizer, write_talks
from tests.train.start_ranks import ROOT, Ended, torchrun

SETTINGS = [
    *(
        "--set",
        "train.eval_every=4",
        "--set",
        "train.checkpoint_every=3",
        "--set",
        "data.held_out=2",
    ),
    *("--set", "objective.ttt_length=2", "--set", "data.global_batch=2"),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with a target, conversations, features, a map and a finished run of 8 steps."""
    root = tmp_path_factory.mktemp("house")
    model = tiny_model(eos_token_id=1)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    write_talks(root / "talks.jsonl", 10)
    prompts = [json.dumps({"prompt": text}) for text in ("hello", "how many", "list")]
    (root / "prompts.jsonl").write_text("\n".join(prompts))
    assert (
        call(
            root,
            "extract",
            "--conversations",
            root / "talks.jsonl",
            "--out",
            root / "features",
            "--max-length",
            128,
        )
        == 0
    )
    assert (
        call(root, "vocab", "--features", root / "features", "--out", root / "map", "--size", 64)
        == 0
    )
    assert train(root, root / "run") == 0
    return root


def call(root: Path, command: str, *arguments: object) -> int:
    return main([command, "--target", str(root / "target"), *map(str, arguments)])


def train(root: Path, out: Path, *more: object, steps: int = 8, **changes: Path) -> int:
    places = {"features": root / "features", "vocab": root / "map", **changes}
    named = [text for name, path in places.items() for text in (f"--{name}", path)]
    return call(
        root, "train", *named, "--out", out, *SETTINGS, "--set", f"train.steps={steps}", *more
    )


def rows(path: Path) -> list[dict]:
    timeless = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in timeless]


def on_ranks(ranks: int, root: Path, out: Path, *more: object) -> Ended:
    """The same run by torchrun, bit-equal sums asked for, with twice the samples an update."""
    places = ["--features", root / "features", "--vocab", root / "map", "--out", out]
    command = ["-m", "eagle3fn.cli", "train", "--target", root / "target", *places, *SETTINGS]
    return torchrun(ranks, *command, *TREE, *more)


TREE = ["--set", "data.global_batch=4", "--set", "train.reduce=tree", "--set", "train.steps=8"]


def same_run(a: Path, b: Path) -> bool:
    last = "checkpoints/step-00000008"
    one, two = read_leaves(a / last), read_leaves(b / last)
    equal = one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    return equal and all(
        rows(a / name) == rows(b / name) for name in ("metrics.jsonl", "eval.jsonl")
    )


def on_device(device: str) -> list[str]:
    where = ["--set", f"train.device={device}"]
    return (
        [*where, "--set", "data.prefetch=0"] if devices.STAND_IN else where
    )  # it is there in its own thread alone


def test_a_run_on_a_device_leaves_rows_and_a_draft(house, tmp_path, device):
    assert train(house, tmp_path / "run", *on_device(device)) == 0
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))
    draft = load_file(tmp_path / "run" / "draft" / "model.safetensors")
    assert draft and all(bool(leaf.count_nonzero()) for leaf in draft.values())


@pytest.mark.skipif(
    devices.STAND_IN, reason="a checkpoint is not read into tensors of the device of shapes alone"
)
def test_a_run_on_a_device_goes_on_from_its_checkpoint_to_the_same_bits(house, tmp_path, device):
    """Its last two steps are made again, from the checkpoint of step 6."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(house, whole, *on_device(device)) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-00000008")
    assert train(house, again, *on_device(device)) == 0
    assert same_run(whole, again)


def test_a_run_leaves_what_the_readme_says(house):
    run = house / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "eval.jsonl", "checkpoints", "untrained"}
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 9))
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [0, 4, 8]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]


def test_the_resolved_configuration_repeats_the_run(house, tmp_path):
    out = tmp_path / "again"
    places = ["--features", house / "features", "--vocab", house / "map", "--out", out]
    assert call(house, "train", *places, "--config", house / "run/config.toml") == 0
    assert same_run(out, house / "run")


def test_a_killed_run_goes_on_to_the_same_bits(house, tmp_path):
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "eagle3fn.cli",
        "train",
        "--target",
        house / "target",
        "--features",
        house / "features",
        "--vocab",
        house / "map",
        "--out",
        out,
        *SETTINGS,
        "--set",
        "train.steps=8",
    ]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and len(metrics.read_text().splitlines()) >= 4
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # a line half written
    shutil.copytree(
        house / "run/checkpoints/step-00000006", out / "checkpoints/.step-00000006.x.tmp"
    )
    assert train(house, out) == 0
    assert same_run(out, house / "run")


def test_two_ranks_train_as_one_does_to_the_bit_and_one_goes_on_for_them(house, tmp_path):
    places = [
        "--target",
        house / "target",
        "--features",
        house / "features",
        "--vocab",
        house / "map",
    ]
    command = [sys.executable, ROOT / "tests/train/two_ranks.py", "--work", tmp_path / "work", "--kill-after", 4,
               "--out", tmp_path / "told.json", "--", *places, *SETTINGS, *TREE]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["equal"]
    assert told["resumed_from"] in (3, 6)
    assert all(len(part) == 4 and all(part.values()) for part in told["compared"].values())
    assert (tmp_path / "work/several.log").read_text().count("held-out accepted length") == 3


def test_what_differs_between_two_runs_is_named(house, tmp_path):
    from tests.train.two_ranks import compare

    other = tmp_path / "run"
    shutil.copytree(house / "run", other)
    assert all(compare(other, house / "run").values())
    for name in ("metrics.jsonl", "eval.jsonl"):
        (other / name).write_text(
            (other / name).read_text().replace('"accuracy": [', '"accuracy": [0.5, ')
        )
    (other / "draft/config.json").write_text("{}")
    assert list(compare(other, house / "run").values()) == [True, False, False, False]


def test_ranks_that_do_not_divide_the_batch_are_refused_once(house, tmp_path):
    ended = on_ranks(2, house, tmp_path / "run", "--set", "data.global_batch=3")
    assert ended.codes == [1]
    assert ended.text.count("make 3 micro-batches an update, 2 ranks must divide them") == 1, (
        ended.text
    )


def test_evaluate_is_lossless_and_report_gathers(house, tmp_path, capsys):
    stage = tmp_path / "demo"
    shutil.copytree(house / "features", stage / "features")
    shutil.copytree(house / "run", stage / "train")
    (stage / "stages.json").write_text('{"train": 1.5, "evaluate": 2.0}')
    code = call(house, "evaluate", "--draft", house / "run/untrained", "--prompts", house / "prompts.jsonl",
                "--out", stage / "evaluation.json", "--tasks", 2, "--max-new", 8,
                "--untrained", house / "run/untrained")  # fmt: skip
    assert code == 0
    assert main(["report", "--run", str(stage)]) == 0
    report = json.loads((stage / "report.json").read_text())
    table = capsys.readouterr().out
    assert all(
        label in table
        for label in ("lossless in fp32", "break-even", "training tokens/s", "wall seconds")
    )
    assert report["lossless"] is True
    assert report["prompts"] == "prompts.jsonl"
    assert report["wall_s"] == 3.5
    wanted = (
        "accepted_length acceptance_by_position tokens_per_s plain_tokens_per_s train_tokens_per_s"
    )
    assert set(wanted.split()) | {"supervised_tokens", "untrained_accepted_length"} <= report.keys()
    assert (stage / "curves.png").read_bytes()[:4] == b"\x89PNG"


def expect_refusal(capsys, code: int, *texts: str) -> None:
    assert code == 2
    error = capsys.readouterr().err
    for text in texts:
        assert text in error


def test_bad_features_are_refused(house, tmp_path, capsys):
    broken = tmp_path / "features"
    expect_refusal(
        capsys, train(house, tmp_path / "o", features=tmp_path / "none"), "none", "extract"
    )
    shutil.copytree(house / "features", broken)
    shard = broken / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    expect_refusal(
        capsys, train(house, tmp_path / "o", features=broken), "shard-00000.safetensors", "bytes"
    )
    tensors = load_file(house / "features/shard-00000.safetensors")
    key = next(name for name in tensors if name.endswith("aux_hidden"))
    tensors[key][1, 2] = float("nan")
    save_file(tensors, shard)
    expect_refusal(capsys, train(house, tmp_path / "o", features=broken), "shard-00000.safetensors")
    shard.unlink()
    expect_refusal(
        capsys, train(house, tmp_path / "o", features=broken), "shard-00000.safetensors", "missing"
    )
    assert not (tmp_path / "o/checkpoints").exists()


def test_bad_settings_are_refused(house, tmp_path, capsys):
    out = tmp_path / "o"
    expect_refusal(
        capsys,
        train(house, out, "--set", "objective.ttt_length=0"),
        "objective.ttt_length",
        "at least 1",
    )
    expect_refusal(
        capsys,
        train(house, out, "--set", "objective.loss=lk"),
        "objective.loss = 'lk'",
        "'kl' or 'lk_alpha'",
    )
    with pytest.raises(UserError, match=r"train\.reduce = .mean.: must be .sum. or .tree."):
        TrainConfig(reduce="mean")  # pyright: ignore
    expect_refusal(
        capsys, train(house, out, "--set", "objective.lenght=3"), "unknown key objective.lenght"
    )
    expect_refusal(capsys, train(house, out, "--set", "data.held_out=10"), "data.held_out")
    expect_refusal(
        capsys,
        train(house, out, "--set", "draft.max_position_embeddings=4"),
        "max_position_embeddings = 4",
    )
    expect_refusal(capsys, train(house, out, "--config", tmp_path / "no.toml"), "no.toml")


def test_a_map_of_another_target_is_refused(house, tmp_path, capsys):
    from eagle3fn.data.vocab import build_map, save_map

    save_map(
        tmp_path / "map",
        build_map(torch.arange(300), 64),
        {"target": "other/model", "target_hash": "0" * 64},
    )
    expect_refusal(capsys, train(house, tmp_path / "o", vocab=tmp_path / "map"), "other/model")


def test_a_checkpoint_of_another_run_is_refused(house, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(house / "run", out)
    expect_refusal(
        capsys,
        train(house, out, "--set", "optimizer.learning_rate=0.5"),
        "optimizer.learning_rate was",
        "is 0.5",
    )
    state = next((out / "checkpoints").glob("*8/*.distcp"))
    whole = bytearray(state.read_bytes())
    whole[len(whole) // 2] ^= 1
    state.write_bytes(whole)
    expect_refusal(capsys, train(house, out), state.name, "damaged")


def test_a_loss_that_is_not_finite_stops_with_the_samples_named(house, tmp_path, capsys):
    code = train(
        house,
        tmp_path / "o",
        "--set",
        "optimizer.learning_rate=1e30",
        "--set",
        "optimizer.warmup_ratio=0.0",
    )
    expect_refusal(capsys, code, "not finite", "row", "learning_rate")


def test_metrics_read_one_step_late_are_the_same(house, tmp_path, capsys, monkeypatch):
    """As on a device that is not waited for; before an evaluation or a checkpoint everything is read."""
    out, plain, seen = tmp_path / "late", bind.step, []

    def step(*args, **kwargs):
        metrics = out / "metrics.jsonl"
        seen.append(len(metrics.read_text().splitlines()) if metrics.exists() else 0)
        return plain(*args, **kwargs)

    monkeypatch.setattr(loop, "_is_late", lambda device: True)
    monkeypatch.setattr(bind, "step", step)
    assert train(house, out) == 0
    assert seen == [0, 0, 1, 3, 4, 4, 6, 6]
    assert same_run(out, house / "run")
    huge = ("--set", "optimizer.learning_rate=1e30", "--set", "optimizer.warmup_ratio=0.0")
    expect_refusal(
        capsys, train(house, tmp_path / "o", *huge), "not finite", "row", "learning_rate"
    )


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_that_cannot_be_read_loses_no_metrics(late, house, tmp_path, capsys, monkeypatch):
    plain, out = loop.batches, tmp_path / "run"

    def broken(*args):
        yield from itertools.islice(plain(*args), 2)
        raise UserError("shard 7: truncated")

    monkeypatch.setattr(loop, "_is_late", lambda device: late)
    monkeypatch.setattr(loop, "batches", broken)
    expect_refusal(capsys, train(house, out), "shard 7: truncated")
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2]


def test_a_refused_call_leaves_the_run_as_it_was(house, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(house / "run", out)
    before = {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.is_file() and path.name != ".lock"
    }
    expect_refusal(
        capsys, train(house, out, "--set", "optimizer.learning_rate=0.5"), "learning_rate"
    )
    expect_refusal(capsys, train(house, out, steps=5), "train.steps")
    expect_refusal(capsys, train(house, out, "--minutes", 3), "--minutes")
    expect_refusal(capsys, train(house, out, steps=0), "chosen by steps")
    assert all((out / name).read_bytes() == text for name, text in before.items())
    (out / "horizon.json").write_text("[]")
    expect_refusal(capsys, train(house, out), "horizon.json")


def test_minutes_choose_the_steps_once(house, tmp_path):
    out = tmp_path / "run"
    assert train(house, out, "--minutes", 0.01, steps=0) == 0
    steps = json.loads((out / "horizon.json").read_text())["steps"]
    assert steps == len(rows(out / "metrics.jsonl")) >= 1
    assert train(house, out, "--minutes", 5, steps=0) == 0
    assert json.loads((out / "horizon.json").read_text())["steps"] == steps


def test_one_process_trains_in_a_folder(house, tmp_path, capsys):
    from eagle3fn.base.files import locked

    with locked(tmp_path / "run"):
        expect_refusal(capsys, train(house, tmp_path / "run"), "another process")
    assert train(house, tmp_path / "run") == 0


def test_features_of_other_taps_or_another_target_are_refused(house, tmp_path, capsys):
    expect_refusal(
        capsys,
        train(house, tmp_path / "o", "--set", "draft.aux_layers=[0,2,3]"),
        "index.json",
        "[0, 2, 3]",
    )
    other = tmp_path / "target"
    shutil.copytree(house / "target", other)
    tree = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**tree, "rms_norm_eps": 0.25}))
    arguments = [
        "--features",
        house / "features",
        "--vocab",
        house / "map",
        "--out",
        tmp_path / "o",
        *SETTINGS,
    ]
    code = main(["train", "--target", str(other), *map(str, arguments), "--set", "train.steps=2"])
    expect_refusal(capsys, code, "another target")


def test_what_cannot_be_trained_or_written_is_one_line(house, tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("")
    capsys.readouterr()
    for arguments, text in (
        (("--set", "data.max_length=3"), "no row to train"),
        (("--set", "train.device=nowhere"), "nowhere"),
        (("--set", "data.a=1", "--set", "data.a.b=2"), "not a section"),
        (("--set", "train.seed=99999999999999999"), "train.seed"),
        (("--set", "optimizer.eps=-1.0"), "optimizer.eps"),
        (("--set", 'draft.rope_scaling={rope_type="llama3"}'), "rope_scaling.factor"),
        (("--set", "draft.max_position_embeddings=20"), "row"),
    ):
        assert train(house, tmp_path / "o", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert text in error, error
        assert len(error.strip().splitlines()) == 1, error
    assert train(house, taken) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["nan", "-1", "0", "x"])
def test_minutes_must_be_a_time(house, minutes):
    with pytest.raises(SystemExit) as error:
        main(
            [
                "train",
                "--target",
                "t",
                "--features",
                "f",
                "--vocab",
                "v",
                "--out",
                "o",
                "--minutes",
                minutes,
            ]
        )
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
def test_malformed_draft_configurations_are_refused(house, tmp_path, capsys, change):
    tree = json.loads((house / "run/untrained/config.json").read_text())
    (tmp_path / "draft.json").write_text(json.dumps({**tree, **change}))
    expect_refusal(
        capsys,
        train(house, tmp_path / "o", "--draft-config", tmp_path / "draft.json"),
        "draft.json",
    )


def test_unreadable_conversations_are_refused(house, tmp_path, capsys):
    talks = tmp_path / "talks.jsonl"
    talks.write_text((house / "talks.jsonl").read_text() + "{broken\n")
    arguments = ["--conversations", talks, "--out", tmp_path / "f", "--max-length", 128]
    expect_refusal(capsys, call(house, "extract", *arguments), "talks.jsonl:11", "not JSON")
    talks.write_text("")
    expect_refusal(capsys, call(house, "extract", *arguments), "talks.jsonl")
    expect_refusal(capsys, call(house, "extract", *arguments[:-1], 9999), "9999", "256")
    assert not (tmp_path / "f").exists()


def test_a_vision_language_target_is_refused_by_name(house, tmp_path, capsys):
    target = tmp_path / "vlm"
    shutil.copytree(house / "target", target)
    tree = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**tree, "vision_config": {"depth": 1}}))
    code = main(
        [
            "extract",
            "--target",
            str(target),
            "--conversations",
            str(house / "talks.jsonl"),
            "--out",
            "x",
        ]
    )
    expect_refusal(capsys, code, "vision")
