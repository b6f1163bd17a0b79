"""Checks of a draft and its variants: what is derived, what no engine is asked, the verdict."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.base.provenance import own_command
from eagle3fn.engines.environments import Place
from eagle3fn.use import engine_run
from eagle3fn.use.engine_limits import unrepresentable
from eagle3fn.use.engine_pair import CheckSettings, chain_logits, load_pair, propose
from eagle3fn.use.engine_run import check_drafts, parse_places, table, verdict
from eagle3fn.use.engine_variants import SWITCHES, variants, write_variant
from eagle3fn.use.export import load_draft
from tests.use.tiny_target import LAYERS, draft_config, write_pair

SETTINGS = CheckSettings(tasks=1, max_new=4, draft_length=2, logit_tasks=1)
NAMES = ["as trained", "other taps", "D = V"]
NAMES += ["RoPE linear", "RoPE dynamic", "RoPE llama3", "RoPE yarn"]
NAMES += [*SWITCHES, "2 taps", "4 taps", "half as wide"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "check_engines.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_each_variant_is_exported_and_computes_something_else(folders, tmp_path):
    target, draft = folders
    pair = load_pair(target, ["some words of a prompt"], SETTINGS)
    embed = pair.model.get_input_embeddings().weight
    head = pair.model.get_output_embeddings().weight
    names = []
    found = {}
    for variant in variants(load_draft(draft, torch.float32), LAYERS, head):
        names.append(variant.name)
        write_variant(variant, tmp_path / "draft", LAYERS)
        loaded = load_draft(tmp_path / "draft", torch.float32)
        chain = propose(pair.model, loaded, pair.prompts[0], 2)
        found[variant.name] = chain_logits(loaded, embed, chain)
        if variant.name == "other taps":
            assert aux_layers(loaded.config, LAYERS) != aux_layers(draft_config(), LAYERS)
        if variant.name == "D = V":
            assert loaded.config.draft_vocab_size == loaded.config.vocab_size
            assert found[variant.name].shape[1] == loaded.config.vocab_size

    assert names == NAMES
    plain = found.pop("as trained")
    for name, logits in found.items():
        if name == "RoPE dynamic":  # as the plain one up to max_position_embeddings
            assert torch.equal(logits, plain)
        else:
            assert not torch.equal(logits, plain), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"aux_layers": (1, 3, 4)}, None),
        (
            {"aux_layers": (0, 3, 4)},
            r"taps layers \(1, 3, 4\) alone, this draft has \(0, 3",
        ),
    ],
)
def test_what_eagle_cannot_represent(changes, expected):
    config = replace(draft_config(), **{"aux_layers": None, **changes})
    said = unrepresentable("eagle", config, 8)
    if expected is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(expected, said)
    assert unrepresentable("vllm", config, 8) is None


READ = {
    "vllm": set(SWITCHES),
    "sglang": {
        "norm_before_fc",
        "fc_norm",
        "norm_output",
        "two layers",
        "own embedding",
        "EAGLE-3.1",
    },
    "llamacpp": {"norm_before_fc", "norm_before_residual", "own embedding"},
    "speculators": {*SWITCHES} - {"all"},
    "eagle": {"own embedding"},
}
"""What each engine represents, as its source has it (`all` has both norms of the taps)."""


@pytest.mark.parametrize("engine", READ)
@pytest.mark.parametrize("name", SWITCHES)
def test_each_engine_reads_or_refuses_each_switch(engine, name):
    config = replace(draft_config(), aux_layers=(1, 3, 4), **SWITCHES[name])
    said = unrepresentable(engine, config, 8)
    assert (said is None) is (name in READ[engine]), said
    if said is not None:
        assert any(switch in said for switch in SWITCHES[name]), said


@pytest.mark.parametrize("engine", READ)
def test_other_numbers_of_taps_and_biases_of_qwen3_are_refused_by_those_that_have_none(engine):
    two = unrepresentable(engine, replace(draft_config(), aux_layers=(1, 3)), 8)
    assert (two is not None) is (engine in ("llamacpp", "eagle"))
    biased = replace(draft_config(), aux_layers=(1, 3, 4), qk_norm=True, attention_bias=True)
    said = unrepresentable(engine, biased, 8)
    assert (said is None) is (engine == "speculators"), said


def test_an_engine_is_not_asked_for_what_it_cannot_represent(folders, tmp_path, monkeypatch):
    asked = []

    def check_engine(engine, place, pair, ours, settings, work):
        asked.append((engine, ours.draft.config.rope_type, ours.taps))
        return GOOD

    monkeypatch.setattr(engine_run, "check_engine", check_engine)
    places = {"vllm": Place(Path("v")), "eagle": Place(Path("e"), Path("s"))}
    said = []
    results = check_drafts(
        folders[0],
        folders[1],
        ["words"],
        places,
        SETTINGS,
        tmp_path,
        names=(),
        say=said.append,
    )
    assert list(results) == NAMES
    of_vllm = [one for one in asked if one[0] == "vllm"]
    assert of_vllm == [("vllm", *found) for found in engine_settings()]
    assert "it taps layers" in results["other taps"]["eagle"]["refused"]
    assert "it has no RoPE of type yarn" in results["RoPE yarn"]["eagle"]["refused"]
    assert any("vllm: agrees" in line for line in said)
    assert "refused: eagle: it has no RoPE" in table(results)


GOOD = {
    "version": "1",
    "loads": True,
    "agrees": True,
    "max_logit_diff": 1e-5,
    "max_feature_diff": None,
    "tokens_equal": None,
}
BAD = GOOD | {"agrees": False}
REFUSED = {"refused": "it has no taps"}


def engine_settings():
    taps = aux_layers(draft_config(), LAYERS)
    other = (0, LAYERS // 2, LAYERS - 1)  # as the draft has those that come first to mind
    ropes = ["default"] * 3 + ["linear", "dynamic", "llama3", "yarn"]
    found = list(zip(ropes, [taps, other] + [taps] * 5, strict=True))
    found += [("default", taps)] * len(SWITCHES)
    return [*found, ("default", (0, 1)), ("default", (0, 1, 2, 3)), ("default", taps)]


@pytest.mark.parametrize(
    ("given", "variant", "expected"),
    [
        (GOOD, GOOD, 0),
        (GOOD, REFUSED, 0),
        (GOOD, BAD, 1),
        (BAD, GOOD, 1),
        (REFUSED, GOOD, 2),
        (REFUSED, BAD, 1),
    ],
)
def test_verdict(given, variant, expected):
    assert verdict({"as trained": {"vllm": given}, "other": {"vllm": variant}}) == expected


def test_pythons_are_named_by_engine():
    known = ("vllm", "eagle")
    assert parse_places(["vllm=/a/b=c", "eagle=py"], known) == {"vllm": "/a/b=c", "eagle": "py"}
    for text in ("vllm", "vllm=", "other=py", "=py"):
        with pytest.raises(UserError, match="must be NAME=PATH with one of vllm, eagle"):
            parse_places([text], known)


# The script


@pytest.fixture
def script(monkeypatch, folders, tmp_path):
    """Runs the script around a check that is given; returns exit code, and what it wrote."""
    spec = importlib.util.spec_from_file_location("check_engines", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "words"}\n')

    def run(result, *options: str):
        monkeypatch.setattr(engine_run, "check_engine", lambda *args, **named: dict(result))
        words = [str(folders[1]), str(folders[0]), "--prompts", str(prompts), "--max-new", "4"]
        words += ["--environments", str(tmp_path / "made"), *options]
        monkeypatch.setattr(sys, "argv", ["check_engines.py", *words])
        return module.exit_code("check_engines", module.main)

    return run


def test_the_script_prints_one_object_and_writes_the_result_with_its_origin(
    script, tmp_path, capsys
):
    out = tmp_path / "result.json"
    options = ["--engines", "vllm", "--python", f"vllm={sys.executable}", "--json"]
    assert script(GOOD, *options, "--out", str(out)) == 0
    assert json.loads(capsys.readouterr().out) == {"vllm": GOOD}
    text = out.read_text()
    result = json.loads(text)
    assert result["drafts"] == {"as trained": {"vllm": GOOD}}
    assert result["settings"]["prompts"] == "prompts.jsonl"
    assert result["settings"]["max_new"] == 4
    assert result["command"].startswith("python scripts/check_engines.py draft target --prompts ")
    assert {"revision", "versions", "hardware", "date"} <= set(result)
    assert str(tmp_path) not in text
    assert str(Path(sys.executable).parent) not in text


def test_the_script_ends_with_1_where_an_engine_disagrees(script, capsys):
    options = ["--engines", "vllm", "--python", f"vllm={sys.executable}"]
    assert script(BAD, *options) == 1
    assert "DISAGREES, logits within 1.0e-05" in capsys.readouterr().out


def test_the_script_ends_with_2_and_one_line_for_bad_input(script, capsys, monkeypatch):
    monkeypatch.delenv("EAGLE_SRC", raising=False)
    assert script(GOOD, "--engines", "eagle") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("check_engines: EAGLE_SRC = ''")


def test_a_command_is_told_without_folders(monkeypatch):
    words = ["draft", "/a/b/target", "--python", "vllm=/x/y/python", "--out", "/z", "--set", "k=v"]
    monkeypatch.setattr(sys, "argv", ["/s/check_engines.py", *words])
    assert own_command("scripts/check_engines.py") == (
        "python scripts/check_engines.py draft target --python vllm=python --set k=v"
    )
    assert own_command().startswith("python -m bench.check_engines draft target ")
