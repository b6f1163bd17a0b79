"""Speculative decoding gives plain greedy's tokens, counts honestly, and drafts exactly as trained."""

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
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3fn.base.config import Config, ObjectiveConfig, OptimizerConfig, TrainConfig
from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Batch, Frozen, VocabMap
from eagle3fn.data.target import cache_name, hidden_states
from eagle3fn.model import layers
from eagle3fn.model.forward import forward_loss
from eagle3fn.model.table import init_params
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.train.bind import bind
from eagle3fn.use import decode
from eagle3fn.use.decode import speculate
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft
from eagle3fn.use.taps import Taps

DEPTH, VOCAB, DRAFT_VOCAB = 6, 128, 96


@cache
def target(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model.to(device)


def draft_config() -> DraftConfig:
    return DraftConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        target_hidden_size=32,
        max_position_embeddings=256,
    )


def vocab_map() -> VocabMap:
    kept = (
        torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:DRAFT_VOCAB]
        .sort()
        .values
    )
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return VocabMap(t2d, kept - torch.arange(DRAFT_VOCAB))


def random_draft(seed: int = 0, device: str = "cpu") -> Draft:
    params = init_params(draft_config(), seed, torch.float32)
    return Draft(draft_config(), on(device, params), on(device, vocab_map()), None)


def prompt(seed: int, size: int, device: str = "cpu") -> Tensor:
    return torch.randint(0, VOCAB, (1, size), generator=torch.Generator().manual_seed(seed)).to(
        device
    )


def plain(model: Any, ids: Tensor, count: int, ends: frozenset[int] = frozenset()) -> list[int]:
    """Greedy decoding without any cache, hook or block."""
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in ends):
        whole = torch.cat([ids, torch.tensor([said], dtype=torch.int64, device=ids.device)], dim=1)
        said.append(int(model(whole, use_cache=False).logits[0, -1].argmax()))
    return said


def clear(ids: Tensor, said: list[int]) -> bool:
    """Whether each greedy token leads the next best by far more than rounding; else a block may say the other."""
    whole = torch.cat([ids, torch.tensor([said], dtype=torch.int64, device=ids.device)], dim=1)
    best = (
        target(str(ids.device))(whole, use_cache=False)
        .logits[0, ids.shape[1] - 1 : -1]
        .topk(2)
        .values
    )
    return bool((best[:, 0] - best[:, 1] > 1e-3).all())


class Scripted(Drafter):
    """Proposes the true continuation, wrong from a scripted place on, and checks what it is given to commit."""

    truth: Tensor
    aux: Tensor
    script: tuple[int, ...] = ()
    rounds = 0

    def draft(self, aux: Tensor, tokens: Tensor, count: int) -> Tensor:
        size = tokens.shape[1]
        here = slice(self.committed, self.committed + size)
        torch.testing.assert_close(aux, Scripted.aux[:, here], atol=2e-4, rtol=1e-3)
        assert torch.equal(
            tokens, Scripted.truth[:, self.committed + 1 : self.committed + 1 + size]
        )
        self.committed += size
        said = Scripted.truth[:, self.committed + 1 : self.committed + 1 + count].clone()
        right = Scripted.script[Scripted.rounds % len(Scripted.script)]
        Scripted.rounds += 1
        said[:, right:] = (said[:, right:] + 1) % VOCAB
        return said


def scripted(monkeypatch: Any, ids: Tensor, count: int, script: tuple[int, ...]) -> list[int]:
    """Prepare `Scripted` on the device of `ids`; returns the true continuation of at most `count` tokens."""
    model = target(str(ids.device))
    truth = plain(model, ids, count + 9)
    Scripted.truth = torch.cat([ids, torch.tensor([truth], device=ids.device)], dim=1)
    mask = torch.ones_like(Scripted.truth)
    Scripted.aux, _ = hidden_states(model, Scripted.truth, mask, aux_layers(draft_config(), DEPTH))
    Scripted.script, Scripted.rounds = script, 0
    monkeypatch.setattr(decode, "Drafter", Scripted)
    return truth[:count]


def test_lossless_whatever_is_drafted(device):
    """Tokens are plain greedy's for drawn scripts.

    Few draws needn't take every path through a block: the examples do.
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
            assume(clear(ids, truth))
            got = speculate(model, random_draft(0, device), ids, length, count, ends)
        assert got.tokens == expected
        assert got.verifications <= max(len(got.tokens) - 1, 0)
        assert sum(got.accepted_by_position) + got.verifications >= len(got.tokens) - 1
        assert all(a <= r <= d for a, r, d in zip(*got[2:5], strict=True))
        note(seen, got, length, ends)

    check()
    assert {"end inside a block", "all", "none", "some"} == {
        name for name, count in seen.items() if count
    }, seen


def note(seen: Counter[str], got: decode.Decoded, length: int, ends: frozenset[int]) -> None:
    inside = bool(got.tokens[1:]) and got.tokens[-1] in ends and sum(got.accepted_by_position) > 0
    seen["end inside a block"] += inside and sum(
        got.accepted_by_position
    ) + got.verifications == len(got.tokens)
    seen["all"] += length >= 2 and bool(got.accepted_by_position[-1])
    seen["none"] += length > 0 and got.reached_by_position[0] > got.accepted_by_position[0]
    seen["some"] += length > 1 and got.reached_by_position[-1] > got.accepted_by_position[-1]


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
    assume(clear(ids, expected))
    got = speculate(model, random_draft(seed % 5, device), ids, length, count, ())
    assert got.tokens == expected
    assert len(got.accepted_by_position) == length


def test_a_tie_within_rounding_is_seen():
    """One of 8,400 prompts: two tokens 4e-6 apart."""
    assert not clear(prompt(287, 7), plain(target(), prompt(287, 7), 16))
    assert clear(prompt(1, 4), plain(target(), prompt(1, 4), 16))


def test_counts_by_hand(monkeypatch):
    """Three rounds of 3 drafted tokens with 3, 1 and 0 right: 4 + 2 + 1 tokens behind the prefill's."""
    ids = prompt(3, 5)
    truth = scripted(monkeypatch, ids, 8, (3, 1, 0))
    got = speculate(target(), random_draft(), ids, 3, 8, ())
    assert got.tokens == truth
    # the third round wants one token only, so it drafts none
    assert (got.verifications, got.accepted_length) == (3, 7 / 3)
    assert got.drafted_by_position == [2, 1 + 1, 1]
    assert got.accepted_by_position == [2, 1, 1]
    assert got.reached_by_position == [2, 2, 1]


def test_end_token_inside_a_block(monkeypatch):
    """All seven are right, the third is the end: three tokens count, positions behind it don't."""
    ids, truth = next(
        (ids, truth)
        for ids in (prompt(seed, 4) for seed in range(50))
        if (truth := plain(target(), ids, 4))[3] not in truth[:3]
    )
    scripted(monkeypatch, ids, 20, (7,))
    got = speculate(target(), random_draft(), ids, 7, 20, (truth[3],))
    assert got.tokens == truth
    assert (got.verifications, got.accepted_length) == (1, 3.0)
    assert got.accepted_by_position == got.reached_by_position == [1, 1, 1, 0, 0, 0, 0]
    assert got.drafted_by_position == [1] * 7


def test_prefill_that_ends_takes_no_verification():
    ids = prompt(0, 4)
    first = plain(target(), ids, 1)
    got = speculate(target(), random_draft(), ids, 4, 20, first)
    assert (got.tokens, got.verifications, got.accepted_length) == (first, 0, 0.0)


def test_the_cache_goes_by_the_name_the_model_knows():
    """Whichever of the two this transformers knows, and no word of what will be removed."""
    old, new, both = (
        SimpleNamespace(forward=forward)
        for forward in (
            lambda input_ids, past_key_values=None: None,
            lambda input_ids, cache=None: None,
            lambda input_ids, cache=None, past_key_values=None: None,
        )
    )
    assert [cache_name(model) for model in (old, new, both)] == [
        "past_key_values",
        "cache",
        "cache",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        speculate(target(), random_draft(), prompt(0, 4), 2, 8, ())


def test_hooks_are_gone_afterwards():
    speculate(target(), random_draft(), prompt(0, 4), 2, 4, ())
    assert not any(layer._forward_hooks for layer in target().model.layers)


class Layer(torch.nn.Module):
    """Output in the given kind of container, if any."""

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
        return SimpleNamespace(last_hidden_state=x)


@pytest.mark.parametrize("kind", [None, tuple, list])
def test_taps_are_those_of_extraction(kind):
    """Whatever container the layers' outputs come in."""
    model, ids = Decoder(kind), prompt(0, 5)
    aux, _ = hidden_states(model, ids, torch.ones_like(ids), (0, 1, 2))
    taps = Taps(model, (0, 1, 2))
    taps.open()
    model(ids)
    taps.close()
    assert torch.equal(taps.rows(5), aux)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)])
def test_inference_chain_is_the_training_unroll(monkeypatch, heads, device):
    """Logits of unroll step i at row t == those of the chain's row i behind committed rows 0 … t, in fp64."""
    case = Case(heads=heads, steps=4, lengths=(9,), dtype="float64", seed=5)
    params, frozen, batch = (
        on(device, x) for x in (tiny_params(case), tiny_frozen(case), tiny_batch(case))
    )
    config = case.config()
    trained: list[Tensor] = []
    original = layers.logits
    monkeypatch.setattr(
        layers, "logits", lambda *args: trained.append(original(*args)) or trained[-1]
    )
    forward_loss(params, batch, config=config, frozen=frozen)
    monkeypatch.undo()
    draft = Draft(config.draft, params, VocabMap(frozen.t2d, frozen.d2t), frozen.embed_tokens)
    assert frozen.embed_tokens is not None
    ids, checked = batch.input_ids, 0
    for row in range(8):
        chain = Drafter(draft, 20, frozen.embed_tokens)
        chain.commit(
            batch.aux_hidden[:, :2], ids[:, 1:3]
        )  # committed in several pieces, as after verifications
        hidden = (
            chain.commit(batch.aux_hidden[:, 2 : row + 1], ids[:, 3 : row + 2])
            if row >= 2
            else None
        )
        if hidden is None:
            chain = Drafter(draft, 20, frozen.embed_tokens)
            hidden = chain.commit(batch.aux_hidden[:, : row + 1], ids[:, 1 : row + 2])
        for step in range(4):
            if row + step + 1 >= 9:
                break
            if step:
                hidden = chain.extend(hidden, ids[:, row + step + 1 : row + step + 2], step)
            torch.testing.assert_close(
                chain.logits(hidden)[:, 0], trained[step][:, row], atol=1e-12, rtol=1e-10
            )
            checked += 1
    assert checked == 26


def test_drafted_rows_leave_no_trace():
    """Committing after drafting gives what committing alone gives."""
    draft, aux, ids = random_draft(), torch.randn(1, 9, 96), prompt(1, 9)
    alone, used = (Drafter(draft, 20, target().get_input_embeddings().weight) for _ in range(2))
    used.draft(aux[:, :4], ids[:, :4], 5)
    alone.commit(aux[:, :4], ids[:, :4])
    torch.testing.assert_close(
        used.draft(aux[:, 4:], ids[:, 4:], 4), alone.draft(aux[:, 4:], ids[:, 4:], 4)
    )
    assert torch.equal(used.keys[:, :, :12], alone.keys[:, :, :12])


@cache
def trained_draft(device: str) -> tuple[Draft, Tensor, list[int]]:
    """A draft that learned one answer of the target by heart; its vocabulary is the answer's and the highest ids."""
    ids = prompt(11, 6, device)
    model = target(str(ids.device))
    answer = plain(model, ids, 32)
    whole = torch.cat([ids, torch.tensor([answer], device=device)], dim=1)
    ones = torch.ones_like(whole)
    aux, last = hidden_states(model, whole, ones, aux_layers(draft_config(), DEPTH))
    t2d = torch.arange(VOCAB) >= VOCAB - 40
    t2d[torch.tensor(answer)] = True
    kept = t2d.nonzero().flatten()
    vocab = on(device, VocabMap(t2d, kept - torch.arange(len(kept))))
    shape = DraftConfig(**{**draft_config().__dict__, "draft_vocab_size": len(kept)})
    train = TrainConfig(steps=60, dtype="float32")
    config = Config(
        shape, ObjectiveConfig(ttt_length=4), OptimizerConfig(learning_rate=1e-2), train=train
    )
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    functions = bind(config, Frozen(*weights, *vocab))
    state = functions.init_state(on(device, functions.init(0)))
    for _ in range(60):
        state, _ = functions.step(state, Batch(whole, ones, ones, aux, last))
    return Draft(shape, state.params, vocab, None), ids, answer


def test_a_trained_draft_is_accepted(device):
    draft, ids, answer = trained_draft(device)
    model = target(str(ids.device))
    got = speculate(model, draft, ids, 4, 32, ())
    chance = speculate(model, random_draft(0, device), ids, 4, 32, ())
    assert got.tokens == chance.tokens == answer
    assert got.accepted_length > 3
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
