"""Evaluation in an engine, with a stand-in for it: the report, its lines, what is refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import Sampling
from eagle3fn.cli import main
from eagle3fn.engines.decoding import Counts
from eagle3fn.engines.llamacpp import check_taps, gguf_files
from eagle3fn.use.engine_evaluate import (
    EngineEvalSettings,
    acceptance_by_position,
    describe,
    engine_evaluate,
    first_difference,
)
from tests.engines.stand_ins import fake_programs
from tests.use.tiny_target import write_draft, write_pair

Folders = tuple[Path, Path]
SETTINGS = EngineEvalSettings("vllm", sys.executable, tasks=2, max_new=6, draft_length=2)
PROMPTS = ["one", "seven", "three"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    """Let the programs of all engines be the stand-in."""
    fake_programs(tmp_path, monkeypatch)


def evaluated(folders: tuple[Path, Path], log: Path, **changes: Any) -> dict[str, Any]:
    return engine_evaluate(*folders, PROMPTS, replace(SETTINGS, **changes), log)


# The report


def test_report(folders: Folders, tmp_path):
    stages = []
    report = engine_evaluate(
        *folders,
        PROMPTS,
        SETTINGS,
        tmp_path / "out",
        on_progress=lambda *at: stages.append(at),
        prompts_name="numbers.jsonl",
    )
    json.dumps(report)
    assert (report["engine"], report["engine_version"]) == ("vllm", "2030.1")
    assert (report["prompts"], report["tasks"], report["draft_length"]) == ("numbers.jsonl", 2, 2)
    assert stages == [(stage, n, 2) for stage in ("draft", "plain") for n in (1, 2)]
    assert {"out.plain.log", "out.draft.log"} <= {path.name for path in tmp_path.iterdir()}

    # Two answers of six tokens; each by rounds that accept 0, 1 and 2 drafted tokens.
    assert report["lossless"] is True
    assert report["differing_prompts"] == []
    assert (report["rounds"], report["drafted"], report["accepted"]) == (6, 12, 6)
    assert report["accepted_by_position"] == [4, 2]
    assert report["acceptance_by_position"] == [4 / 6, 2 / 4]
    assert report["verifications"] == 6

    # The limit cuts one accepted token of each answer off: ours leaves it out.
    assert report["accepted_within_answers"] == 4
    assert report["accepted_length"] == 10 / 6
    assert report["engine_accepted_length"] == 1 + 6 / 6

    assert (report["plain_tokens_per_s"], report["tokens_per_s"]) == (12 / 2.0, 12 / 1.0)
    assert report["speedup"] == 2.0
    assert (report["timed_tokens"], report["differing_tokens"]) == (12, 0)


def test_report_by_category_and_length(folders: Folders, tmp_path):
    """The stand-in's two answers of six tokens, three runs of the target each."""
    report = engine_evaluate(
        *folders, PROMPTS[:2], SETTINGS, tmp_path / "out", categories=["words", "numbers"]
    )
    each = {"prompts": 1, "tokens": 6, "verifications": 3, "accepted_length": 5 / 3}
    assert report["by_category"] == {"words": each, "numbers": each}
    (both,) = report["by_prompt_length"].values()
    assert (both["prompts"], both["accepted_length"]) == (2, 5 / 3)

    # An engine that does not count has none.
    unknown = evaluated(folders, tmp_path / "out", arguments={"silent": True})
    (both,) = unknown["by_prompt_length"].values()
    assert both["verifications"] is both["accepted_length"] is None


def test_both_accepted_lengths_are_named(folders: Folders, tmp_path):
    said = describe(evaluated(folders, tmp_path / "out"))
    assert said.splitlines()[0] == "vllm 2030.1: lossless True, 2.00 times as fast"
    assert "accepted length 1.667 (per run of the target, without the prefill's token" in said
    assert "2.000 by vllm's counts (1 + accepted / rounds: 1 + 6 / 6)" in said


def test_another_token_is_not_lossless_and_is_listed(folders: Folders, tmp_path):
    report = evaluated(folders, tmp_path / "out", arguments={"differs": True})
    assert report["lossless"] is False
    assert [one["prompt"] for one in report["differing_prompts"]] == [1, 2]
    first = report["differing_prompts"][0]
    assert (first["position"], first["draft"]) == (3, first["plain"] + 1)
    assert report["differing_tokens"] == 2
    assert f"prompt 1: token 3 is {first['draft']} with the draft, {first['plain']}" in describe(
        report
    )


def test_sampled_answers_are_not_compared(folders: Folders, tmp_path):
    report = evaluated(
        folders, tmp_path / "out", sampling=Sampling(0.5, 0.9, 3), arguments={"differs": True}
    )
    assert report["lossless"] is None
    assert "differing_prompts" not in report
    assert report["sampling"] == {"temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert report["accepted_length"] == 10 / 6
    assert "temperature 0.5, sampled: not compared token by token" in describe(report)


def test_what_an_engine_does_not_count_is_null(folders: Folders, tmp_path):
    report = evaluated(folders, tmp_path / "out", arguments={"silent": True})
    for name in ("rounds", "accepted", "accepted_length", "engine_accepted_length"):
        assert report[name] is None
    assert report["acceptance_by_position"] is None
    assert report["lossless"] is True
    assert "accepted length unknown: vllm decoded beyond an end token" in describe(report)


def test_first_difference_by_hand():
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_acceptance_needs_the_drafted_tokens_by_position():
    known = Counts(4, 8, 3, [4, 4], [2, 1])
    assert acceptance_by_position(known) == [2 / 4, 1 / 2]
    assert acceptance_by_position(known._replace(drafted_by_position=None)) is None
    assert acceptance_by_position(Counts(0, 0, 0, [0, 0], [0, 0])) == [0.0, 0.0]


# What is refused before an engine starts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: 0 given"),
        (["fine", " "], "none may be empty"),
        # 256 positions: 244 of the prompt, 6 of the answer, two rounds of 3.
        (["fine", "x" * 243], r"prompt 2: 245 tokens, max_new = 6 .*beyond max_position_embedd"),
    ],
)
def test_bad_prompts_are_refused(folders: Folders, tmp_path, prompts, message):
    with pytest.raises(UserError, match=message):
        engine_evaluate(*folders, prompts, SETTINGS, tmp_path / "out")
    engine_evaluate(*folders, ["x" * 242], SETTINGS, tmp_path / "out")


def test_a_draft_of_another_target_is_refused(folders: Folders, tmp_path):
    write_draft(tmp_path / "other", vocab_size=130)
    with pytest.raises(UserError, match=r"other: made for a target of vocab_size 130"):
        engine_evaluate(folders[0], tmp_path / "other", PROMPTS, SETTINGS, tmp_path / "out")


def test_a_draft_that_holds_nan_is_refused_before_the_engine_starts(folders: Folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "nan")
    file = tmp_path / "nan/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"nan/model\.safetensors: lm_head\.weight holds NaN"):
        engine_evaluate(folders[0], tmp_path / "nan", PROMPTS, SETTINGS, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tgi"}, "evaluate.engine = 'tgi': must be one of eagle, llamacpp, vllm"),
        ({"tasks": 0}, "evaluate.tasks = 0: must be at least 1"),
        ({"max_new": 1}, "evaluate.max_new = 1: must be at least 2"),
        ({"sampling": Sampling(0.5, 0.0)}, "top_p = 0.0: must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SETTINGS, **changes)


# The command


def call(folders: tuple[Path, Path], out: Path, *arguments: object) -> int:
    prompts = out.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    target, draft = folders
    words = ["--target", target, "--draft", draft, "--prompts", prompts, "--out", out]
    return main(["evaluate", *map(str, [*words, *arguments])])


VLLM = ("--engine", "vllm", "--engine-python", sys.executable)
LLAMACPP = ("--engine", "llamacpp", "--engine-python", sys.executable)


def test_command(folders: Folders, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--max-new", 6, "--draft-length", 2, "--tasks", 2, "--engine-arg", "differs=true"]
    assert call(folders, out, *VLLM, *arguments) == 0
    report = json.loads(out.read_text())
    assert (report["rounds"], report["prompts"]) == (6, "prompts.jsonl")
    assert report["engine_arguments"] == {"differs": True}
    assert report["lossless"] is False
    assert f"{out}: vllm 2030.1: lossless False" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*VLLM, "--device", "cpu"), "--device: has no effect on an engine"),
        ((*VLLM, "--plain", "x"), "--plain: has no effect on an engine"),
        ((*VLLM, "--untrained", "x"), "--untrained: has no effect on an engine"),
        ((*VLLM, "--threads", "2"), "--threads: has no effect on an engine"),
        (("--engine-python", "x"), "--engine-python: is for --engine vllm or llamacpp"),
        (("--top-p", "0.5"), "--top-p: greedy decoding draws nothing"),
        (("--converter", "x"), "--converter: is for --engine"),
        (("--engine", "vllm"), "name the Python of an environment that has it with --engine-pyt"),
        ((*VLLM, "--top-p", "0.5"), "--top-p: greedy decoding draws nothing"),
        ((*VLLM, "--temperature", "0", "--seed", "1"), "--seed: greedy decoding draws nothing"),
        ((*VLLM, "--converter", "x"), "--converter: is for --engine llamacpp"),
        ((*VLLM, "--engine-arg", "x"), "--engine-arg x: must be NAME=VALUE"),
        (LLAMACPP, "--engine llamacpp reads GGUF files: name llama.cpp's convert_hf_to_gguf.py"),
        ((*LLAMACPP, "--converter", "/none"), "--converter /none: no convert_hf_to_gguf.py there"),
    ],
)
def test_options_without_an_effect_are_refused_by_name(
    folders, tmp_path, capsys, arguments, message
):
    assert call(folders, tmp_path / "out.json", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_gguf_files_are_loaded_as_they_are(folders: Folders, tmp_path, capsys):
    files = (tmp_path / "target.gguf", tmp_path / "draft.gguf")
    assert call(files, tmp_path / "out.json", *LLAMACPP, "--dtype", "float32") == 2
    assert "--dtype: GGUF files are loaded as they are" in capsys.readouterr().err
    assert call((folders[0], files[1]), tmp_path / "out.json", *VLLM) == 2
    assert "draft.gguf: vLLM loads exported folders" in capsys.readouterr().err
    with gguf_files(*files, None, None, tmp_path, sys.executable) as found:
        assert found == files


def test_several_prompt_files_of_one_call(folders: Folders, tmp_path, capsys):
    """Here and in an engine; `--tasks` counts in each file."""
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    common = ["--max-new", "6", "--draft-length", "2", "--tasks", "1"]
    for arguments in (VLLM, ("--threads", "1", "--temperature", "1", "--seed", "4")):
        out = tmp_path / f"{len(arguments)}.json"
        words = ["evaluate", "--target", folders[0], "--draft", folders[1], "--out", out]
        again = ["--prompts"] if arguments == VLLM else []  # given once for both, or for each
        words += ["--prompts", files[0], *again, files[1], *common, *arguments]
        assert main([str(word) for word in words]) == 0
        report = json.loads(out.read_text())
        assert report["prompts"] == "one, two"
        assert report["tasks"] == 2
        assert [row["prompts"] for row in report["by_category"].values()] == [1, 1]
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line[:3] in ("one", "two")] == ["one", "two"]
        assert report["lossless"] is (None if "--temperature" in arguments else True)
    assert report["sampling"] == {"temperature": 1.0, "top_p": 1.0, "seed": 4}
    assert any("by the target's own distribution" in line for line in lines)


# The files of llama.cpp

CONVERTER = """
import sys
arguments = sys.argv[1:]
print("AttributeError: unknown architecture" if {fails} else arguments)
if {fails}:
    raise SystemExit(3)
open(arguments[arguments.index("--outfile") + 1], "w").write(" ".join(arguments))
"""


def converter(folder: Path, fails: bool = False) -> Path:
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(CONVERTER.format(fails=fails))
    return path


def test_folders_are_converted_and_the_files_deleted_after(folders: Folders, tmp_path):
    source = converter(tmp_path)
    with gguf_files(*folders, source, "float16", tmp_path, sys.executable) as (target, draft):
        asked = target.read_text()
        assert f"{folders[0]} --outfile {target} --outtype f16" in asked
        assert "--target-model-dir" not in asked
        assert f"--target-model-dir {folders[0]}" in draft.read_text()
    assert not target.exists()
    assert not draft.exists()

    # A draft that has been converted before.
    files: Folders = (folders[0], tmp_path / "d.gguf")
    with gguf_files(*files, tmp_path, None, tmp_path, sys.executable) as (target, draft):
        assert "--outtype f32" in target.read_text()
        assert draft == tmp_path / "d.gguf"


def test_a_failed_conversion_is_one_line_whose_log_stays(folders: Folders, tmp_path):
    converter(tmp_path, fails=True)
    with (
        pytest.raises(UserError, match="exit code 3: AttributeError: unknown architecture; see"),
        gguf_files(*folders, tmp_path, None, tmp_path, sys.executable),
    ):
        pass
    assert (tmp_path / "convert-draft.log").exists()
    assert not list(tmp_path.glob("gguf-*"))


def test_conversion_needs_folders_and_a_python(folders: Folders, tmp_path):
    converter(tmp_path)
    cases: tuple[tuple[Folders, str, str], ...] = (
        ((tmp_path / "t.gguf", folders[1]), sys.executable, "converter needs the target's folder"),
        ((tmp_path / "none", folders[1]), sys.executable, "none: no config.json there"),
        (folders, "/none", "--engine-python /none: no such program"),
    )
    for files, python, message in cases:
        with (
            pytest.raises(UserError, match=message),
            gguf_files(*files, tmp_path, None, tmp_path, python),
        ):
            pass


def test_taps_that_the_converter_does_not_read_are_refused(folders: Folders, tmp_path):
    target, draft = folders
    tree = json.loads((draft / "config.json").read_text())
    name = "eagle_aux_hidden_state_layer_ids"

    def tree_with(nested: list[int] | None, top: list[int] | None) -> Path:
        changed = {key: value for key, value in tree.items() if key not in (name, "eagle_config")}
        changed |= {"eagle_config": {name: nested}} if nested else {}
        changed |= {name: top} if top else {}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return tmp_path

    # Of 6 layers, the default taps are 1, 2 and 2.
    for nested, top in (([0, 2, 5], [1, 3, 6]), ([1, 2, 2], None), (None, None)):
        check_taps(tree_with(nested, top), target)
    with pytest.raises(UserError, match=r"names the tapped layers \[0, 2, 5\], which llama.cpp's"):
        check_taps(tree_with([0, 2, 5], None), target)
