"""Tests that need a serving engine: hooks for pytest, and where the engines are.

They have the mark `engines` and run only where it is asked for: `scripts/test.sh --engines` makes
the environments and runs `pytest -m engines`. `VLLM_PYTHON`, `LLAMACPP_PYTHON`,
`SPECULATORS_PYTHON` and `EAGLE_PYTHON` name the Pythons, `LLAMACPP_SRC` llama.cpp's tree, which has
its converter, `EAGLE_SRC` EAGLE's; what they name is not made. EAGLE's tree cannot be made: without
it its tests are skipped.

    python -m tests.serving FOLDER    make the rest in a folder, and print what these name
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.engines.environments import SOURCES, find_places

PYTHONS = {
    "vllm": "VLLM_PYTHON",
    "llamacpp": "LLAMACPP_PYTHON",
    "speculators": "SPECULATORS_PYTHON",
    "eagle": "EAGLE_PYTHON",
}
LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "engines: needs a serving engine, run by scripts/test.sh --engines"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out of a run that does not ask for them."""
    if "engines" in str(config.getoption("-m") or ""):
        return
    out = [item for item in items if item.get_closest_marker("engines")]
    if out:
        items[:] = [item for item in items if not item.get_closest_marker("engines")]
        config.hook.pytest_deselected(items=out)
    config.stash[LEFT_OUT] = len(out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give the count to the process that prints it, if this one is a worker of pytest-xdist."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep a worker's count; every worker collects the same tests."""
    output = getattr(node, "workeroutput", {})
    if "left_out" in output:
        node.config.stash[LEFT_OUT] = output["left_out"]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, and the command that runs it."""
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.line(f"{count} tests need a serving engine: scripts/test.sh --engines")


def python_of(engine: str) -> str:
    """The Python of an engine's environment.

    A run that asks for these tests must have it: without it the test fails, but for EAGLE's.
    """
    if engine == "eagle" and not has_eagle():
        pytest.skip(f"{SOURCES[engine].variable} names no checkout of EAGLE")
    return _named(PYTHONS[engine], "")


def source_of(engine: str) -> str:
    """The source tree that an engine needs; as `python_of`."""
    source = SOURCES[engine]
    return _named(source.variable, source.file)


def has_eagle() -> bool:
    """Whether `EAGLE_SRC` is set."""
    return bool(os.environ.get(SOURCES["eagle"].variable))


def _named(variable: str, file: str) -> str:
    found = os.environ.get(variable, "")
    assert found and (Path(found) / file).exists(), (
        f"{variable} = {found!r}: run scripts/test.sh --engines"
    )
    return found


def main(folder: str) -> int:
    """Print `NAME=VALUE` of every variable; returns the exit code."""
    given = {engine: os.environ[name] for engine, name in PYTHONS.items() if os.environ.get(name)}
    try:
        engines = [engine for engine in PYTHONS if engine != "eagle" or has_eagle()]
        places = find_places(engines, folder, given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for engine, place in places.items():
        print(f"{PYTHONS[engine]}={place.python}")
        if place.source:
            print(f"{SOURCES[engine].variable}={place.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
