"""The ledger does what pull request 600's controller does, where that neither loses nor repeats.

One property on drawn operations (`tests.specforge.two_ledgers` has the common domain); then each
difference, on both sides.
"""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.data.ledger import (
    GivenUp,
    Ledger,
    ack,
    add,
    commit,
    expire,
    fail,
    lease,
    opened,
    take,
)
from eagle3fn.specforge.oracle import Oracle, OracleMissingError
from tests.specforge.two_ledgers import (
    TIMEOUT,
    TRAINERS,
    WORKERS,
    Both,
    Modules,
    Operation,
    Theirs,
    load_modules,
)

OPERATIONS = ("ingest", "lease", "commit", "fail_prompts", "take", "expire", "ack", "fail")
operations = st.builds(
    Operation,
    name=st.sampled_from((*OPERATIONS, "lease", "commit", "take", "ack")),
    worker=st.sampled_from(WORKERS),
    trainer=st.sampled_from(TRAINERS),
    count=st.integers(1, 3),
    picks=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    retryable=st.sampled_from((True, True, False)),
)
KINDS = (
    "lease",
    "lease of a retried prompt",
    "commit",
    "commit again",
    "retry",
    "given up",
    "another's prompt",
    "take",
    "expire",
    "ack",
    "ack again",
    "fail",
)


@pytest.fixture(scope="module")
def modules(commit: Oracle) -> Iterator[Modules]:
    """The commit's control plane; its queue has its own clock again afterwards."""
    try:
        loaded = load_modules(commit)
    except OracleMissingError as error:
        pytest.skip(str(error))
    clock = loaded.queue.time
    yield loaded
    loaded.queue.time = clock


def test_drawn_operations_have_the_same_result_on_both_sides(modules: Modules) -> None:
    done: Counter[str] = Counter()

    # Enough for every kind of operation, whatever the profile.
    @settings(max_examples=max(100, settings().max_examples))
    @given(st.lists(operations, min_size=40, max_size=80))
    def play(drawn: list[Operation]) -> None:
        both = Both(modules)
        for operation in drawn:
            both.play(operation)
        done.update(both.done)

    play()
    assert not [kind for kind in KINDS if done[kind] < 10], done


# Where the two differ


def rolled_out(theirs: Theirs, count: int) -> Ledger:
    """`count` groups that the first worker rolls out, on both sides."""
    theirs.ingest(range(count))
    assert theirs.lease(WORKERS[0], count) == [*range(count)]
    ledger, _ = lease(add(opened(), count), WORKERS[0], count, until=1.0)
    return ledger


def in_training(theirs: Theirs, count: int) -> Ledger:
    """`count` groups that the first trainer has taken, on both sides."""
    ledger, fresh = commit(rolled_out(theirs, count), range(count))
    theirs.commit(WORKERS[0], fresh)
    assert theirs.take(TRAINERS[0], count) == list(fresh)
    ledger, _ = take(ledger, TRAINERS[0], fresh, until=TIMEOUT)
    return ledger


def test_an_acknowledged_sample_that_fails_is_trained_again_there(modules: Modules) -> None:
    """A failure that arrives after the acknowledgement must not undo it."""
    theirs = Theirs(modules)
    ledger = in_training(theirs, 1)
    theirs.ack(TRAINERS[0], [0], 0)
    theirs.fail(TRAINERS[0], [0], retryable=True)
    assert theirs.take(TRAINERS[1], 1) == [0]

    ledger, _ = ack(ledger, [0], 0)
    assert fail(ledger, TRAINERS[0], [0], retryable=True) == ledger
    assert take(ledger, TRAINERS[1], [0]) == (ledger, ())


def test_a_late_acknowledgement_does_not_keep_a_sample_from_the_next_trainer_there(
    modules: Modules,
) -> None:
    """The update was made, so the sample must not be handed out again."""
    theirs = Theirs(modules)
    ledger = in_training(theirs, 1)
    theirs.now += TIMEOUT + 1
    assert theirs.take(TRAINERS[1], 0) == [] and theirs.ready() == [0]
    theirs.ack(TRAINERS[0], [0], 0)
    assert theirs.take(TRAINERS[1], 1) == [0]

    ledger, past = expire(ledger, TIMEOUT + 1)
    assert past == (0,)
    ledger, fresh = ack(ledger, [0], 0)
    assert fresh == (0,)
    assert take(ledger, TRAINERS[1], [0])[1] == ()


def test_anybody_can_fail_anothers_sample_there(modules: Modules) -> None:
    """Two trainers then have it at once; a lease is its holder's to give back."""
    theirs = Theirs(modules)
    ledger = in_training(theirs, 1)
    theirs.fail(TRAINERS[1], [0], retryable=True)
    assert theirs.take(TRAINERS[1], 1) == [0]

    assert fail(ledger, TRAINERS[1], [0], retryable=True) == ledger


def test_a_sample_that_cannot_be_retried_vanishes_there(modules: Modules) -> None:
    """Neither waiting, leased nor acknowledged, and in no count: a loss must be seen."""
    theirs = Theirs(modules)
    ledger = in_training(theirs, 2)
    theirs.fail(TRAINERS[0], [1], retryable=False)
    status = theirs.controller.status()
    assert theirs.ready() == [] and list(theirs.training()) == [0]
    assert status["prompts_failed"] == 0 and status["durable_acked"] == 0

    ledger = fail(ledger, TRAINERS[0], [1], retryable=False, reason="NaN")
    assert ledger.settled == {1: GivenUp("NaN")} and ledger.given_up == 1


def test_a_committed_prompt_that_fails_is_computed_again_there(modules: Modules) -> None:
    """A prompt without a lease is anybody's to fail: the target's work is done twice."""
    theirs = Theirs(modules)
    ledger, fresh = commit(rolled_out(theirs, 1), [0])
    theirs.commit(WORKERS[0], fresh)
    theirs.fail_prompts(WORKERS[0], [0], retryable=True)
    assert theirs.lease(WORKERS[1], 1) == [0]

    assert fail(ledger, WORKERS[0], [0], retryable=True) == ledger
    assert lease(ledger, WORKERS[1], 1, math.inf)[1] == ()


def test_a_late_answer_does_not_spare_the_second_roll_out_there(modules: Modules) -> None:
    """The features are there, so the prompt need not wait for a worker any more."""
    theirs = Theirs(modules)
    ledger = fail(rolled_out(theirs, 1), WORKERS[0], [0], retryable=True)
    theirs.fail_prompts(WORKERS[0], [0], retryable=True)
    theirs.commit(WORKERS[0], [0])
    assert theirs.ready() == [0] and theirs.lease(WORKERS[1], 1) == [0]

    ledger, fresh = commit(ledger, [0])
    assert fresh == (0,) and lease(ledger, WORKERS[1], 1, math.inf)[1] == ()


def test_a_failure_that_is_reported_twice_counts_twice_there(modules: Modules) -> None:
    """A limit of attempts would be reached by messages, not by attempts."""
    theirs = Theirs(modules)
    theirs.ingest([0])
    theirs.lease(WORKERS[0], 1)
    theirs.fail_prompts(WORKERS[0], [0, 0], retryable=True)
    assert theirs.attempts() == {0: 2}

    ledger = rolled_out(Theirs(modules), 1)
    assert fail(ledger, WORKERS[0], [0, 0], retryable=True).attempts == {0: 1}


def test_a_prompt_that_was_given_up_is_trained_by_a_late_answer_there(modules: Modules) -> None:
    """It is reported as failed and trained: what is given up must stay so, or nobody can count."""
    theirs = Theirs(modules)
    ledger = rolled_out(theirs, 1)
    theirs.fail_prompts(WORKERS[0], [0], retryable=False)
    theirs.commit(WORKERS[0], [0])
    assert theirs.controller.status()["prompts_failed"] == 1
    assert theirs.take(TRAINERS[0], 1) == [0]

    ledger = fail(ledger, WORKERS[0], [0], retryable=False)
    assert commit(ledger, [0]) == (ledger, ())


def test_a_dead_workers_prompt_is_leased_for_ever_there(modules: Modules) -> None:
    """Only samples' leases end there; a trainer that takes prompts in order would wait for ever."""
    theirs = Theirs(modules)
    ledger = rolled_out(theirs, 1)
    theirs.now += 1e9
    assert theirs.take(TRAINERS[0], 1) == [] and theirs.lease(WORKERS[1], 1) == []
    assert theirs.rolling() == {0: WORKERS[0]}

    ledger, past = expire(ledger, 1e9)
    assert past == (0,) and lease(ledger, WORKERS[1], 1, math.inf)[1] == (0,)


def test_a_prompt_that_comes_twice_is_leased_twice_there(modules: Modules) -> None:
    """Ours numbers groups itself, so a second one is another group."""
    theirs = Theirs(modules)
    theirs.ingest([0, 0])
    assert theirs.lease(WORKERS[0], 1) == [0] and theirs.lease(WORKERS[1], 1) == [0]

    ledger = add(add(opened()))
    assert lease(ledger, WORKERS[0], 9, math.inf)[1] == (0, 1)


def test_a_retried_prompt_is_the_last_there_and_the_first_here(modules: Modules) -> None:
    """There the trainer takes what comes first; here batches have one order: it is waited for."""
    theirs = Theirs(modules)
    ledger = rolled_out(theirs, 1)
    theirs.ingest([1, 2])
    theirs.fail_prompts(WORKERS[0], [0], retryable=True)
    assert theirs.lease(WORKERS[1], 3) == [1, 2, 0]

    ledger = fail(add(ledger, 2), WORKERS[0], [0], retryable=True)
    assert lease(ledger, WORKERS[1], 3, math.inf)[1] == (0, 1, 2)


def test_its_marker_follows_messages_without_effect(modules: Modules) -> None:
    """A resume at it would leave steps out, or make them twice: it says what was sent last."""
    theirs = Theirs(modules)
    ledger = in_training(theirs, 1)
    theirs.ack(TRAINERS[0], [0], 5)
    theirs.ack(TRAINERS[0], [77], 9)
    assert theirs.controller.status()["durable_global_step"] == 9
    theirs.ack(TRAINERS[0], [0], 3)
    status = theirs.controller.status()
    assert status["durable_global_step"] == 3 and status["durable_acked"] == 2

    ledger, _ = ack(ledger, [0], 5)
    for ids, step in (([77], 9), ([0], 3)):
        assert ack(ledger, ids, step) == (ledger, ())
    assert ledger.step == 5


def test_its_records_grow_with_the_run(modules: Modules) -> None:
    """Every prompt, sample and acknowledgement is kept; ours forgets what is settled."""
    theirs = Theirs(modules)
    ledger = opened()
    for number in range(100):
        theirs.ingest([number])
        ledger, _ = lease(add(ledger), WORKERS[0], 1, math.inf)
        theirs.lease(WORKERS[0], 1)
        theirs.commit(WORKERS[0], [number])
        ledger, _ = commit(ledger, [number])
        theirs.take(TRAINERS[0], 1)
        ledger, _ = take(ledger, TRAINERS[0], [number])
        theirs.ack(TRAINERS[0], [number], number)
        ledger, _ = ack(ledger, [number], number)

    status = theirs.controller.status()
    assert status["prompts"] == status["samples_committed"] == status["durable_acked"] == 100
    assert ledger == opened(100)._replace(step=99)
