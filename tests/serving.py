"""Tests that need a serving engine: hooks for pytest, and where the engines are.

They have the mark `engines` and are collected only where it is asked for: `scripts/test.sh
--engines` makes the environments and runs `pytest -m engines`. `VLLM_PYTHON` and `LLAMACPP_PYTHON`
name the Pythons; `LLAMACPP_SRC` llama.cpp's tree, which has its converter.
"""

import os
from pathlib import Path

import pytest

PYTHONS = {"vllm": "VLLM_PYTHON", "llamacpp": "LLAMACPP_PYTHON"}
LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "engines: needs a serving engine, run by scripts/test.sh --engines"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out of a run that does not ask for them."""
    if "engines" in config.getoption("-m"):
        return
    out = [item for item in items if item.get_closest_marker("engines")]
    if out:
        items[:] = [item for item in items if not item.get_closest_marker("engines")]
        config.hook.pytest_deselected(items=out)
    config.stash[LEFT_OUT] = len(out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, and the command that runs it."""
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.line(f"{count} tests need a serving engine: scripts/test.sh --engines")


def python_of(engine: str) -> str:
    """The Python of an engine's environment.

    A run that asks for these tests must have it: without it the test fails.
    """
    variable = PYTHONS[engine]
    found = os.environ.get(variable, "")
    assert Path(found).is_file(), f"{variable} = {found!r}: run scripts/test.sh --engines"
    return found


def source_of_llamacpp() -> str:
    """llama.cpp's tree, which has its converter."""
    found = os.environ.get("LLAMACPP_SRC", "")
    file = Path(found) / "convert_hf_to_gguf.py"
    assert file.is_file(), f"LLAMACPP_SRC = {found!r}: run scripts/test.sh --engines"
    return found
