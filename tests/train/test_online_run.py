"""`train --online`: the bits of training on extracted features, whatever computes them."""

import os
import signal
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Sample
from eagle3fn.cli import main
from eagle3fn.data import rollout, sources
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.generate import Sampling
from eagle3fn.data.held import held
from eagle3fn.data.on_demand import OnlineSamples, Widths
from eagle3fn.data.prompt_rows import prompt_rows
from eagle3fn.data.regenerate import ANEW
from eagle3fn.data.sample_table import SampleTable
from eagle3fn.data.source_pool import Pool, Source
from eagle3fn.data.sources import model_source
from eagle3fn.data.stages import Item, Share
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.template import ChatTemplate
from eagle3fn.train import loop
from tests.small_run import write_run
from tests.train.run_files import rows, same_end
from tests.train.start_ranks import torchrun

SETTINGS = (
    "train.steps=7",
    "train.eval_every=3",
    "train.checkpoint_every=2",
    "data.held_out=2",
    "data.global_batch=2",
    "objective.ttt_length=2",
)
PREFETCHES = (0, 2)


class Killed(BaseException):
    """In place of a signal that no program survives."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny target, ten conversations, a map, and an offline run on features extracted alone."""
    folder = write_run(tmp_path_factory.mktemp("world"))
    arguments = ["--target", str(folder / "target"), "--conversations", str(folder / "talks.jsonl")]
    arguments += ["--out", str(folder / "alone"), "--max-length", "128", "--batch-tokens", "1"]
    assert main(["extract", *arguments, "--threads", "1"]) == 0
    assert main(offline(folder, folder / "offline")) == 0
    return folder


def common(world: Path, out: Path, *settings: str) -> list[str]:
    arguments = ["train", "--target", str(world / "target"), "--out", str(out), "--threads", "1"]
    arguments += ["--vocab", str(world / "vocab.safetensors")]
    for setting in (*SETTINGS, *settings):
        arguments += ["--set", setting]
    return arguments


def offline(world: Path, out: Path) -> list[str]:
    return [*common(world, out), "--features", str(world / "alone")]


def online(world: Path, out: Path, *more: str, settings: tuple[str, ...] = ()) -> list[str]:
    arguments = [*common(world, out, *settings), "--online", str(world / "talks.jsonl")]
    return [*arguments, "--max-length", "128", "--batch-tokens", "1", *more]


def generated(world: Path, out: Path, *more: str) -> list[str]:
    arguments = [*common(world, out), "--online", str(world / "talks.jsonl")]
    arguments += ["--max-length", "128", "--max-new", "6", "--temperature", "1"]
    return [*arguments, "--generate", *more]


# The same run


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_online_run_equals_the_offline_one(world, tmp_path, prefetch):
    """State, metrics and evaluations, over more than one epoch."""
    assert main(online(world, tmp_path / "run", settings=(f"data.prefetch={prefetch}",))) == 0
    assert same_end(world / "offline", tmp_path / "run", 7)
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 7


def test_stopped_and_resumed_is_the_same_run(world, tmp_path):
    """At an update without a checkpoint of its own schedule, in the middle of the buffer."""
    for most in ("3", "1", "9"):
        assert main(online(world, tmp_path / "run", "--max-steps", most)) == 0
    assert same_end(world / "offline", tmp_path / "run", 7)


def test_batches_of_several_rows_do_not_depend_on_where_a_run_was_resumed(
    world, tmp_path, monkeypatch
):
    """An update's samples go through the target together, padded: another bits than alone."""
    run_target = sources.run_target
    groups: set[tuple[str, ...]] = set()

    def noting(model, group, *more):
        groups.add(tuple(row.id for row in group))
        return run_target(model, group, *more)

    monkeypatch.setattr(sources, "run_target", noting)
    together = ("--dtype", "bfloat16", "--batch-tokens", "4096")
    assert main(online(world, tmp_path / "whole", *together)) == 0
    updates = set(groups)
    assert {len(names) for names in updates} == {1, 2}  # of an evaluation, of an update
    groups.clear()
    for most in ("1", "2", "9"):
        assert main(online(world, tmp_path / "parts", *together, "--max-steps", most)) == 0
    assert same_end(tmp_path / "whole", tmp_path / "parts", 7)
    assert groups == updates

    assert main(online(world, tmp_path / "alone", "--dtype", "bfloat16")) == 0
    assert not same_end(tmp_path / "whole", tmp_path / "alone", 7)


def test_processes_of_transformers_give_the_same_run(world, tmp_path):
    sources = ("--engine", "transformers", "--sources", "2")
    assert main(online(world, tmp_path / "run", *sources)) == 0
    assert same_end(world / "offline", tmp_path / "run", 7)


def test_packed_updates_equal_the_offline_ones(world, tmp_path):
    packing = ("--set", "data.max_length=128", "--set", "data.pack_tokens=160")
    assert main([*offline(world, tmp_path / "offline"), *packing]) == 0
    assert main([*online(world, tmp_path / "online"), *packing]) == 0
    assert same_end(tmp_path / "offline", tmp_path / "online", 7)


def test_nothing_but_the_run_is_written(world, tmp_path):
    assert main(online(world, tmp_path / "run")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in (world / "offline").iterdir()}


def test_dry_run_writes_nothing(world, tmp_path, capsys):
    assert main(online(world, tmp_path / "run", "--dry-run")) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

    keep = ("--keep", str(tmp_path / "kept"))
    assert main(online(world, tmp_path / "run", "--dry-run", *keep)) == 2
    assert "--keep with --dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Called again


@pytest.fixture(scope="module")
def begun(world) -> Path:
    """A run of one update, which refused calls leave as it is."""
    out = world / "begun"
    assert main(online(world, out, "--max-steps", "1", "--dtype", "float32")) == 0
    return out


def no_source(*_: object) -> None:
    raise AssertionError("a source was opened")


def test_run_that_has_ended_says_so_and_starts_nothing(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    arguments = online(world, out, "--engine", "transformers", "--keep", str(tmp_path / "kept"))
    assert main(arguments) == 0
    capsys.readouterr()
    monkeypatch.setattr(Pool, "first", no_source)

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{out}: finished, step 7 of 7 is its last one" in printed
    assert f"{out}/draft: the best draft of 7 steps" in printed
    tried = online(world, out, "--engine", "transformers", "--dry-run")
    assert main(tried) == 0
    printed = capsys.readouterr().out
    assert "ended at step 7 of 7, nothing is left to train; train.steps = 7 chose" in printed
    assert printed.endswith("nothing was written\n")

    # It is refused as before where its features would be others.
    assert main([*arguments, "--max-length", "100"]) == 2
    assert "--max-length was 128, is 100" in capsys.readouterr().err

    # More to do needs a source again; so does what was to be kept, and has no index yet.
    with pytest.raises(AssertionError, match="a source was opened"):
        main([*arguments, "--set", "train.steps=8"])
    (tmp_path / "kept/index.json").unlink()
    with pytest.raises(AssertionError, match="a source was opened"):
        main(arguments)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--max-length", "100"), "--max-length was 128, is 100"),
        (("--limit", "9"), "--limit was 10 rows, is 9 rows"),
        (("--batch-tokens", "64"), "--batch-tokens was 1, is 64"),
        (("--dtype", "bfloat16"), "--dtype was float32, is bfloat16"),
        (("--generate",), "--generate was not given, is given"),
        (("--set", "data.global_batch=4"), "data.global_batch was 2, is 4"),
    ],
)
def test_begun_run_names_the_option_that_differs_before_a_source_starts(
    world, begun, monkeypatch, capsys, more, named
):
    monkeypatch.setattr(Pool, "first", no_source)
    assert main([*online(world, begun), *more]) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert named in refused
    assert "--from" in refused


def test_begun_run_names_what_differs_of_its_source(world, begun, capsys):
    assert main(online(world, begun)) == 2
    assert "--dtype was float32, is bfloat16" in capsys.readouterr().err


def test_run_goes_on_with_the_target_here_or_in_a_process(world, tmp_path):
    """One source has the bits of the other."""
    process = ("--engine", "transformers")
    for source, most in (((), "2"), (process, "3"), ((), "9")):
        assert main(online(world, tmp_path / "run", *source, "--max-steps", most)) == 0
    assert same_end(world / "offline", tmp_path / "run", 7)


# Ranks


@pytest.mark.parametrize("sources", [(), ("--engine", "transformers")])
def test_two_ranks_with_sources_of_their_own_give_the_run_of_one(world, tmp_path, sources):
    tree = ("--set", "train.reduce=tree")
    assert main([*offline(world, tmp_path / "one"), *tree]) == 0
    arguments = [*online(world, tmp_path / "two", *sources), *tree]
    ended = torchrun(2, "-m", "eagle3fn.cli", *arguments)
    assert ended.codes == [0], ended
    assert same_end(tmp_path / "one", tmp_path / "two", 7)
    logs = [f"two.transformers-{rank}-1.log" for rank in range(2) if sources]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two", *logs]


def test_run_that_has_ended_says_so_once_on_two_ranks(world, tmp_path):
    assert main(online(world, tmp_path / "run")) == 0
    ended = torchrun(2, "-m", "eagle3fn.cli", *online(world, tmp_path / "run"))
    assert ended.codes == [0], ended
    assert ended.text.count("finished, step 7 of 7 is its last one") == 1
    assert "samples; features by" not in ended.text


def test_two_ranks_whose_target_writes_give_the_run_of_one(world, tmp_path):
    """The loss is divided by the rows of both ranks' answers, of which each knows its own."""
    alone = ("--temperature", "0", "--batch-tokens", "1", "--set", "train.reduce=tree")
    assert main(generated(world, tmp_path / "one", *alone)) == 0
    ended = torchrun(2, "-m", "eagle3fn.cli", *generated(world, tmp_path / "two", *alone))
    assert ended.codes == [0], ended
    assert same_end(tmp_path / "one", tmp_path / "two", 7)
    assert all(row["rows"] > 0 for row in rows(tmp_path / "two" / "metrics.jsonl"))


# Signals


@pytest.mark.parametrize(("made", "eval_every"), [(4, 7), (3, 3)], ids=["update", "evaluation"])
def test_signal_while_samples_are_waited_for_saves_what_was_trained(
    world, tmp_path, monkeypatch, capsys, made, eval_every
):
    """The source of the fifth update hangs, or that of the evaluation after the third; the next
    call goes on with it.
    """
    out = tmp_path / "run"
    sent: list[int] = []
    release = threading.Event()
    ask, received, save = OnlineSamples._ask, rollout.received, loop._save

    def updates() -> int:
        metrics = out / "metrics.jsonl"
        return len(rows(metrics)) if metrics.is_file() else 0

    def hanging(self, source, group):
        evaluates = group.key.numbers[0] in self._fixed and updates() == made
        if (evaluates if eval_every == made else group.place == 2 * made + 2) and not sent:
            release.wait(20.0)
        return ask(self, source, group)

    def signalled():
        """Called again and again while samples are waited for."""
        if updates() == made and not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return received()

    def saving(*arguments):
        if sent:
            release.set()
        save(*arguments)

    monkeypatch.setattr(OnlineSamples, "_ask", hanging)
    monkeypatch.setattr(OnlineSamples, "hold", lambda *_: None)  # evaluations ask again
    monkeypatch.setattr(rollout, "received", signalled)
    monkeypatch.setattr(rollout, "_STOPPING", 0.01)
    monkeypatch.setattr(loop, "_save", saving)
    settings = f"train.eval_every={eval_every}"
    arguments = online(world, out, settings=("data.prefetch=0", settings))
    assert not main(arguments)
    assert sent
    assert f"stopped by SIGTERM, step {made} of 7 is saved" in capsys.readouterr().out
    assert (out / f"checkpoints/step-{made:08}").is_dir()
    assert updates() == made

    assert main(arguments) == 0
    assert main([*offline(world, tmp_path / "offline"), "--set", settings]) == 0
    assert same_end(tmp_path / "offline", out, 7)


# Kept features


def test_kept_features_train_the_same_draft(world, tmp_path, capsys):
    """After one epoch all samples are there, the held-out ones last, with their bits."""
    keep = ("--keep", str(tmp_path / "kept"))
    assert main(online(world, tmp_path / "run", *keep, "--max-steps", "2")) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'kept'}: 6 of 10 samples kept" in printed
    assert "--set data.held_out=2" in printed
    assert main(online(world, tmp_path / "run", *keep)) == 0
    assert same_end(world / "offline", tmp_path / "run", 7)

    kept = open_features(tmp_path / "kept")
    alone = open_features(world / "alone")
    assert isinstance(kept.samples, SampleTable)
    numbers = [int(entry["key"]) for entry in kept.samples]
    assert sorted(numbers) == list(range(10))
    assert numbers[-2:] == [8, 9]
    for place, number in enumerate(numbers):
        for mine, theirs in zip(read_sample(kept, place), read_sample(alone, number), strict=True):
            assert torch.equal(mine, theirs)
    again = [*common(world, tmp_path / "again"), "--features", str(tmp_path / "kept")]
    assert main(again) == 0


@pytest.mark.parametrize(
    "other", [("--max-length", "100"), ("--limit", "9"), ("--set", "data.held_out=1")]
)
def test_kept_features_of_other_settings_are_refused(world, tmp_path, capsys, other):
    keep = ("--keep", str(tmp_path / "kept"))
    assert main(online(world, tmp_path / "run", *keep, "--max-steps", "1")) == 0
    assert main([*online(world, tmp_path / "other", *keep), *other]) == 2
    assert "shard-00000.json: of other conversations" in capsys.readouterr().err


@pytest.mark.parametrize("step", [3, 7])
def test_sources_that_fail_in_an_evaluation_lose_no_update(
    world, tmp_path, monkeypatch, capsys, step
):
    """What was trained is saved, what passed is kept; the next call evaluates once, and goes on."""
    evaluate = loop.evaluate_held_out

    def failing(run, params):
        if len(rows(run.out / "metrics.jsonl")) == step:
            raise UserError("source 1: gone for good")
        return evaluate(run, params)

    arguments = online(world, tmp_path / "run", "--keep", str(tmp_path / "kept"))
    monkeypatch.setattr(loop, "evaluate_held_out", failing)
    assert main(arguments) == 2
    assert "source 1: gone for good" in capsys.readouterr().err
    assert (tmp_path / f"run/checkpoints/step-{step:08d}").is_dir()
    assert len(open_features(tmp_path / "kept").samples) > 0

    # Its row is written once, also where a call was killed before the evaluation was settled.
    monkeypatch.setattr(loop, "evaluate_held_out", evaluate)
    saved = loop._save

    def killed(run, state, loop_state):
        raise Killed

    monkeypatch.setattr(loop, "_save", killed)
    with pytest.raises(Killed):
        main(arguments)
    monkeypatch.setattr(loop, "_save", saved)
    for _ in range(2):
        assert main(arguments) == 0
        assert same_end(world / "offline", tmp_path / "run", 7)


def test_only_evaluation_of_a_run_may_come_with_the_next_call(world, tmp_path, monkeypatch, capsys):
    """It has made no draft yet, which is no draft that is gone."""
    rare = ("--set", "train.eval_every=100")
    assert main([*offline(world, tmp_path / "offline"), *rare]) == 0
    arguments = [*online(world, tmp_path / "run"), *rare]
    evaluate = loop.evaluate_held_out

    def failing(run, params):
        if len(rows(run.out / "metrics.jsonl")) == 7:
            raise UserError("source 1: gone for good")
        return evaluate(run, params)

    monkeypatch.setattr(loop, "evaluate_held_out", failing)
    assert main(arguments) == 2
    monkeypatch.setattr(loop, "evaluate_held_out", evaluate)
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    assert "0 of 7 updates left, 1 evaluation" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "step 7 is evaluated first, as its held-out features did not" in capsys.readouterr().out
    assert same_end(tmp_path / "offline", tmp_path / "run", 7)


@pytest.mark.parametrize("fault", ["check_held_out", "append_row"])
def test_evaluation_that_fails_with_its_features_there_saves_nothing(
    world, tmp_path, monkeypatch, fault
):
    """As from files: the checkpoint before it is the last good one."""
    real = getattr(loop, fault)

    def failing(*given):
        if given[-1]["step"] == 3 and given[0] != tmp_path / "run" / "metrics.jsonl":
            raise UserError("a fault")
        return real(*given)

    monkeypatch.setattr(loop, fault, failing)
    assert main(online(world, tmp_path / "run")) == 2
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-00000002"]


def test_evaluation_that_is_owed_may_end_a_run(world, tmp_path, monkeypatch):
    """By its patience, as it would have at once: no further update is made."""
    patience = ("train.patience=1", "train.eval_every=1", "train.steps=30")
    settings = [word for setting in patience for word in ("--set", setting)]
    assert main([*offline(world, tmp_path / "offline"), *settings]) == 0
    ended = len(rows(tmp_path / "offline" / "metrics.jsonl"))
    assert ended < 30
    evaluate = loop.evaluate_held_out

    def failing(run, params):
        if len(rows(run.out / "metrics.jsonl")) == ended:
            raise UserError("source 1: gone for good")
        return evaluate(run, params)

    arguments = [*online(world, tmp_path / "run"), *settings]
    monkeypatch.setattr(loop, "evaluate_held_out", failing)
    assert main(arguments) == 2
    monkeypatch.setattr(loop, "evaluate_held_out", evaluate)
    assert main(arguments) == 0
    assert same_end(tmp_path / "offline", tmp_path / "run", ended)


# Answers that the target writes


def test_prompts_are_answered_anew_each_time_and_alike_on_each_run(world, tmp_path):
    assert main(generated(world, tmp_path / "one")) == 0
    assert main(generated(world, tmp_path / "two", "--max-steps", "3")) == 0
    assert main(generated(world, tmp_path / "two")) == 0
    assert same_end(tmp_path / "one", tmp_path / "two", 7)
    tokens = [row["tokens"] for row in rows(tmp_path / "one" / "metrics.jsonl")]
    assert len(set(tokens)) > 2


def test_held_out_prompts_keep_their_answers(world):
    """Others are answered anew at each place of the data's order."""
    model, tokenizer = load_target(str(world / "target"), torch.float32)
    stops = stop_ids(model, tokenizer)
    source = model_source(model, (1, 3, 5), stops=stops)
    template = ChatTemplate(tokenizer, stops, {})
    talks = world / "talks.jsonl"
    found = prompt_rows(template, talks, max_length=128, max_new=6)
    widths = Widths(3, model.config.hidden_size, torch.float32)
    with Pool([Source("here", lambda _: nullcontext(source))]) as pool, found.samples as rows:
        samples = OnlineSamples(rows, pool, widths, Sampling(1.0, 1.0, 6))
        samples.fix([8])

        def loaded(number: int, place: int) -> Sample:
            share = Share([[number]], [])
            (item,) = samples.load(iter([Item(share, place)]))
            return item.value.bins[0][0]

        held = [loaded(8, place) for place in range(1, 5)]
        trained = [loaded(3, place) for place in range(1, 5)]
        again = loaded(3, 2)
        other = [loaded(6, place) for place in range(1, 5)]
        length = int((rows[3].token_mask == 0).sum())
        prompts = [rows[number].input_ids[:length] for number in (3, 6)]
    assert all(equal(held[0], each) for each in held)
    assert len({tuple(each.input_ids.tolist()) for each in trained}) > 1
    assert equal(again, trained[1])

    # What was written comes after the prompt, and is what is trained.
    for sample in trained:
        assert torch.equal(sample.input_ids[:length], prompts[0])
        assert sample.token_mask.tolist() == [0] * length + [1] * (len(sample.input_ids) - length)
        assert 1 <= len(sample.input_ids) - length <= 6

    # As two ranks have them: another sample of the same prompt, at the same place.
    assert torch.equal(*prompts)
    assert not any(map(equal, trained, other))


def test_answers_are_drawn_as_options_and_seed_say_and_held_out_ones_once(
    world, tmp_path, monkeypatch
):
    write = sources.write_answers
    seeds: dict[str, set[int]] = {"0": set(), "5": set()}
    samplings: set[Sampling] = set()
    for name, found in seeds.items():
        answered = Counter[str]()

        def noting(*arguments, into=found, answered=answered):
            into.add(arguments[4])
            samplings.add(arguments[2])
            answered.update(prompt.id for prompt in arguments[1])
            return write(*arguments)

        monkeypatch.setattr(sources, "write_answers", noting)
        more = ("--max-steps", "4", "--temperature", "0.75", "--set", f"train.seed={name}")
        assert main(generated(world, tmp_path / name, *more)) == 0
        assert len(rows(tmp_path / name / "eval.jsonl")) == 2
        assert (answered["row8"], answered["row9"]) == (1, 1)
    assert all(len(found) > 4 for found in seeds.values())
    assert not seeds["0"] & seeds["5"]
    assert samplings == {ANEW._replace(temperature=0.75, max_new=6)}


# Refusals


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--sources", "2"), r"--sources: is of an engine's processes"),
        (("--max-new", "4"), r"--max-new: needs --generate"),
        (("--buffer", "0.01"), r""),
        (("--engine", "vllm"), r"--engine vllm: needs either --engine-python"),
        (
            ("--engine", "transformers", "--target-device", "cpu"),
            r"--target-device: an engine chooses its device",
        ),
        (
            ("--engine", "transformers", "--engine-arg", "dtype=float16"),
            r"--engine-arg dtype: of transformers there is device alone",
        ),
    ],
)
def test_options_without_effect_are_refused(world, tmp_path, capsys, more, named):
    code = main(online(world, tmp_path / "run", *more, "--dry-run"))
    if not named:
        assert code == 0
        return
    assert code == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_of_online_training_need_it(world, tmp_path, capsys):
    assert main([*offline(world, tmp_path / "run"), "--buffer", "1"]) == 2
    assert "--buffer: needs --online" in capsys.readouterr().err


def test_answers_of_one_token_are_refused_by_the_option(world, tmp_path, capsys):
    assert main([*generated(world, tmp_path / "run"), "--max-new", "1"]) == 2
    assert "--max-new 1: an answer that short has no row to train" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_refused_call_leaves_nothing_of_its_engine(world, tmp_path, capsys):
    """It is refused once the engine has started."""
    out = tmp_path / "new" / "run"
    sources = ("--engine", "transformers")
    assert main(online(world, out, *sources, settings=("data.held_out=10",))) == 2
    captured = capsys.readouterr()
    assert "features by transformers" in captured.out
    assert "data.held_out = 10: must be below" in captured.err
    assert not list(tmp_path.iterdir())


def test_engine_that_fails_leaves_the_log_that_is_named(world, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho nothing is installed here >&2\nexit 1\n")
    python.chmod(0o755)
    sources = ("--engine", "transformers", "--engine-python", str(python))
    assert main(online(world, tmp_path / "run", *sources)) == 2
    log = tmp_path / "run.transformers-1.log"
    assert str(log) in capsys.readouterr().err
    assert "nothing is installed here" in log.read_text()


def test_dry_run_leaves_nothing_of_its_engine(world, tmp_path):
    out = tmp_path / "new" / "run"
    assert main(online(world, out, "--engine", "transformers", "--dry-run")) == 0
    assert not list(tmp_path.iterdir())


def test_logs_of_the_run_are_left_by_calls_that_come_to_nothing(world, begun, capsys):
    """A dry run, one that is refused once an engine has started, and one while the run is alive."""
    log = Path(f"{begun}.transformers-1.log")
    log.write_text("of the run")
    sources = (*online(world, begun), "--engine", "transformers")
    assert main([*sources, "--dtype", "float32", "--dry-run"]) == 0
    assert log.read_text() == "of the run"
    with held(begun):
        assert main(list(sources)) == 2
    assert "another process is at work there" in capsys.readouterr().err
    assert log.read_text() == "of the run"
    assert main([*sources, "--set", "data.held_out=10"]) == 2
    assert log.is_file()
    log.unlink()


def test_prompts_without_room_for_an_answer_are_refused(world, tmp_path, capsys):
    assert main([*generated(world, tmp_path / "run"), "--max-length", "8"]) == 2
    assert "no prompt: 10 of 10 prompts dropped: 10 have no room" in capsys.readouterr().err
