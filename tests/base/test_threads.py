"""The number of threads: cores at hand, what is given and kept, and the choice by measurement.

No time is asserted: the measurement's clock is replaced by a table of times.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eagle3fn.base import cores, thread_timing, threads
from eagle3fn.base.errors import UserError
from eagle3fn.base.thread_timing import Sizes, candidates, fastest
from eagle3fn.base.threads import Kept, take_threads

Taken = Callable[[int], float]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No variable tells a number or a share, and torch's number is as before afterwards."""
    for name in (*threads.VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed(monkeypatch):
    """A function that sets how long the work takes by its number of threads."""

    def replace(taken: Taken) -> list[int]:
        tried: list[int] = []

        def seconds(work, repeats, most=math.inf):
            tried.append(torch.get_num_threads())
            return taken(torch.get_num_threads())

        monkeypatch.setattr(thread_timing, "_seconds", seconds)
        return tried

    return replace


def nothing() -> None:
    """Work that takes no time of its own."""


def amdahl(serial: float) -> Taken:
    """Seconds on a quiet machine of many cores."""
    return lambda count: serial + (1 - serial) / count


@pytest.mark.parametrize(
    ("cores", "counts"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (6, [1, 2, 3, 4, 6]),
        (64, [1, 2, 4, 8, 16, 32, 64]),
        (96, [1, 2, 4, 8, 16, 32, 48, 64, 96]),
    ],
)
def test_candidates_double_and_end_with_half_and_all(cores: int, counts: list[int]) -> None:
    assert candidates(cores) == counts


@pytest.mark.parametrize(
    ("taken", "count"),
    [
        (amdahl(0.05), 64),
        (lambda count: max(1 / count, 1 / 8), 8),  # more than 8 threads gain nothing
        (lambda count: 1 / count if count <= 16 else 0.2, 16),  # they cost
        (lambda count: 1.0 - 0.02 * (count > 1), 1),  # a gain of 2% is not worth a core
        (lambda count: 0.9 if count == 1 else 7.0, 1),  # other work holds the other cores
    ],
)
def test_fewest_of_the_fastest_is_chosen(timed, taken: Taken, count: int) -> None:
    timed(taken)
    before = torch.get_num_threads()
    assert fastest(lambda: nothing, candidates(64)).count == count
    assert torch.get_num_threads() == before


def test_larger_counts_are_not_tried_where_more_threads_are_slower(timed) -> None:
    tried = timed(lambda count: 1 / count if count <= 4 else 0.4)
    found = fastest(lambda: nothing, candidates(64))
    assert max(tried) == 8
    assert found.relative == {1: 1.0, 2: 0.5, 4: 0.25, 8: 0.4}


def test_hopeless_count_is_tried_twice(timed) -> None:
    tried = timed(lambda count: 1.0 if count == 1 else 9.0)
    found = fastest(lambda: nothing, [1, 2])
    assert tried.count(2) == 2
    assert found.relative == {1: 1.0, 2: 9.0}


def test_burst_of_other_work_does_not_decide(timed) -> None:
    calls = []

    def taken(count: int) -> float:
        calls.append(count)
        slow = len(calls) in (6, 7)  # both calls of the first round with 4 threads
        return (5.0 if slow else 1.0) / count

    timed(taken)
    assert fastest(lambda: nothing, [1, 2, 4]).count == 4


def test_measurement_ends_in_time_where_every_call_takes_long(monkeypatch) -> None:
    now = [0.0]

    def work() -> None:
        now[0] += 0.4

    monkeypatch.setattr(thread_timing, "perf_counter", lambda: now[0])
    found = fastest(lambda: work, candidates(64))
    assert found.count == 1
    assert found.seconds < 5
    assert max(found.relative) == 8  # what 3 s were enough for


def test_repeats_end_where_a_call_is_now_and_then_without_hope(monkeypatch) -> None:
    now = [0.0]
    calls = []

    def work() -> None:
        calls.append(torch.get_num_threads())
        blocked = calls[-1] == 2 and len(calls) % 3 == 0  # by other work of the machine
        now[0] += 1.0 if blocked else 1e-4

    monkeypatch.setattr(thread_timing, "perf_counter", lambda: now[0])
    found = fastest(lambda: work, [1, 2])
    assert found.count == 1
    assert found.seconds < 5


def test_slowest_rank_counts_and_unreached_counts_are_left_out(timed) -> None:
    class Ranks(thread_timing.World):
        def every(self, value):
            if isinstance(value, dict):
                return [value, {1: [1.0] * 7, 2: [0.9] * 7, 4: [0.1] * 3}]
            return [value]

    timed(amdahl(0.0))
    found = fastest(lambda: nothing, [1, 2, 4], Ranks())
    assert found.count == 2
    assert found.relative == {1: 1.0, 2: 0.9, 4: 0.25}


# What is given and kept


def test_measured_number_is_set_and_said(timed, monkeypatch) -> None:
    timed(amdahl(0.0))
    monkeypatch.setattr(threads, "own_cores", lambda: 2)
    line = take_threads(lambda: nothing, "cpu")
    assert torch.get_num_threads() == 2
    assert line.startswith("2 threads: fastest of 1, 2 in a measurement of ")
    assert "--threads" in line


def refuse_to_measure() -> thread_timing.Work:
    raise AssertionError("measured")


def test_given_comes_before_kept_and_kept_before_a_measurement(monkeypatch) -> None:
    kept = Kept(3, Path("run/horizon.json"))
    monkeypatch.setattr(threads, "own_cores", lambda: 8)
    assert "horizon.json" in take_threads(refuse_to_measure, "cpu", kept=kept)
    assert torch.get_num_threads() == 3
    line = take_threads(refuse_to_measure, "cpu", given=2, kept=kept)
    assert line == "2 threads: --threads sets the number"
    assert torch.get_num_threads() == 2

    # Fewer cores than threads: kept only for the bits' sake.
    monkeypatch.setattr(threads, "own_cores", lambda: 2)
    assert "horizon.json" in take_threads(refuse_to_measure, "cpu", kept=kept, bits_depend=True)
    with pytest.raises(AssertionError, match="measured"):
        take_threads(refuse_to_measure, "cpu", kept=kept)

    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    line = take_threads(refuse_to_measure, "cpu", kept=kept)
    assert line == "2 threads: OMP_NUM_THREADS sets the number"


def test_one_core_and_other_devices_need_no_measurement(monkeypatch) -> None:
    torch.set_num_threads(2)
    assert take_threads(refuse_to_measure, "cuda:1") == ""
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(threads, "own_cores", lambda: 1)
    assert take_threads(refuse_to_measure, "cpu").startswith("1 thread: there is one core")
    assert torch.get_num_threads() == 1


def test_another_number_is_refused_where_the_bits_depend_on_it() -> None:
    kept = Kept(3, Path("run/horizon.json"))
    with pytest.raises(UserError, match=r"begun with 3 threads, now --threads sets 2.*set 3"):
        take_threads(refuse_to_measure, "cpu", given=2, kept=kept, bits_depend=True)
    take_threads(refuse_to_measure, "cpu", given=3, kept=kept, bits_depend=True)
    take_threads(refuse_to_measure, "cpu", given=2, kept=kept)


def test_number_that_torchrun_wrote_is_not_counted_as_given(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    of_parent = b"PATH=/bin\0HOME=/root\0"
    monkeypatch.setattr(Path, "read_bytes", lambda path: of_parent)
    assert threads._of_environment() is None

    of_parent = b"PATH=/bin\0OMP_NUM_THREADS=1\0"
    assert threads._of_environment() == torch.get_num_threads()


def test_kept_number_is_the_one_of_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "threads.json"
    assert threads.read_kept(path) is None
    torch.set_num_threads(2)
    threads.keep_threads(path)
    torch.set_num_threads(1)
    threads.keep_threads(path)
    assert threads.read_kept(path) == Kept(2, path)


@pytest.mark.parametrize("count", [0, "2", True, 1.5])
def test_kept_file_that_holds_no_number_is_refused(tmp_path: Path, count: object) -> None:
    path = tmp_path / "threads.json"
    path.write_text(json.dumps({"threads": count}))
    with pytest.raises(UserError, match="must be a number of threads"):
        threads.read_kept(path)


# Cores


def test_ranks_on_one_machine_share_its_cores(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(cores, "quota", lambda: math.inf)
    assert cores.own_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores.own_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert cores.own_cores() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(cores, "quota", lambda: 2.5)
    assert cores.own_cores() == 3


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of files as a kernel shows them."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_quota_is_the_least_of_a_group_and_those_above(tmp_path: Path) -> None:
    assert cores.quota(tmp_path) == math.inf
    files = {
        "proc/self/cgroup": "0::/jobs/one\n",
        "sys/fs/cgroup/jobs/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
    }
    assert cores.quota(write(tmp_path, files)) == 2.5
    assert cores.quota(write(tmp_path, {"sys/fs/cgroup/cpu.max": "50000 100000\n"})) == 0.5


def test_quota_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/cpu/jobs"
    files = {
        "proc/self/cgroup": "5:memory:/jobs\n4:cpu,cpuacct:/jobs\n",
        f"{group}/cpu.cfs_quota_us": "400000\n",
        f"{group}/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert cores.quota(write(tmp_path, files)) == 4.0


# What is measured


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_measured_products_have_the_sizes_of_the_work() -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 50}
    assert thread_timing.sizes_of(config | {"intermediate_size": 24}) == Sizes(8, 24, 3, 50)
    assert thread_timing.sizes_of(config) == Sizes(8, 32, 3, 50)

    for dtype in (torch.float32, torch.bfloat16):
        large = products_of(thread_timing.large_products(8, 200, dtype))
        assert {((256, 8), (8, 200)), ((256, 200), (200, 8)), ((200, 256), (256, 8))} <= large
        thin = products_of(thread_timing.thin_products(Sizes(8, 24, 3, 50), [1, 9], dtype))
        assert {rows for (rows, _), _ in thin} == {1, 9}
        assert {weight for _, weight in thin} >= {(8, 8), (8, 24), (24, 8)}


def products_of(work: thread_timing.Work) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the matrices multiplied."""
    with torch.profiler.profile(record_shapes=True) as profile:
        work()
    found = set()
    for event in profile.events() or ():
        if event.name == "aten::mm":
            left, right = event.input_shapes[:2]
            found.add((tuple(left), tuple(right)))
    return found
