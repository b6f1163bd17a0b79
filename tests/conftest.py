"""Process-wide test set-up; the environment must be settled before torch is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from eagle3fn.testing.oracle import Oracle, OracleMissingError, load_oracle

torch.set_num_threads(1)

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=20, **COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The old tool, or a skip that names what to install."""
    found = oracle_or_skip()
    print(found.describe())
    return found


@pytest.fixture(scope="session")
def commit() -> Oracle:
    """The old tool at its commit alone."""
    return oracle_or_skip(commit=True)


def oracle_or_skip(commit: bool = False) -> Oracle:
    try:
        return load_oracle(commit=commit)
    except OracleMissingError as error:
        pytest.skip(str(error))
