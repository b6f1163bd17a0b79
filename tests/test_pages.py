"""The pages' commands have options that exist; what they print, and how extras are installed."""

import argparse
import contextlib
import io
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from eagle3fn.base.config import Config
from eagle3fn.cli import main, parser
from eagle3fn.train.changes import MAY_CHANGE
from eagle3fn.train.warm_start import Mapped
from tests.small_run import write_run

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(page: str, *kinds: str) -> list[str]:
    """A page's blocks of these kinds."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.M | re.S)
    return [block for kind, block in found if kind in kinds]


def called(page: str) -> list[str]:
    """The calls of the program in a page, each in one line: of its blocks, and within its text."""
    lines = []
    for block in blocks(page, "bash", "console"):
        lines += block.replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]

    calls = []
    for line in lines:
        without_comment = line.split(" # ")[0]
        found = re.search(r"\beagle3fn(?:\.cli)? ([a-z]+ .*)", without_comment)
        if found:
            calls.append(found[1])
    return calls


def options() -> dict[str, set[str]]:
    """The options of every sub-command."""
    (sub,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return {name: set(one._option_string_actions) for name, one in sub.choices.items()}


def settings() -> set[str]:
    """Names of all settings, as `--set` takes them."""
    return {
        f"{section}.{field.name}"
        for section, kind in get_type_hints(Config).items()
        for field in fields(kind)
    }


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_known_options_and_settings(page: str) -> None:
    known = options()
    for call in called(page):
        command = call.split()[0]
        assert command in known, call
        assert set(re.findall(r"(?<=\s)--[\w-]+", call)) <= known[command], call
    named = set(re.findall(r"--set '?([\w.]+)=", PAGES[page]))
    assert {name for name in named if name.lower() != "section.key"} <= settings()


def test_calls_are_found_in_blocks_and_in_text() -> None:
    assert sum(call.startswith("train ") for call in called("docs/training.md")) > 3
    assert "convert --draft FOLDER --out DRAFT" in called("docs/training.md")


def test_extras_are_installed_from_a_checkout() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for page, text in PAGES.items():
        for what in re.findall(r"pip install ([^`\n]*\[[^`\n]*)", text):
            found = re.match(r"-e '\.\[(\w+)\]'", what)
            assert found, f"{page}: pip install {what}"
            named.add(found[1])
    assert {"data", "demo", "tensorboard", "testing"} <= named
    assert named <= set(project["optional-dependencies"])


def test_settings_that_a_resumed_run_may_change_are_listed() -> None:
    words = PAGES["docs/training.md"].split("**What may change.**")[1].split("Each that has")[0]
    assert set(re.findall(r"`([\w.]+)`", words)) == MAY_CHANGE


def test_tests_that_pages_name_are_there() -> None:
    named = {
        (file, test)
        for text in PAGES.values()
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    }
    assert len(named) > 20
    for file, test in sorted(named):
        functions = re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text(), re.M)
        assert test in functions, f"{file}::{test}"


def test_every_gate_of_the_pull_request_has_tests_for_both_kinds_of_features() -> None:
    part = PAGES["docs/specforge.md"].split("## The gates of pull request 600")[1].split("\n## ")[0]
    gates = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", part, re.M)][1:]
    assert len(gates) == 6
    for gate in gates:
        assert len(gate) == 6, gate[0]
        _, _, hugging_face, vllm, last_run, _ = gate
        assert "::test_" in hugging_face, gate[0]
        assert "::test_" in vllm, gate[0]
        assert re.match(r"\d{4}-\d\d-\d\d", last_run), gate[0]


# docs/training.md: what a run prints


def shape_of(line: str) -> str:
    """A line without what its run alone decides: paths and numbers."""
    line = re.sub(r"\S*(/checkpoints/step-)\d+", r"PATH\1N", line)
    line = re.sub(r"\S*(/config\.toml)", r"PATH\1", line)
    line = re.sub(r"^\S+: finished", "PATH: finished", line)
    line = re.sub(r"(those of) \S+", r"\1 PATH", line)
    return re.sub(r"\d[\d.]*(e[-+]\d+)?", "N", line)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The lines of runs that are resumed, finished, made longer and changed, in their shape."""
    root = write_run(tmp_path_factory.mktemp("printed"))
    data = ["train", "--target", root / "target", "--vocab", root / "vocab.safetensors"]
    talks = ["--conversations", root / "talks.jsonl", "--max-length", 64]
    assert main(list(map(str, ["extract", *data[1:3], *talks, "--out", root / "others"]))) == 0

    def train(out: str, *more: Any, features: str = "features") -> list[str]:
        where = ["--features", root / features, "--out", root / out]
        return [str(value) for value in (*data, *where, *more)]

    calls = [
        train("run", "--set", "train.steps=2", "--set", "objective.ttt_length=2", "--max-steps", 1),
        train("run"),
        train("run"),
        train("run", "--set", "train.steps=3", "--set", "train.eval_every=7"),
        train(
            "new",
            *("--from", root / "run", "--set", "optimizer.schedule=constant"),
            *("--set", "optimizer.learning_rate=5e-5", "--set", "train.steps=4"),
            features="others",
        ),
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        codes = [main(call) for call in calls]
    assert codes == [0] * len(calls)
    return {shape_of(line) for line in said.getvalue().splitlines()}


def test_example_lines_of_training_are_printed(printed: set[str]) -> None:
    said = [block for block in blocks("docs/training.md", "text") if "a rank holds" not in block]
    lines = [line for block in said for line in block.splitlines()]
    lines += re.findall(r"`(train\.\w+: \d+, was \d+)`", PAGES["docs/training.md"])
    start = [line for line in lines if line.startswith("train.init = ")]
    others = {shape_of(line) for line in lines if line not in start}
    assert len(others) > 7
    assert others - printed == set()

    # The head's rows, by the numbers that are in the example.
    rows = torch.arange(16384).where(torch.arange(16384) < 14210, -1)
    assert start == [Mapped(rows, 32000).line("DRAFT", of_target=True)]
