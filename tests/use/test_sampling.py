"""Speculative sampling: the law of what is emitted is the target's, by enumeration and by draws."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import Sampling
from eagle3fn.model.table import init_params
from eagle3fn.use import choosers
from eagle3fn.use.decode import speculate
from eagle3fn.use.export import Draft
from eagle3fn.use.sampling import (
    distribution,
    draw,
    nucleus,
    of_prompt,
    overlap,
    residual,
    tempered,
    verify,
)
from tests.factories import make_draft, make_map
from tests.use.tiny_target import prompt, random_draft, target

# The law of a round, by enumeration of all that is drawn and of all cells of its random numbers


def cells(breaks: Sequence[float], edges: bool = False) -> list[tuple[float, float]]:
    """The pieces of [0, 1) between breaks: the middle and the width of each.

    With `edges` the halves of each piece, and a place next to its end.
    """
    ends = sorted({0.0, 1.0, *(value for value in breaks if 0 < value < 1)})
    found = []
    for low, high in itertools.pairwise(ends):
        width = high - low
        if edges:
            tiny = 1e-9 * width
            found += [(low + tiny, width / 2), (high - tiny, width / 2)]
        else:
            found.append((low + width / 2, width))
    return found


def emitted_law(p: Tensor, q: Tensor, edges: bool = False) -> Counter[tuple[int, ...]]:
    """The probability of every outcome of `verify`, where row `i` of `q` draws token `i`.

    `verify` is constant in its random numbers between the places where a ratio, or a distribution
    function of what is drawn last, has a value.
    """
    count, size = q.shape
    finals = [p[-1], *(residual(p[place], q[place]) for place in range(count))]
    breaks = [float(value) for chances in finals for value in chances.cumsum(-1)]
    last = cells(breaks, edges)
    law: Counter[tuple[int, ...]] = Counter()
    for drafted in itertools.product(range(size), repeat=count):
        chance = math.prod(float(q[place, token]) for place, token in enumerate(drafted))
        if not chance:
            continue
        ratios = [float(p[place, token] / q[place, token]) for place, token in enumerate(drafted)]
        for numbers in itertools.product(*(cells([ratio], edges) for ratio in ratios), last):
            uniforms = [middle for middle, _ in numbers]
            width = math.prod(width for _, width in numbers)
            law[tuple(verify(drafted, p, q, uniforms))] += chance * width  # pyright: ignore
    return law


def distributions(size: int) -> st.SearchStrategy[Tensor]:
    """Chances of `size` tokens, some of them 0."""
    weights = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    return weights.map(lambda values: torch.tensor(values, dtype=torch.float64) / sum(values))


@given(st.data(), st.integers(1, 6))
def test_a_token_has_the_targets_law(data, size):
    """One drafted token: the first token that comes out is drawn from `p`, whatever `q` is."""
    p, q = data.draw(distributions(size)), data.draw(distributions(size))
    found = torch.zeros(size, dtype=torch.float64)
    for tokens, chance in emitted_law(torch.stack([p, p]), q[None], edges=True).items():
        found[tokens[0]] += chance
    torch.testing.assert_close(found, p, atol=1e-12, rtol=0)


@given(st.data(), st.integers(2, 3))
def test_every_token_of_a_round_has_the_targets_law(data, size):
    """Two drafted tokens: after the accepted ones the next is drawn from its own row of `p`."""
    p = torch.stack([data.draw(distributions(size)) for _ in range(3)])
    q = torch.stack([data.draw(distributions(size)) for _ in range(2)])
    law = emitted_law(p, q)
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)

    accepted = [float(overlap(p[place], q[place])) for place in range(2)]
    reached = [1.0, accepted[0], accepted[0] * accepted[1]]
    for place in range(3):
        found = torch.zeros(size, dtype=torch.float64)
        for tokens, chance in law.items():
            if len(tokens) > place:
                found[tokens[place]] += chance
        torch.testing.assert_close(found, p[place] * reached[place], atol=1e-12, rtol=0)


@given(distributions(5), distributions(5))
def test_as_many_are_accepted_as_can_be(p, q):
    """The chance to accept is 1 less the total variation distance, which no rule exceeds."""
    law = emitted_law(torch.stack([p, p]), q[None])
    accepted = sum(chance for tokens, chance in law.items() if len(tokens) == 2)
    distance = float((p - q).abs().sum() / 2)
    assert math.isclose(accepted, 1 - distance, abs_tol=1e-12)
    assert math.isclose(float(overlap(p, q)), 1 - distance, abs_tol=1e-12)


# Distributions


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8), st.floats(0.05, 20))
def test_tempered_is_its_formula(logits, temperature):
    found = tempered(torch.tensor(logits, dtype=torch.float64), temperature)
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    expected = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_a_temperature_near_zero_leaves_the_likeliest():
    found = tempered(torch.tensor([1.0, 3.0, -torch.inf, 2.0]), 1e-300)
    assert found.tolist() == [0.0, 1.0, 0.0, 0.0]


@given(distributions(6), st.floats(0.01, 1))
def test_nucleus_is_the_smallest_that_reaches_its_mass(chances, top_p):
    kept = nucleus(chances, top_p)
    inside = kept > 0
    mass = float(chances[inside].sum())
    assert mass >= top_p - 1e-12
    assert mass - float(chances[inside].min()) < top_p + 1e-12
    torch.testing.assert_close(kept, chances * inside / mass, atol=1e-12, rtol=0)
    rest = chances[~inside & (chances > 0)]
    assert not len(rest) or float(rest.max()) <= float(chances[inside].min())


def test_nucleus_by_hand():
    chances = torch.tensor([[0.1, 0.5, 0.4], [0.25, 0.5, 0.25]], dtype=torch.float64)
    found = nucleus(chances, 0.75)
    expected = [[0.0, 5 / 9, 4 / 9], [1 / 3, 2 / 3, 0.0]]  # of equals the lower id
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(nucleus(chances, 1.0), chances)


@given(distributions(6), st.floats(0, 1, exclude_max=True))
def test_no_token_without_mass_is_drawn(chances, uniform):
    assert chances[draw(chances, uniform)] > 0
    assert chances[draw(chances, 1 - 2**-53)] > 0


def test_draws_by_hand():
    chances = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert [draw(chances, at) for at in (0.0, 0.24, 0.25, 0.74, 0.75, 0.99)] == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(UserError, match="logits of target or draft are not finite"):
        draw(distribution(torch.tensor([0.0, value, 1.0]), Sampling(1.0)), 0.5)


# Whole answers

WARM = Sampling(0.7, 0.9, 5)


def test_an_answer_is_a_function_of_its_seed():
    ids, draft = prompt(1, 5), random_draft()
    torch.manual_seed(0)
    first = speculate(target(), draft, ids, 3, 24, (), WARM)
    torch.manual_seed(1)
    speculate(target(), draft, prompt(2, 5), 3, 24, (), WARM)
    again = speculate(target(), draft, ids, 3, 24, (), WARM)
    assert again.tokens == first.tokens
    assert again.chances == first.chances
    other = speculate(target(), draft, ids, 3, 24, (), WARM._replace(seed=6))
    assert other.tokens != first.tokens


def test_prompts_draw_apart():
    both = [WARM, WARM._replace(seed=6)]
    seeds = {of_prompt(one, number).seed for one in both for number in (1, 2)}
    assert len(seeds) == 4
    assert of_prompt(WARM, 3) == of_prompt(WARM, 3)
    assert of_prompt(WARM, 3)._replace(seed=5) == WARM


@pytest.mark.parametrize("length", [0, 4])
def test_a_low_temperature_gives_the_greedy_tokens(length):
    ids, draft = prompt(1, 4), random_draft()
    cold = speculate(target(), draft, ids, length, 16, (), Sampling(1e-6))
    assert cold.tokens == speculate(target(), draft, ids, length, 16, ()).tokens


def test_counts_and_chances():
    found = speculate(target(), random_draft(), prompt(1, 5), 3, 40, (), Sampling(3.0))
    assert len(found.tokens) == len(found.chances) == 40
    assert all(0 < chance <= 1 for chance in found.chances)
    assert sum(found.accepted_by_position) + found.verifications == 39
    for position in range(3):
        expected = found.expected_by_position[position]
        assert 0 < expected < found.reached_by_position[position]
        assert 0 < found.variance_by_position[position] <= expected

    # Greedily nothing is expected, and nothing drawn.
    greedy = speculate(target(), random_draft(), prompt(1, 5), 3, 8, ())
    assert not any(greedy.expected_by_position) and not greedy.chances


def test_tokens_after_an_end_token_have_no_chances(monkeypatch):
    """All drafted tokens are kept, and the second of them is the end token."""
    ids, draft = prompt(1, 5), random_draft()
    monkeypatch.setattr(choosers, "verify", lambda drafted, *_: [*drafted, 0])
    for seed in range(50):
        free = speculate(target(), draft, ids, 3, 8, (), Sampling(3.0, seed=seed))
        if free.tokens[2] not in free.tokens[:2]:
            break
    else:
        pytest.fail("no answer whose third token is new")
    ended = speculate(target(), draft, ids, 3, 8, (free.tokens[2],), Sampling(3.0, seed=seed))
    assert ended.tokens == free.tokens[:3]
    assert ended.chances == free.chances[:3]


def test_variance_of_one_place_by_hand():
    """One round of one drafted token: it is accepted or not, by a chance."""
    found = speculate(target(), random_draft(), prompt(1, 5), 1, 3, (), Sampling(3.0))
    assert found.reached_by_position == [1]
    (chance,) = found.expected_by_position
    assert 0.01 < chance < 0.99
    assert found.variance_by_position == [chance * (1 - chance)]


def chi_square_tail(statistic: float, freedom: int) -> float:
    """The chance of a statistic as large or larger."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_chi_square_tail_by_the_table():
    assert math.isclose(chi_square_tail(3.841, 1), 0.05, abs_tol=1e-4)
    assert math.isclose(chi_square_tail(18.307, 10), 0.05, abs_tol=1e-4)


SIZE = 16  # of the vocabulary of a target whose continuations can be enumerated


@cache
def small_pair() -> tuple[Any, Draft]:
    """A target of three layers, and a random draft that has three quarters of its tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=SIZE,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    shape = make_draft(32, SIZE, 12, intermediate_size=32, head_dim=8, aux_layers=(0, 1, 2))
    params = init_params(shape, 0, torch.float32)
    params = {name: value * 8 if value.ndim == 2 else value for name, value in params.items()}
    vocab = make_map(SIZE, 12, torch.Generator().manual_seed(1))
    return model, Draft(shape, params, vocab, None)


def two_tokens(ids: Tensor, sampling: Sampling) -> Tensor:
    """The target's law of two tokens after a prompt, `(V, V)`, without a cache."""
    model, _ = small_pair()
    first = distribution(model(ids, use_cache=False).logits[0, -1], sampling)
    every = torch.cat([ids.expand(SIZE, -1), torch.arange(SIZE)[:, None]], dim=1)
    second = distribution(model(every, use_cache=False).logits[:, -1], sampling)
    return first[:, None] * second


@pytest.mark.parametrize(
    ("length", "sampling"), [(0, Sampling(1.0)), (1, Sampling(3.0)), (2, Sampling(2.0, 0.8))]
)
def test_continuations_have_the_targets_law(length, sampling):
    """Chi-square over pairs of tokens, drawn by fixed seeds; the second is drafted.

    `max_new` leaves room for one whole round. At these temperatures draft and target overlap, so
    that many drafted tokens are accepted.
    """
    model, draft = small_pair()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    law = two_tokens(ids, sampling)
    draws = 700
    drawn: Counter[tuple[int, int]] = Counter()
    beyond = 0.0  # accepted tokens beyond those that are expected
    variance = 0.0
    for number in range(draws):
        own = of_prompt(sampling, number)
        found = speculate(model, draft, ids, length, 2 + length, (), own)
        drawn[found.tokens[0], found.tokens[1]] += 1
        beyond += sum(found.accepted_by_position) - sum(found.expected_by_position)
        variance += sum(found.variance_by_position)
    assert abs(beyond) <= 3.5 * math.sqrt(variance)
    assert all(law[pair] > 0 for pair in drawn)

    # Pairs that are expected 8 times or more, and all others together.
    common = (law * draws >= 8).nonzero().tolist()
    expected = [float(law[one, other]) * draws for one, other in common]
    counts = [drawn[one, other] for one, other in common]
    rest = draws - sum(expected)
    if rest >= 8:
        expected.append(rest)
        counts.append(draws - sum(counts))
    assert len(expected) >= 4
    pairs = zip(counts, expected, strict=True)
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    tail = chi_square_tail(statistic, len(expected) - 1)
    assert tail > 1e-3, (statistic, len(expected), tail)
