"""Which device this process's tests run on, and a record of their outcomes: hooks for pytest.

A test with an argument `device` runs on "cpu", and on "cuda" where there is a card. Triton's
interpreter and its compiler cannot share a process, so each device needs one: `TEST_DEVICE` names
this process's.

- absent: the CPU; a test for a card is skipped, and its reason names the command that runs it
- `cpu`: the CPU alone
- `cuda`: a card alone, which must be there; a skipped test, or no test at all, is a failure
- `stand-in`: the tests of "cuda" on a simulated card (tests/stand_in_card.py); certifies nothing

PYTEST_DONT_REWRITE: this is imported before torch, to set the environment.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "TEST_DEVICE"
CHOSEN = os.environ.get(VARIABLE)
ON_CARD = CHOSEN == "cuda"
STAND_IN = CHOSEN == "stand-in"
FIRST = (
    "test_oracle_training",
    "test_reference_oracle",
    "test_reference_parity",
    "test_kl_kernel",
    "test_fast_cuda",
    "test_fast",
    "test_packed",
    "test_mesh_of_one",
    "test_laws",
)
"""Modules that run first in a process for one device, the most important first."""

INTERPRETED = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
COMPILED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHDYNAMO_DISABLE": "1"}

COUNTS = pytest.StashKey[Counter]()
BEGIN = time.monotonic()


def settle_environment() -> None:
    """Set the variables that torch and Triton read when they are loaded.

    Raises:
        UsageError: an unknown device, or kernels that are to be interpreted on a card.
    """
    if CHOSEN not in (None, "cpu", "cuda", "stand-in"):
        raise pytest.UsageError(f"{VARIABLE}={CHOSEN}: must be cpu, cuda or stand-in, or absent")
    if ON_CARD and "TRITON_INTERPRET" in os.environ:
        raise pytest.UsageError(
            "TRITON_INTERPRET is set: on a card Triton's kernels are compiled; unset it"
        )
    for name, value in (COMPILED if ON_CARD else INTERPRETED).items():
        os.environ.setdefault(name, value)


def settle_torch() -> None:
    """Set one thread; for a card deterministic algorithms.

    Raises:
        UsageError: no card is there.
    """
    import torch

    torch.set_num_threads(1)
    if ON_CARD and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"{VARIABLE}=cuda: torch {torch.__version__} finds no CUDA device here"
        )
    torch.use_deterministic_algorithms(ON_CARD)


def missing() -> str:
    """Why a test does not run on a card in a process that is not for one."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return f"a card is here ({name}): `scripts/test.sh --device cuda` runs this on it"
    return (
        f"no CUDA device for torch {torch.__version__} here; "
        "where there is one: `scripts/test.sh --device cuda`"
    )


def devices() -> list[Any]:
    """The values of `device`, as parameters of a test."""
    mark = pytest.mark.device
    if CHOSEN is not None:
        return [pytest.param("meta" if STAND_IN else CHOSEN, marks=mark, id=CHOSEN)]
    return [pytest.param("cpu", marks=mark), pytest.param("cuda", marks=mark)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that takes a `device` this process's."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(), scope="session")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for a record of the outcomes, and for a limit of time."""
    parser.addoption("--outcomes", type=Path, help="a file for one line of JSON a test, as it ends")
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="no test begins later; those are counted as left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, begin the record of outcomes, and start to count them."""
    config.addinivalue_line(
        "markers", "device: takes the device that it runs on (tests/devices.py)"
    )
    config.stash[COUNTS] = Counter()
    path = config.getoption("--outcomes")
    if path is not None:
        path.write_text("")
        record(config, {"run": provenance_of_run()})


def provenance_of_run() -> dict[str, Any]:
    """The first row of a record: device, revision, versions, hardware, hashes of the sources."""
    import torch

    from eagle3fn.base.provenance import provenance
    from tests.specforge.certificate import sources

    found = provenance("python -m pytest", os.environ.get("EAGLE3FN_REVISION"))
    return {"device": CHOSEN, "torch": torch.__version__, **found, "sources": sources(every=True)}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select a card's tests in a process for one; sort by `FIRST` in a process for any device."""
    if ON_CARD or STAND_IN:
        other = [item for item in items if not item.get_closest_marker("device")]
        items[:] = [item for item in items if item.get_closest_marker("device")]
        config.hook.pytest_deselected(items=other)
    if CHOSEN is not None:
        order = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))
    if ON_CARD and "TRITON_INTERPRET" in os.environ:
        raise pytest.UsageError(
            "TRITON_INTERPRET was set while the tests were collected: find the module that sets it"
        )
    record(config, {"collected": [item.nodeid for item in items]})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leave out a test that would begin after the run's time."""
    if time.monotonic() - BEGIN < float(item.config.getoption("--seconds")):  # pyright: ignore
        return None
    item.config.stash[COUNTS]["left out"] += 1
    record(item.config, {"test": item.nodeid, "outcome": "left out"})
    return True


@contextlib.contextmanager
def card() -> Iterator[None]:
    """The simulated card in a process for it; nothing elsewhere."""
    if not STAND_IN:
        yield
        return
    from tests.stand_in_card import stand_in

    with stand_in():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Skip a card's test in a process for another device; set up fixtures on the simulated card."""
    callspec: Any = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("device") == "cuda" and not ON_CARD:
        pytest.skip(missing())
    with card():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Run a test on the simulated card in a process for it."""
    with card():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Record a test's outcome: that of its call, and a failure or skip before or after it."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[COUNTS][report.outcome] += 1

        # Of a skip, pytest keeps file, line and reason.
        reason_alone = isinstance(report.longrepr, tuple)
        row = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "text": report.longrepr[2] if reason_alone else report.longreprtext,
        }
        record(item.config, row)
    return report


def record(config: pytest.Config, row: dict[str, Any]) -> None:
    """Append one line to the record of outcomes, if there is one."""
    path = config.getoption("--outcomes")
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run on a card with a skipped test, or with none at all."""
    good = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if faults(session.config) and session.exitstatus in good:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_report_header() -> str:
    """The device."""
    shown = {None: missing(), "stand-in": "a simulated card: certifies nothing"}
    return f"device: {shown.get(CHOSEN, CHOSEN)}"


def summary_lines(config: pytest.Config) -> list[str]:
    """Lines for the end of the run."""
    left_out = config.stash[COUNTS]["left out"]
    lines = [f"{left_out} tests left out: no time"] if left_out else []
    return lines + faults(config)


def faults(config: pytest.Config) -> list[str]:
    """Why a run on a card is no proof, though no test failed."""
    if not ON_CARD:
        return []
    counts = config.stash[COUNTS]
    found = []
    if counts["skipped"]:
        found.append(f"{counts['skipped']} tests were skipped: on a card that is a failure")
    if not counts["passed"]:
        found.append("no test passed: nothing was verified")
    return found
