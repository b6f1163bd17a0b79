"""Set-up of the whole test process. The environment must be set before torch is imported."""

import os
from typing import Any

from tests import devices

devices.settle_environment()

import pytest
from hypothesis import HealthCheck, Phase, settings

from eagle3fn.specforge.oracle import Oracle, OracleMissingError, load_oracle
from eagle3fn.testing.triton_interpreter import mend_interpreter
from tests.tally import Tally

devices.settle_torch()
if not devices.ON_CARD:
    mend_interpreter()
pytest_plugins = ["tests.devices", "tests.serving"]

# Hypothesis: how many examples a property is checked on; HYPOTHESIS_PROFILE chooses.
COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", max_examples=20, **COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **COMMON)
settings.register_profile(
    "catch", settings.get_profile("ci"), max_examples=40, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("gate", settings.get_profile("catch"), max_examples=5)
settings.register_profile("nightly", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TALLIES = pytest.StashKey[list[Tally]]()
FROM_WORKERS = pytest.StashKey[list[str]]()  # what tallies of pytest-xdist's processes describe


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts the cases of a property; the run ends with the counts of all properties."""
    made = Tally(request.node.name)
    request.config.stash.setdefault(TALLIES, []).append(made)
    return made


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in devices.summary_lines(config):
        terminalreporter.line(line, red=True)

    found = [*described(config), *config.stash.get(FROM_WORKERS, [])]
    if found:
        terminalreporter.section("drawn cases by dtype, loss and unroll length K")
    for line in found:
        terminalreporter.line(line)


def described(config: pytest.Config) -> list[str]:
    """A line for each property that this process counted."""
    return [made.describe() for made in config.stash.get(TALLIES, [])]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give the counts to the process that prints them, if this one is a worker of pytest-xdist."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tallies"] = described(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep a worker's counts; one that crashed has none."""
    lines = getattr(node, "workeroutput", {}).get("tallies", [])
    node.config.stash.setdefault(FROM_WORKERS, []).extend(lines)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """SpecForge, installed or checked out; otherwise a skip that names what to install."""
    found = oracle_or_skip()
    print(found.describe())
    return found


@pytest.fixture(scope="session")
def commit() -> Oracle:
    """SpecForge at its pinned commit alone."""
    return oracle_or_skip(commit=True)


def oracle_or_skip(commit: bool = False) -> Oracle:
    try:
        return load_oracle(commit=commit, native=devices.ON_CARD)
    except OracleMissingError as error:
        pytest.skip(str(error))
