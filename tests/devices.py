"""Which device the tests of this process run on, and what is told of them: hooks that `conftest` hands to pytest.

A test that takes an argument `device` is held on "cpu" always and on "cuda" where there is a card. The two need two
processes, as Triton's interpreter and its compiler cannot share one: `TEST_DEVICE` names this process's.

- absent: the CPU; what would run on a card is skipped, and says how it is run.
- `cpu`: the CPU alone.
- `cuda`: a card alone, which must be there. Nothing may be skipped, and no test at all is a failure.
- `stand-in`: the tests of "cuda" on a card that is not there (tests/stand_in_card.py). It certifies nothing.

PYTEST_DONT_REWRITE: it is imported before torch, to settle the environment.
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
FIRST = (  # in a process for one device: what matters most, in case time runs out
    *(
        "test_oracle_training",
        "test_reference_oracle",
        "test_parity",
        "test_plain_kernel",
        "test_fast_cuda",
    ),
    *("test_fast", "test_mesh_of_one", "test_laws"),
)
INTERPRETED = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
COMPILED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHDYNAMO_DISABLE": "1"}

begin = time.monotonic()


def settle_environment() -> None:
    """What torch and Triton must find when they are loaded."""
    if CHOSEN not in (None, "cpu", "cuda", "stand-in"):
        raise pytest.UsageError(f"{VARIABLE}={CHOSEN}: must be cpu, cuda or stand-in, or absent")
    if ON_CARD and "TRITON_INTERPRET" in os.environ:
        raise pytest.UsageError(
            "TRITON_INTERPRET is set: on a card Triton's kernels are compiled; unset it"
        )
    for name, value in (COMPILED if ON_CARD else INTERPRETED).items():
        os.environ.setdefault(name, value)


def settle_torch() -> None:
    """On a card: deterministic algorithms, and a card."""
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
    return f"no CUDA device for torch {torch.__version__} here; where there is one: `scripts/test.sh --device cuda`"


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
    """Options of a run that must tell everything within its time."""
    parser.addoption("--outcomes", type=Path, help="a file for one line of JSON a test, as it ends")
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="no test begins later; what is left is told",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, begin the file of outcomes, count what happens."""
    config.addinivalue_line(
        "markers", "device: takes the device that it runs on (tests/devices.py)"
    )
    config.stash[COUNTS] = Counter()
    if path := config.getoption("--outcomes"):
        path.write_text("")
        tell(config, {"run": about()})


def about() -> dict[str, Any]:
    """What a file of outcomes says of its run."""
    import torch

    from eagle3fn.base.provenance import provenance
    from tests.specforge.certificate import sources

    said = provenance("python -m pytest", os.environ.get("EAGLE3FN_REVISION"))
    return {"device": CHOSEN, "torch": torch.__version__, **said, "sources": sources(every=True)}


COUNTS = pytest.StashKey[Counter]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process for a card its tests alone; in one for any device the most telling first."""
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
    tell(config, {"collected": [item.nodeid for item in items]})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leave a test out that would begin after the run's time."""
    if time.monotonic() - begin < float(item.config.getoption("--seconds")):  # pyright: ignore
        return None
    item.config.stash[COUNTS]["left out"] += 1
    tell(item.config, {"test": item.nodeid, "outcome": "left out"})
    return True


@contextlib.contextmanager
def card() -> Iterator[None]:
    """The stand-in for a card, where this process is for one; else nothing."""
    if not STAND_IN:
        yield
        return
    from tests.stand_in_card import stand_in

    with stand_in():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Skip what is for a card in a process that is not; fixtures of the stand-in's tests find it."""
    device = getattr(item, "callspec", None) and item.callspec.params.get("device")  # pyright: ignore
    if device == "cuda" and not ON_CARD:
        pytest.skip(missing())
    with card():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test of the stand-in for a card runs inside it."""
    with card():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Tell a test's outcome once: at its call, or where it did not get there."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[COUNTS][report.outcome] += 1
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        row = {"test": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        tell(item.config, row | {"text": text})
    return report


def tell(config: pytest.Config, row: dict[str, Any]) -> None:
    """One line of the file of outcomes."""
    if path := config.getoption("--outcomes"):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On a card a skip is a failure, and so is a run without a test."""
    if faults(session.config) and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_report_header() -> str:
    """What a reader of the run should know first."""
    said = {None: missing(), "stand-in": "a stand-in for a card: certifies nothing"}
    return f"device: {said.get(CHOSEN, CHOSEN)}"


def told(config: pytest.Config) -> list[str]:
    """Lines for the end of the run."""
    left = config.stash[COUNTS]["left out"]
    return [*([f"{left} tests left out: no time"] if left else []), *faults(config)]


def faults(config: pytest.Config) -> list[str]:
    """What makes a run on a card no proof, though no test failed."""
    counts = config.stash[COUNTS]
    if not ON_CARD:
        return []
    found = (
        [f"{counts['skipped']} tests were skipped: on a card that is a failure"]
        if counts["skipped"]
        else []
    )
    return found + ([] if counts["passed"] else ["no test passed: nothing was verified"])
