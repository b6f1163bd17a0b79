"""Which number of threads is fastest, by a short measurement of products like a command's own."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.launch import World

Work = Callable[[], object]
"""Computes once what is timed."""

_ROUNDS = 7
_LEAST_ROUNDS = 3
_ENOUGH_S = 1.5  # no further round after this time, if there were the least
_LIMIT_S = 3.0  # no further timing after this time
_CALL_S = 0.03  # of one timing with one thread, about
_MOST_REPEATS = 100
_HOPELESS = 4.0  # times the best
_STOP = 1.3  # a count this much slower than a smaller one: more threads are not tried
_WORTH = 0.03  # a larger count must gain this share

_ROWS = 256  # of the products of training and extraction
_PROBED_COLUMNS = 256
_DECODED_BYTES = 128 << 20  # of weights, beyond the processor's cache


class Measured(NamedTuple):
    """What the short measurement found."""

    count: int  # the fewest threads that are about as fast as the fastest
    relative: dict[int, float]  # seconds over those of one thread, of the counts that were tried
    seconds: float  # that the measurement took


class Sizes(NamedTuple):
    """A target's sizes that matter here."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int


def sizes_of(config: dict) -> Sizes:
    """The sizes in a target's configuration; one without a single MLP size counts as `4·H`."""
    hidden = config["hidden_size"]
    intermediate = config.get("intermediate_size")
    if not isinstance(intermediate, int):
        intermediate = 4 * hidden
    return Sizes(hidden, intermediate, config["num_hidden_layers"], config["vocab_size"])


def candidates(cores: int) -> list[int]:
    """1, 2, 4, …, half of the cores (two threads may share a core) and all of them."""
    counts = {1, max(1, cores // 2), cores}
    count = 2
    while count < cores:
        counts.add(count)
        count *= 2
    return sorted(counts)


# Measuring


def fastest(
    make_work: Callable[[], Work],
    counts: Sequence[int],
    world: World = World(),  # noqa: B008
) -> Measured:
    """Time the work at each number of threads, ascending from 1, in rounds.

    A round ends where a count is much slower than a smaller one. The median over rounds counts, so
    that neither a burst of other work decides nor a lucky moment on a busy machine. On several
    ranks all measure at once, as they will work, and the slowest counts. torch's number is
    afterwards as before.
    """
    begin = perf_counter()
    with _at(1):
        work = make_work()
        work()
        took = _seconds(work, 1)
    repeats = max(1, min(_MOST_REPEATS, int(_CALL_S / max(took, 1e-9))))

    world.barrier()
    rounds = _rounds(work, counts, repeats)

    # Of each round the ratios to one thread: other work of the machine changes from round to round.
    ratios: dict[int, list[float]] = {}
    for times in rounds:
        for count, took in times.items():
            ratios.setdefault(count, []).append(took / times[1])

    relative, usual = _over_ranks(world.every(ratios))
    return Measured(fewest(usual), relative, world.shared(perf_counter() - begin))


def _over_ranks(every: list[dict[int, list[float]]]) -> tuple[dict[int, float], dict[int, float]]:
    """Median ratios by count, the slowest rank's: of all counts, and of those that most rounds
    reached on all ranks.
    """
    relative = {}
    usual = {}
    for count in sorted(set().union(*every)):
        relative[count] = max(median(rank[count]) for rank in every if count in rank)
        if all(len(rank.get(count, ())) > len(rank[1]) / 2 for rank in every):
            usual[count] = relative[count]
    return relative, usual


def _rounds(work: Work, counts: Sequence[int], repeats: int) -> list[dict[int, float]]:
    """Seconds by count, in as many rounds as there is time for."""
    begin = perf_counter()
    end = begin + _LIMIT_S
    rounds: list[dict[int, float]] = []
    left = list(counts)
    while len(rounds) < _ROUNDS:
        if perf_counter() > begin + _ENOUGH_S and len(rounds) >= _LEAST_ROUNDS:
            break
        times = _round(work, left, repeats, end)
        if rounds and perf_counter() > end:  # it may have been cut short
            break
        rounds.append(times)

        # Without hope twice: that count and those above it are not tried again.
        best = min(times, key=times.__getitem__)
        for count, took in times.items():
            if len(rounds) > 1 and count > best and took > _HOPELESS * times[best]:
                left = [other for other in left if other < count]
    return rounds


def _round(work: Work, counts: Sequence[int], repeats: int, end: float) -> dict[int, float]:
    """Seconds by count, of one thread at least; it ends at the time `end`, and where more threads
    are much slower.
    """
    times: dict[int, float] = {}
    best = math.inf
    for count in counts:
        if times and perf_counter() > end:
            break
        with _at(count):
            # The first call starts threads and fills caches. It counts only where it leaves no
            # hope: eight times as slow was seen with two threads for one free core.
            took = _seconds(work, 1)
            if took < _HOPELESS * best:
                most = min(_HOPELESS * best * repeats, end - perf_counter())
                took = _seconds(work, repeats, most)
        times[count] = took
        if took > _STOP * best:
            break
        best = min(best, took)
    return times


def fewest(times: dict[int, float]) -> int:
    """The smallest count that is as fast as the fastest, to 3%."""
    best = min(times.values())
    return min(count for count, took in times.items() if took <= (1 + _WORTH) * best)


def _seconds(work: Work, repeats: int, most: float = math.inf) -> float:
    """Seconds of a call, a mean over `repeats`, or over those that begin within `most` seconds."""
    begin = perf_counter()
    calls = 0
    took = 0.0
    while calls == 0 or (calls < repeats and took <= most):
        work()
        calls += 1
        took = perf_counter() - begin
    return took / calls


@contextmanager
def _at(count: int) -> Iterator[None]:
    """torch computes with `count` threads in this block, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What is measured


def large_products(hidden: int, columns: int, dtype: torch.dtype) -> Work:
    """As training and extraction: three products with `(columns, hidden)`, exp and sums between.

    Fewer columns where these take longer than some hundredths of a second with one thread.
    """
    with _at(1):
        small = min(columns, _PROBED_COLUMNS)
        probe = _large_products(hidden, small, dtype)
        probe()
        took = _seconds(probe, 1)
    affordable = int(small * _CALL_S / max(took, 1e-9))
    return _large_products(hidden, max(small, min(columns, affordable)), dtype)


def _large_products(hidden: int, columns: int, dtype: torch.dtype) -> Work:
    x = torch.full((_ROWS, hidden), 0.01, dtype=dtype)
    weight = torch.full((columns, hidden), 0.01, dtype=dtype)
    moments = torch.full((columns, hidden), 0.01)

    @torch.no_grad()
    def work() -> None:
        logits = F.linear(x, weight)  # (rows, columns)
        p = torch.softmax(logits.float(), -1).to(dtype)
        torch.mm(p, weight)  # the gradient of x
        grad = p.T @ x  # of the weight
        moments.lerp_(grad.float(), 0.1)  # as an optimizer does

    return work


def thin_products(sizes: Sizes, rows: Sequence[int], dtype: torch.dtype) -> Work:
    """As decoding: a few rows through one layer after another, whose weights no cache holds.

    Args:
        sizes: the target's.
        rows: of each pass through the layers, such as 1 for a token and 8 for a verified block.
        dtype: of the weights.
    """
    hidden, intermediate, layers, vocab = sizes
    shapes = 2 * [(hidden, hidden)]
    shapes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]

    # What is affordable with one thread, as far as memory goes.
    layer_numbers = sum(a * b for a, b in shapes)
    with _at(1):
        probe = _thin_products(shapes, 1, 1, rows, dtype)
        probe()
        took = _seconds(probe, 1)
    affordable = int(layer_numbers * _CALL_S / max(took, 1e-9))
    most = min(_DECODED_BYTES // dtype.itemsize, affordable)

    # As many layers as fit, then as much of the head; at least one layer.
    count = max(1, min(layers, most // layer_numbers))
    columns = max(1, min(vocab, (most - count * layer_numbers) // hidden))
    return _thin_products(shapes, count, columns, rows, dtype)


def _thin_products(
    shapes: list[tuple[int, int]], count: int, columns: int, rows: Sequence[int], dtype: torch.dtype
) -> Work:
    hidden = shapes[0][0]
    stack: list[list[Tensor]] = []
    for _ in range(count):
        stack.append([torch.full(shape, 0.01, dtype=dtype) for shape in shapes])
    head = torch.full((columns, hidden), 0.01, dtype=dtype)

    @torch.no_grad()
    def work() -> None:
        for number in rows:
            x = torch.full((number, hidden), 0.01, dtype=dtype)
            for query, out, gate, up, down in stack:
                x = F.rms_norm(x + F.linear(F.linear(x, query), out), (hidden,))
                wide = F.silu(F.linear(x, gate)) * F.linear(x, up)
                x = F.rms_norm(x + F.linear(wide, down), (hidden,))
            F.linear(x, head).argmax(-1)

    return work
