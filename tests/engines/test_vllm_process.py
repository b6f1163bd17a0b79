"""vLLM in a process: what is asked of its program, and every way in which that goes wrong.

A stand-in answers in place of vLLM.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.cli import main
from eagle3fn.commands.sources import check_engine_options
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.generate import Sampling
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import model_source
from eagle3fn.engines.vllm_process import Taps, VllmProcess, read_row, taps_of
from tests.engines.made_rows import CUT, LAYERS, make_target, stand_in, write_answers
from tests.factories import tiny_template

TEMPLATE = tiny_template()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    found = make_target(root)
    write_answers(found, root / "answers")
    return found


@pytest.fixture
def plan(made, tmp_path, monkeypatch):
    """Puts the stand-in in vLLM's place, as planned."""

    def planned(**changes):
        answers = made.target.parent / "answers"
        stand_in(tmp_path / "programs", answers, monkeypatch, **changes)

    planned()
    return planned


def run(made, tmp_path, **options):
    """Three shards, of three, three and two rows; a row more is asked for at the beginning.

    In fp32, as the stand-in's answers are, on processors that multiply bf16 too.
    """
    given = {"dtype": torch.float32, "max_length": CUT, **options}
    log = tmp_path / "log"
    with VllmProcess(sys.executable, made.target, made.taps, log, **given) as engine:
        source = engine_source(engine, made.target, LAYERS, batch_tokens=100)
        return extract(
            source, TEMPLATE, made.talks, tmp_path / "out", max_length=CUT, samples_per_shard=3
        )


def shards(tmp_path):
    return len(list((tmp_path / "out").glob("shard-*.json")))


def test_ids_are_ascending_and_each_is_asked_for_once():
    assert taps_of((1, 14, 26), 30) == Taps([2, 15, 27, 30], [0, 1, 2], 3)
    assert taps_of((4, 0, 2), 5) == Taps([1, 3, 5], [2, 0, 1], 2)


def test_features_are_the_targets_and_no_file_stays(made, plan, tmp_path):
    arguments = {"quantization": None, "max_num_seqs": 4}
    run(made, tmp_path, arguments=arguments)
    asked = json.loads((made.target.parent / "answers" / "load.json").read_text())
    folder = asked.pop("folder")
    assert asked == {
        "target": str(made.target),
        "dtype": "float32",
        "max_length": CUT,
        "ids": [1, 3, 5],
        "arguments": arguments,
    }
    assert not Path(folder).exists()

    extract(model_source(made.model, LAYERS), TEMPLATE, made.talks, tmp_path / "m", max_length=CUT)
    theirs, ours = open_features(tmp_path / "out"), open_features(tmp_path / "m")
    assert theirs.index["engine"]["version"] == "0.32.0"
    assert theirs.index["engine"]["arguments"] == arguments
    for number in range(8):
        for found, expected in zip(
            read_sample(theirs, number), read_sample(ours, number), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": 5, "wrong": "memory"}, r"exit code 1, out of memory .at work.: torch.OutOf"),
        ({"rows": 5, "wrong": "killed"}, "killed by SIGKILL, as the system does where memory"),
        ({"rows": 5, "wrong": "hangs"}, "no answer after 2 s"),
        ({"rows": 5, "wrong": "no slots"}, "ValueError: no slots"),
    ],
)
def test_fault_in_the_middle_is_one_line_and_a_second_call_goes_on(
    made, plan, tmp_path, changes, named
):
    plan(**changes)
    with pytest.raises(UserError, match=rf"^vLLM: .*{named}.*; see .*log$"):
        run(made, tmp_path, seconds=2.0 if changes["wrong"] == "hangs" else 60.0)
    assert shards(tmp_path) == 1
    kept = (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns

    plan()
    assert run(made, tmp_path)["totals"]["samples"] == 8
    assert (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns == kept


def test_answers_in_another_order_are_refused(made, plan, tmp_path):
    """vLLM sorts them by its requests' numbers; states of another row would train in silence."""
    plan(order="reversed")
    with pytest.raises(
        UserError, match=r"^vLLM 0.32.0: row 'row\d': its (states are|token \d+ is)"
    ):
        run(made, tmp_path)
    assert shards(tmp_path) == 0


def test_target_that_does_not_load_is_one_line(made, plan, tmp_path):
    plan(wrong="loads not")
    with pytest.raises(UserError, match=r"^vLLM: RuntimeError: no kernel for heads of 16; see"):
        run(made, tmp_path)
    assert shards(tmp_path) == 0


def test_old_vllm_is_refused_before_it_loads(made, plan, tmp_path):
    plan(version="0.17.1")
    with pytest.raises(UserError, match=r"^vLLM 0.17.1 .*too old, 0.18 or later is needed"):
        run(made, tmp_path)


def test_finished_folder_loads_no_target(made, plan, tmp_path):
    run(made, tmp_path)
    plan(wrong="loads not")
    assert run(made, tmp_path)["totals"]["samples"] == 8


def test_another_version_does_not_go_on(made, plan, tmp_path):
    run(made, tmp_path)
    plan(version="0.33.0")
    with pytest.raises(UserError, match=r"made with engine .*, not .*; remove"):
        run(made, tmp_path)


def test_file_that_was_not_written_is_named(tmp_path):
    taps = taps_of(LAYERS, 5)
    with pytest.raises(UserError, match="named no file of hidden states"):
        read_row(None, taps, [], "vLLM: ")
    with pytest.raises(UserError, match=r"none.safetensors: not written, not readable here"):
        read_row(str(tmp_path / "none.safetensors"), taps, [], "vLLM: ")


# Rows that it writes

WRITTEN = 3  # tokens that the stand-in writes
LONG = Sampling(0.7, 0.9, CUT)


@pytest.fixture
def written_by(made, plan, tmp_path):
    """Starts the stand-in and writes after the conversations' first tokens."""
    prompts = [
        Encoded(row.id, row.input_ids[:-WRITTEN], row.token_mask[:-WRITTEN] * 0)
        for row in made.rows
    ]

    def write(sampling=LONG, seed=11, **changes):
        plan(written=WRITTEN, **changes)
        names = (sys.executable, made.target, made.taps, tmp_path / "log")
        with VllmProcess(*names, max_length=CUT, dtype=torch.float32) as engine:
            said = []
            source = engine_source(engine, made.target, LAYERS, say=said.append, stops=(299, 298))
            assert source.write
            with ThreadPoolExecutor(2) as pool:
                compared = pool.submit(source.features, made.rows, torch.float32)
                samples = pool.submit(source.write, prompts, sampling, seed, torch.float32)
                found = samples.result(), compared.result()
            assert len(said) == 1
            assert not list(engine._folder.iterdir())
        request = json.loads((made.target.parent / "answers" / "write.json").read_text())
        return *found, request

    return write


def test_written_samples_have_the_states_of_their_tokens(written_by):
    """Two threads ask at once; one row is compared."""
    samples, rows, _ = written_by()
    assert len(samples) == len(rows) == 8
    for sample, row in zip(samples, rows, strict=True):
        assert torch.equal(sample.input_ids, row.input_ids)
        assert sample.token_mask.tolist() == [0] * (len(row.input_ids) - WRITTEN) + [1] * WRITTEN
        assert torch.equal(sample.aux_hidden, row.aux_hidden)
        assert torch.equal(sample.last_hidden, row.last_hidden)


def test_written_rows_in_another_order_are_refused(written_by):
    with pytest.raises(UserError, match=r"^vLLM 0.32.0: row 'row0': "):
        written_by(order="reversed")


def test_target_is_loaded_once_for_all_threads(made, plan, tmp_path):
    plan(load_seconds=0.2)
    names = (sys.executable, made.target, made.taps, tmp_path / "log")
    rows = [row.input_ids.tolist() for row in made.rows]
    with (
        VllmProcess(*names, max_length=CUT, dtype=torch.float32) as engine,
        ThreadPoolExecutor(8) as pool,
    ):
        found = list(pool.map(lambda row: next(engine.rows([row], False)), rows))
    assert [row.token_ids.tolist() for row in found] == rows


def test_vllm_is_asked_for_one_token_more_and_by_a_seed_for_each_prompt(written_by):
    *_, request = written_by()
    assert request["sampling"] == {
        "max_tokens": CUT + 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop_token_ids": [299, 298],
    }
    seeds = request["seeds"]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert written_by()[2]["seeds"] == seeds
    assert not set(written_by(seed=12)[2]["seeds"]) & set(seeds)


def test_a_temperature_that_vllm_loses_is_refused(written_by):
    with pytest.raises(UserError, match=r"^--temperature 0.7: vLLM 0.32.0 loses it on this device"):
        written_by(samples=False)
    assert len(written_by(LONG._replace(temperature=0.0), samples=False)[0]) == 8


# The command


def command(made, tmp_path, *words):
    given = ["--target", made.target, "--conversations", made.talks, "--out", tmp_path / "out"]
    given += ["--max-length", CUT, "--draft-config", draft(made, tmp_path), *words]
    return main(["extract", *map(str, given)])


def draft(made, tmp_path):
    """A draft's JSON that names the taps."""
    tree = made.model.config.to_dict()
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    kept += ("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    tree = {key: tree[key] for key in kept} | {"draft_vocab_size": 200}
    tree["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(LAYERS)}
    tree["architectures"] = ["LlamaForCausalLMEagle3"]
    path = tmp_path / "draft.json"
    path.write_text(json.dumps(tree))
    return path


def test_command_extracts_by_an_engine(made, plan, tmp_path, capsys):
    words = ("--engine", "vllm", "--engine-python", sys.executable, "--engine-arg", "tp=[1]")
    assert command(made, tmp_path, *words, "--dtype", "float32", "--check", "logits") == 0
    assert "vLLM 0.32.0: its log-probabilities are those of last_hidden" in capsys.readouterr().out
    index = open_features(tmp_path / "out").index
    assert index["engine"]["arguments"] == {"tp": [1]}
    assert (tmp_path / "out.vllm.log").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--check", "hf"], "--check: needs --engine"),
        (["--engine-python", "py"], "--engine-python: needs --engine"),
        (["--engine", "vllm"], "needs either --engine-python"),
        (["--engine", "vllm", "--engine-python", "/none"], "/none: no such program"),
        (["--engine", "vllm", "--engine-url", "x", "--engine-python", "y"], "needs either"),
        (["--engine", "vllm", "--engine-url", "x"], "--engine-url x: must be an address such as"),
        (["--engine", "vllm", "--engine-url", "x", "--engine-url", "y"], "give it once"),
        (["--engine", "vllm", "--engine-url", "x", "--threads", "1"], "--threads: a running"),
        (["--engine", "vllm", "--engine-url", "x", "--engine-arg", "a=1"], "--engine-arg: a run"),
        (["--engine", "vllm", "--engine-python", "x", "--device", "cpu"], "--device: the engine"),
        (["--engine", "vllm", "--engine-python", "x", "--max-length", "256"], "at most 255"),
        (["--engine", "sglang", "--engine-python", "x"], "running servers alone"),
        (["--engine", "sglang", "--engine-url", "http://x"], "needs --engine-url twice"),
    ],
)
def test_options_that_do_not_go_together_are_refused(made, tmp_path, capsys, words, named):
    assert command(made, tmp_path, *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def test_what_a_running_server_has_of_its_own_is_the_commands_to_say():
    options = SimpleNamespace(engine="vllm", engine_python=None, engine_url=["x"], arguments=[])
    options.engine_arg = None
    options.threads = 1
    check_engine_options(options, of_server=["engine_arg"])  # the command's own threads
    with pytest.raises(UserError, match="--threads: a running server has its own"):
        check_engine_options(options)
