"""Set-up of the whole test process. The environment must be set before torch is imported."""

import os

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

    tallies = config.stash.get(TALLIES, [])
    if tallies:
        terminalreporter.section("drawn cases by dtype, loss and unroll length K")
    for made in tallies:
        terminalreporter.line(made.describe())


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
