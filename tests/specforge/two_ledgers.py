"""Pull request 600's controller and our ledger under the same operations, compared after each.

Prompt and sample number `n` are `"task-n"` and `"run:task-n"` there, group `n` here. The clock of
its queue is replaced by one that is set; nothing else is.

The common domain is what an operation is brought to before both get it. Outside it one of the two
loses or repeats something, or orders it otherwise: `test_ledger_controller.py` shows each.
"""

import math
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from eagle3fn.data.ledger import Ledger, ack, add, commit, expire, fail, lease, opened, take
from eagle3fn.specforge.oracle import Oracle
from tests.specforge.oracle_online import CONTRACTS, CONTROLLER, QUEUE, STORE, specforge_module

TIMEOUT = 4.0  # seconds after which its queue takes a leased sample back
WORKERS = ("worker-0", "worker-1")
TRAINERS = ("trainer-0", "trainer-1")


class Modules(NamedTuple):
    """Its modules."""

    contracts: Any
    controller: Any
    queue: Any


def load_modules(oracle: Oracle) -> Modules:
    """Its modules, of the commit's bytes.

    Raises:
        OracleMissingError: a file is not there, or has other bytes.
    """
    specforge_module(oracle, STORE)
    return Modules(*(specforge_module(oracle, name) for name in (CONTRACTS, CONTROLLER, QUEUE)))


class Theirs:
    """A controller, and what of it is compared, by number."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.now = 0.0
        modules.queue.time = SimpleNamespace(monotonic=lambda: self.now)
        self.queue = modules.queue.SampleRefQueue(lease_timeout_s=TIMEOUT)
        self.controller = modules.controller.DataFlowController("run", sample_queue=self.queue)

    def ingest(self, numbers: Iterable[int]) -> None:
        self.controller.ingest_prompts([{"task_id": task(number)} for number in numbers])

    def lease(self, worker: str, most: int) -> list[int]:
        tasks = self.controller.lease_prompt_tasks(worker, most)
        return [number_of(each.task_id) for each in tasks]

    def commit(self, worker: str, numbers: Iterable[int]) -> None:
        self.controller.commit_samples(worker, [self.ref(number) for number in numbers])

    def fail_prompts(self, worker: str, numbers: Iterable[int], retryable: bool) -> None:
        tasks = [task(number) for number in numbers]
        self.controller.fail_prompt_tasks(worker, tasks, "torn", retryable)

    def take(self, trainer: str, most: int) -> list[int]:
        """Samples whose lease is over come back first."""
        refs = self.controller.lease_train_refs(trainer, most)
        return [number_of(ref.sample_id) for ref in refs]

    def ack(self, trainer: str, numbers: Iterable[int], step: int) -> None:
        samples = [sample(number) for number in numbers]
        self.controller.ack_train_refs(trainer, samples, global_step=step, optimizer_durable=True)

    def fail(self, trainer: str, numbers: Iterable[int], retryable: bool) -> None:
        samples = [sample(number) for number in numbers]
        self.controller.fail_refs(trainer, samples, "torn", retryable)

    def ref(self, number: int) -> Any:
        return self.modules.contracts.SampleRef(
            sample_id=sample(number),
            run_id="run",
            source_task_id=task(number),
            feature_store_uri="memory:",
            feature_keys={},
            feature_specs={},
            strategy="eagle3",
        )

    def waiting(self) -> list[int]:
        return [number_of(name) for name in self.controller._prompt_pending]

    def rolling(self) -> dict[int, str]:
        leased = self.controller._prompt_leased
        return {number_of(name): worker for name, worker in leased.items()}

    def ready(self) -> list[int]:
        return [number_of(name) for name in self.queue._pending]

    def training(self) -> dict[int, float]:
        """When each was leased."""
        return {number_of(name): when for name, (_, when) in self.queue._leased.items()}

    def attempts(self) -> dict[int, int]:
        prompts = self.controller._prompts
        return {number_of(name): prompt.attempt for name, prompt in prompts.items()}


def task(number: int) -> str:
    return f"task-{number}"


def sample(number: int) -> str:
    return f"run:task-{number}"


def number_of(name: str) -> int:
    return int(name.rsplit("-", 1)[1])


class Operation(NamedTuple):
    """A drawn operation; `picks` choose among the groups that it may be about."""

    name: str
    worker: str
    trainer: str
    count: int
    picks: list[int]
    retryable: bool


class Both:
    """Both sides; `play` makes one operation on each and compares everything."""

    def __init__(self, modules: Modules) -> None:
        self.theirs = Theirs(modules)
        self.ours: Ledger = opened()
        self.committed: set[int] = set()
        self.acked: set[int] = set()
        self.done: Counter[str] = Counter()

    def play(self, operation: Operation) -> None:
        getattr(self, operation.name)(operation)
        self.compare()

    def ingest(self, operation: Operation) -> None:
        count = 2 * operation.count
        self.theirs.ingest(range(self.ours.end, self.ours.end + count))
        self.ours = add(self.ours, count)

    def lease(self, operation: Operation) -> None:
        """As many that both sides lease the same ones: a retried prompt is its last, our first."""
        order = self.theirs.waiting()
        most = min(operation.count, len(order))
        while sorted(order[:most]) != list(self.ours.waiting[:most]):
            most += 1
        tasks = self.theirs.lease(operation.worker, most)
        self.ours, asked = lease(self.ours, operation.worker, most, math.inf)
        assert sorted(tasks) == list(asked)
        self.done["lease"] += len(asked)
        self.done["lease of a retried prompt"] += len(set(asked).intersection(self.ours.attempts))

    def commit(self, operation: Operation) -> None:
        """By either worker: prompts that somebody has leased, and answers that came before."""
        chosen = pick(operation.picks, [*self.ours.rolling, *self.committed])
        self.theirs.commit(operation.worker, chosen)
        self.ours, fresh = commit(self.ours, chosen)
        self.committed.update(fresh)
        self.done["commit"] += len(fresh)
        self.done["commit again"] += len(set(chosen) - set(fresh))

    def fail_prompts(self, operation: Operation) -> None:
        """Of either worker's leases, each named once; only its own are its to fail."""
        chosen = list(dict.fromkeys(pick(operation.picks, list(self.ours.rolling))))
        before = self.ours
        self.theirs.fail_prompts(operation.worker, chosen, operation.retryable)
        self.ours = fail(self.ours, operation.worker, chosen, operation.retryable)
        gone = len(before.rolling) - len(self.ours.rolling)
        self.done["retry" if operation.retryable else "given up"] += gone
        self.done["another's prompt"] += len(chosen) - gone

    def take(self, operation: Operation) -> None:
        """The first of the queue; leases of one call have one age, so they ascend."""
        self.expire(operation)
        rising = ascending(self.ours.ready[: operation.count])
        taken = self.theirs.take(operation.trainer, len(rising))
        until = self.theirs.now + TIMEOUT
        self.ours, ours = take(self.ours, operation.trainer, rising, until)
        assert taken == list(ours)
        self.done["take"] += len(ours)

    def expire(self, operation: Operation) -> None:
        """Its queue takes leases back when it is next asked."""
        self.theirs.now += operation.count
        assert self.theirs.take(operation.trainer, 0) == []
        self.ours, past = expire(self.ours, self.theirs.now)
        self.done["expire"] += len(past)

    def ack(self, operation: Operation) -> None:
        """What trainers hold, and what was acknowledged before; steps ascend."""
        chosen = pick(operation.picks, [*self.ours.training, *self.acked])
        step = 0 if self.ours.step is None else self.ours.step + 1
        if not set(chosen) - self.acked:
            # Without a fresh one its marker would go on all the same.
            return
        self.theirs.ack(operation.trainer, chosen, step)
        self.ours, fresh = ack(self.ours, chosen, step)
        self.acked.update(fresh)
        self.done["ack"] += len(fresh)
        self.done["ack again"] += len(set(chosen) - set(fresh))

    def fail(self, operation: Operation) -> None:
        """Of the trainer's own leases, retryable."""
        held = [n for n, held in self.ours.training.items() if held.holder == operation.trainer]
        chosen = pick(operation.picks, held)
        self.theirs.fail(operation.trainer, chosen, retryable=True)
        self.ours = fail(self.ours, operation.trainer, chosen, retryable=True)
        self.done["fail"] += len(chosen)

    def compare(self) -> None:
        theirs = self.theirs
        ours = self.ours
        status = theirs.controller.status()
        if not set(ours.waiting).intersection(ours.attempts):
            assert theirs.waiting() == list(ours.waiting)
        assert sorted(theirs.waiting()) == list(ours.waiting)
        assert theirs.rolling() == {n: held.holder for n, held in ours.rolling.items()}
        assert theirs.ready() == list(ours.ready)
        assert list(theirs.training().items()) == [
            (number, held.until - TIMEOUT) for number, held in ours.training.items()
        ]
        known = theirs.attempts()
        unsettled = [n for n in range(ours.first, ours.end) if n not in ours.settled]
        assert {n: known[n] for n in unsettled if known[n]} == ours.attempts
        assert status["prompts"] == ours.end
        assert status["prompts_failed"] == ours.given_up
        assert status["samples_committed"] == len(self.committed)
        assert status["queue_depth"] == len(ours.ready)
        assert status["queue_in_flight"] == len(ours.training)
        assert status["durable_global_step"] == ours.step
        assert status["durable_acked"] == len(self.acked)


def ascending(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Up to the first that is below the one before."""
    for place in range(1, len(numbers)):
        if numbers[place] < numbers[place - 1]:
            return numbers[:place]
    return numbers


def pick(picks: list[int], among: list[int]) -> list[int]:
    """One of `among` for each pick, the same one twice perhaps; none of nothing."""
    return [among[pick % len(among)] for pick in picks] if among else []
