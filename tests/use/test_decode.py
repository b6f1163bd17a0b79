"""Speculative decoding: plain greedy's tokens, counts by hand, the draft as it was trained."""

import warnings
from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import ObjectiveConfig, OptimizerConfig, TrainConfig
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.data.collate import align
from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.hooks import layer_outputs
from eagle3fn.data.target import cache_name
from eagle3fn.model import plain as plain_ops
from eagle3fn.model.forward import forward_loss
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import VALUES
from eagle3fn.train.bind import bind
from eagle3fn.use import decode
from eagle3fn.use.decode import Decoded, speculate
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft
from tests.use.tiny_target import LAYERS, VOCAB, draft_config, prompt, random_draft, target


def plain(model: Any, ids: Tensor, count: int, ends: frozenset[int] = frozenset()) -> list[int]:
    """Greedy decoding without any cache, hook or block."""
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in ends):
        whole = with_answer(ids, tokens)
        tokens.append(int(model(whole, use_cache=False).logits[0, -1].argmax()))
    return tokens


def with_answer(ids: Tensor, tokens: list[int]) -> Tensor:
    answer = torch.tensor([tokens], dtype=torch.int64, device=ids.device)
    return torch.cat([ids, answer], dim=1)


def no_near_ties(ids: Tensor, tokens: list[int]) -> bool:
    """Whether each greedy token leads the next best by far more than rounding.

    If not, a block and a single row may choose different tokens.
    """
    model = target(str(ids.device))
    logits = model(with_answer(ids, tokens), use_cache=False).logits
    best = logits[0, ids.shape[1] - 1 : -1].topk(2).values
    return bool((best[:, 0] - best[:, 1] > 1e-3).all())


class Scripted(Drafter):
    """Drafts the true continuation, wrong from a scripted position on.

    It also checks the features and tokens that it is given to commit.
    """

    truth: Tensor
    aux: Tensor
    script: tuple[int, ...] = ()
    rounds = 0

    def draft(self, aux: Tensor, tokens: Tensor, count: int) -> Tensor:
        start = self.committed
        end = start + tokens.shape[1]
        torch.testing.assert_close(aux, Scripted.aux[:, start:end], atol=2e-4, rtol=1e-3)
        assert torch.equal(tokens, Scripted.truth[:, start + 1 : end + 1])
        self.committed = end

        drafted = Scripted.truth[:, end + 1 : end + 1 + count].clone()
        right = Scripted.script[Scripted.rounds % len(Scripted.script)]
        Scripted.rounds += 1
        drafted[:, right:] = (drafted[:, right:] + 1) % VOCAB
        return drafted


def scripted(monkeypatch: Any, ids: Tensor, count: int, script: tuple[int, ...]) -> list[int]:
    """Put `Scripted` in place of the drafter; returns the true continuation of `count` tokens."""
    model = target(str(ids.device))
    truth = plain(model, ids, count + 9)
    Scripted.truth = with_answer(ids, truth)
    mask = torch.ones_like(Scripted.truth)
    taps = aux_layers(draft_config(), LAYERS)
    Scripted.aux, _ = hidden_states(model, Scripted.truth, mask, taps)
    Scripted.script = script
    Scripted.rounds = 0
    monkeypatch.setattr(decode, "Drafter", Scripted)
    return truth[:count]


def test_lossless_whatever_is_drafted(device):
    """Tokens are plain greedy's for drawn scripts.

    Few draws need not take every path through a block: the examples do.
    """
    seen: Counter[str] = Counter()

    @given(
        seed=st.integers(0, 10**6),
        size=st.integers(1, 12),
        length=st.integers(0, 7),
        count=st.integers(1, 24),
        script=st.lists(st.integers(0, 7), min_size=1, max_size=4),
        end=st.integers(0, 40),
    )
    @example(seed=1, size=4, length=4, count=16, script=[7], end=40)  # all
    @example(seed=1, size=4, length=4, count=16, script=[0], end=40)  # none
    @example(seed=1, size=4, length=4, count=16, script=[3], end=40)  # some
    @example(seed=1, size=4, length=7, count=16, script=[7], end=3)  # end inside a block
    def check(seed, size, length, count, script, end):
        ids = prompt(seed, size, device)
        model = target(str(ids.device))
        with pytest.MonkeyPatch.context() as patch:
            truth = scripted(patch, ids, count, tuple(script))
            ends = frozenset(truth[end : end + 1])
            expected = plain(model, ids, count, ends)
            assume(no_near_ties(ids, truth))
            found = speculate(model, random_draft(0, device), ids, length, count, ends)

        assert found.tokens == expected
        assert found.verifications <= max(len(found.tokens) - 1, 0)
        assert sum(found.accepted_by_position) + found.verifications >= len(found.tokens) - 1
        for position in range(length):
            accepted = found.accepted_by_position[position]
            reached = found.reached_by_position[position]
            assert accepted <= reached <= found.drafted_by_position[position]
        note_paths(seen, found, length, ends)

    check()
    taken = {name for name, count in seen.items() if count}
    assert taken == {"end inside a block", "all", "none", "some"}, seen


def note_paths(seen: Counter[str], found: Decoded, length: int, ends: frozenset[int]) -> None:
    accepted = found.accepted_by_position
    reached = found.reached_by_position
    ended = bool(found.tokens[1:]) and found.tokens[-1] in ends

    # A drafted end token takes the place of its round's bonus token.
    without_bonus = sum(accepted) + found.verifications == len(found.tokens)
    seen["end inside a block"] += ended and sum(accepted) > 0 and without_bonus
    seen["all"] += length >= 2 and bool(accepted[-1])
    seen["none"] += length > 0 and reached[0] > accepted[0]
    seen["some"] += length > 1 and reached[-1] > accepted[-1]


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 12),
    length=st.integers(0, 7),
    count=st.integers(1, 16),
)
def test_lossless_with_a_random_draft(device, seed, size, length, count):
    ids = prompt(seed, size, device)
    model = target(str(ids.device))
    expected = plain(model, ids, count)
    assume(no_near_ties(ids, expected))
    found = speculate(model, random_draft(seed % 5, device), ids, length, count, ())
    assert found.tokens == expected
    assert len(found.accepted_by_position) == length


def test_near_ties_are_found():
    """One of 8,400 prompts: two tokens 4e-6 apart."""
    assert not no_near_ties(prompt(287, 7), plain(target(), prompt(287, 7), 16))
    assert no_near_ties(prompt(1, 4), plain(target(), prompt(1, 4), 16))


def test_counts_by_hand(monkeypatch):
    """Three rounds with 3, 1 and 0 drafted tokens right: 4 + 2 + 1 tokens after the prefill's."""
    ids = prompt(3, 5)
    truth = scripted(monkeypatch, ids, 8, (3, 1, 0))
    found = speculate(target(), random_draft(), ids, 3, 8, ())
    assert found.tokens == truth

    # Room for one more token in the third round, the bonus token, so nothing is drafted there.
    assert (found.verifications, found.accepted_length) == (3, 7 / 3)
    assert found.drafted_by_position == [2, 1 + 1, 1]
    assert found.accepted_by_position == [2, 1, 1]
    assert found.reached_by_position == [2, 2, 1]


def test_tokens_after_an_end_token_do_not_count(monkeypatch):
    """All seven drafted tokens are right, the third is the end token: three count."""
    for seed in range(50):
        ids = prompt(seed, 4)
        truth = plain(target(), ids, 4)
        if truth[3] not in truth[:3]:
            break
    else:
        pytest.fail("no prompt whose fourth token is new")
    scripted(monkeypatch, ids, 20, (7,))
    found = speculate(target(), random_draft(), ids, 7, 20, (truth[3],))
    assert found.tokens == truth
    assert (found.verifications, found.accepted_length) == (1, 3.0)
    assert found.accepted_by_position == [1, 1, 1, 0, 0, 0, 0]
    assert found.reached_by_position == [1, 1, 1, 0, 0, 0, 0]
    assert found.drafted_by_position == [1] * 7


def test_prefill_with_the_end_token_takes_no_verification():
    ids = prompt(0, 4)
    first = plain(target(), ids, 1)
    found = speculate(target(), random_draft(), ids, 4, 20, first)
    assert (found.tokens, found.verifications, found.accepted_length) == (first, 0, 0.0)


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda input_ids, past_key_values=None: None, "past_key_values"),
        (lambda input_ids, cache=None: None, "cache"),
        (lambda input_ids, cache=None, past_key_values=None: None, "cache"),
    ],
    ids=["older", "newer", "both"],
)
def test_cache_name_is_one_that_forward_takes(forward, name):
    assert cache_name(SimpleNamespace(forward=forward)) == name


def test_decoding_gives_no_deprecation_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        found = speculate(target(), random_draft(), prompt(0, 4), 2, 8, ())
    assert len(found.tokens) == 8


def test_hooks_are_removed_after_decoding():
    speculate(target(), random_draft(), prompt(0, 4), 2, 4, ())
    assert not any(layer._forward_hooks for layer in target().model.layers)


def test_hooks_are_removed_when_the_target_fails(monkeypatch):
    model = target()
    monkeypatch.setattr(model.lm_head, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speculate(model, random_draft(), prompt(0, 4), 2, 4, ())
    assert not any(layer._forward_hooks for layer in model.model.layers)


class Layer(torch.nn.Module):
    """Adds one; the output is in the given kind of container, if any."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Any) -> Any:
        x = (x if isinstance(x, Tensor) else x[0]) + 1
        return self.kind([x, x * 0]) if self.kind else x


class Decoder(torch.nn.Module):
    """Three layers over the ids as numbers."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(kind) for _ in range(3))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = input_ids[..., None].float()
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x if isinstance(x, torch.Tensor) else x[0])


@pytest.mark.parametrize("kind", [None, tuple, list])
def test_layer_outputs_are_taken_from_any_container(kind):
    """In decoding and in extraction, in the order asked for."""
    model = Decoder(kind)
    ids = prompt(0, 5)
    numbers = ids[..., None].float()
    expected = torch.cat([numbers + 3, numbers + 1], dim=-1)

    with layer_outputs([model.layers[2], model.layers[0]]) as outputs:
        model(ids)
    assert torch.equal(torch.cat(outputs, dim=-1), expected)
    aux, _ = hidden_states(model, ids, torch.ones_like(ids), (2, 0))
    assert torch.equal(aux, expected)


def test_layer_outputs_are_those_of_the_latest_call():
    model = Decoder(None)
    with layer_outputs([model.layers[1]]) as outputs:
        model(prompt(0, 5))
        model(prompt(1, 3))
    model(prompt(2, 4))
    assert torch.equal(outputs[0], prompt(1, 3)[..., None].float() + 2)


@pytest.mark.parametrize("switches", VALUES["switches"], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)])
def test_drafted_rows_are_those_of_the_training_unroll(monkeypatch, heads, switches, device):
    """Logits of unroll step i at row t: the drafted row i after committed rows 0 … t. In fp64."""
    case = Case(heads=heads, steps=4, lengths=(9,), dtype="float64", switches=switches, seed=5)
    params, frozen, batch = (
        on(device, x) for x in (tiny_params(case), tiny_frozen(case), tiny_batch(case))
    )
    config = case.config()

    # Training: the logits of every unroll step.
    trained: list[Tensor] = []
    original = plain_ops.logits

    def recorded(*args: Any) -> Tensor:
        trained.append(original(*args))
        return trained[-1]

    with monkeypatch.context() as patch:
        patch.setattr(plain_ops, "logits", recorded)
        forward_loss(params, batch, config=config, frozen=frozen)

    # Inference: for each row, commit up to it, then feed it the same tokens.
    assert frozen.embed_tokens is not None
    draft = Draft(config.draft, params, VocabMap(frozen.t2d, frozen.d2t), frozen.embed_tokens)
    aux = batch.aux_hidden
    next_ids = batch.next_ids  # (1, S + K - 1): of row t the token t + 1
    checked = 0
    for row in range(8):
        drafter = Drafter(draft, 20, frozen.embed_tokens)
        if row >= 2:  # committed in two pieces, as after verifications
            drafter.commit(aux[:, :2], next_ids[:, :2])
            hidden = drafter.commit(aux[:, 2 : row + 1], next_ids[:, 2 : row + 1])
        else:
            hidden = drafter.commit(aux[:, : row + 1], next_ids[:, : row + 1])
        for step in range(4):
            place = row + step
            if place >= 8:
                break
            if step:
                hidden = drafter.extend(hidden, next_ids[:, place : place + 1], step)
            torch.testing.assert_close(
                drafter.logits(hidden)[:, 0], trained[step][:, row], atol=1e-12, rtol=1e-10
            )
            checked += 1
    assert checked == 26


def test_drafting_does_not_change_later_rows():
    """Committing after drafting gives what committing alone gives."""
    draft = random_draft()
    aux = torch.randn(1, 9, 96)
    ids = prompt(1, 9)
    embedding = target().get_input_embeddings().weight
    alone = Drafter(draft, 20, embedding)
    used = Drafter(draft, 20, embedding)
    used.draft(aux[:, :4], ids[:, :4], 5)
    alone.commit(aux[:, :4], ids[:, :4])
    torch.testing.assert_close(
        used.draft(aux[:, 4:], ids[:, 4:], 4), alone.draft(aux[:, 4:], ids[:, 4:], 4)
    )
    assert torch.equal(used.caches[..., :12, :], alone.caches[..., :12, :])


@cache
def trained_draft(device: str) -> tuple[Draft, Tensor, list[int]]:
    """A draft overfitted to one answer of the target, with prompt and answer.

    Its vocabulary is the answer's tokens and the highest ids.
    """
    ids = prompt(11, 6, device)
    model = target(str(ids.device))
    answer = plain(model, ids, 32)
    whole = with_answer(ids, answer)
    ones = torch.ones_like(whole)
    aux, last = hidden_states(model, whole, ones, aux_layers(draft_config(), LAYERS))

    t2d = torch.arange(VOCAB) >= VOCAB - 40
    t2d[torch.tensor(answer)] = True
    kept = t2d.nonzero().flatten()
    vocab = on(device, VocabMap(t2d, kept - torch.arange(len(kept))))
    shape = DraftConfig(**{**draft_config().__dict__, "draft_vocab_size": len(kept)})

    config = Config(
        shape,
        ObjectiveConfig(ttt_length=4),
        OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(steps=60, dtype="float32", init="random"),
    )
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    functions = bind(config, Frozen(embedding, head, *vocab))
    state = functions.init_state(on(device, functions.init(0)))
    for _ in range(60):
        state, _ = functions.step(state, align(whole, ones, ones, aux, last, k=4))
    return Draft(shape, state.params, vocab, None), ids, answer


def test_a_trained_draft_is_accepted(device):
    draft, ids, answer = trained_draft(device)
    model = target(str(ids.device))
    found = speculate(model, draft, ids, 4, 32, ())
    chance = speculate(model, random_draft(0, device), ids, 4, 32, ())
    assert found.tokens == chance.tokens == answer
    assert found.accepted_length > 3
    assert chance.accepted_length < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": prompt(0, 250)}, "beyond max_position_embeddings = 256"),
        ({"draft": None}, "draft_length = 3 needs a draft"),
        ({"draft_length": -1}, "draft_length = -1"),
        ({"max_new": 0}, "max_new = 0"),
        ({"vocab_size": 130}, "target of vocab_size 130, but the target has 128"),
        ({"target_hidden_size": 64}, "target of hidden_size 64, but the target has 32"),
        ({"aux_layers": (1, 2, 9)}, "aux_layers"),
    ],
)
def test_bad_requests_are_refused(change, message):
    request = {
        "model": target(),
        "draft": random_draft(),
        "input_ids": prompt(0, 4),
        "draft_length": 3,
        "max_new": 9,
    }
    fields = {name: value for name, value in change.items() if name not in request}
    if fields:
        other = DraftConfig(**{**draft_config().__dict__, **fields})
        change = {"draft": random_draft()._replace(config=other)}
    with pytest.raises(UserError, match=message):
        speculate(**{**request, **change}, end_tokens=())


def test_the_lower_position_limit_is_named():
    shorter = DraftConfig(**{**draft_config().__dict__, "max_position_embeddings": 16})
    draft = random_draft()._replace(config=shorter)
    with pytest.raises(UserError, match="beyond max_position_embeddings = 16;"):
        speculate(target(), draft, prompt(0, 20), 3, 9, ())
