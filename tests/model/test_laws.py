"""Laws of the objective that need no other implementation, on drawn cases, under both numerics.

Zeros are exact and equalities are `torch.equal`, but where another order of summation is the point: there a leaf may
be off by `BOUND` units of the dtype's rounding, relative to the sum of the magnitudes that were added.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.tree import named_leaves
from eagle3fn.base.types import Params
from eagle3fn.data.collate import global_row_counts
from eagle3fn.data.vocab import build_map
from eagle3fn.testing.builders import Case, generator, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import cases
from eagle3fn.train.step import accumulate

BOUND = (
    2**10
)  # roundings: no sum of a drawn case has more terms, and a leaf passes through few of them
SERVED = ("drawn", "one", "empty")  # masks without padded rows and without the last token's
FEW = settings(max_examples=max(10, settings().max_examples // 4))  # each costs many passes
BOTH = pytest.mark.parametrize("numerics", ["fast", "plain"])


def drawn(numerics: str, **fixed: Any) -> st.SearchStrategy[Case]:
    """Cases that a numerics knows: the fast ones have KL alone."""
    return cases(**({"loss": "kl"} if numerics == "fast" else {}), **fixed)


def config_of(case: Case, numerics: str, **objective: Any) -> e3.Config:
    config = case.config()
    return replace(config, objective=replace(config.objective, numerics=numerics, **objective))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return e3.value_and_grad(function)(x)[1]


def problem(case: Case, device: str) -> tuple[e3.Frozen, Params, e3.Batch]:
    """The case's tensors on a device."""
    return (
        on(device, tiny_frozen(case)),
        on(device, tiny_params(case)),
        on(device, tiny_batch(case)),
    )


def evaluate(case: Case, config: e3.Config, batch: e3.Batch) -> dict[str, Tensor]:
    """Loss, metrics and gradients by name, on the batch's device."""
    device = str(batch.input_ids.device)
    frozen, params, _ = problem(case, device)
    compute = e3.value_and_grad(
        lambda p: e3.forward_loss(p, batch, config=config, frozen=frozen), has_aux=True
    )
    (loss, aux), gradients = compute(params)
    return {"loss": loss, **aux._asdict(), **gradients}


def near(a: Tensor, b: Tensor, magnitude: Tensor | float | None = None) -> bool:
    size = float(b.norm()) if magnitude is None else float(magnitude)
    return float((a - b).norm()) <= BOUND * torch.finfo(a.dtype).eps * size


@BOTH
@given(data=st.data())
def test_places_behind_the_last_trained_row_have_exactly_zero_gradient(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Masked and padded ones, and samples without a trained row."""
    case = data.draw(
        drawn(numerics, mask=data.draw(st.sampled_from(["drawn", "full", "one", "empty"])))
    )
    config, (frozen, params, batch) = config_of(case, numerics), problem(case, device)

    def loss(aux_hidden: Tensor) -> Tensor:
        return e3.forward_loss(
            params, batch._replace(aux_hidden=aux_hidden), config=config, frozen=frozen
        )[0]

    slope = gradient(loss, batch.aux_hidden)
    behind = batch.row_mask.flip(1).cumsum(1).flip(1) == 0
    assert (behind | (batch.attention_mask > 0)).all()
    assert slope[behind].abs().sum() == 0
    assert slope.isfinite().all()


@BOTH
@FEW
@given(data=st.data())
def test_what_stands_in_padding_does_not_move_a_bit(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Tokens and features of padded places; loss, metrics and every gradient."""
    check_padding(
        data.draw(drawn(numerics, mask=data.draw(st.sampled_from(SERVED)))), numerics, device
    )


@BOTH
@pytest.mark.parametrize("lengths", [(1, 9), (1, 1, 4)])
def test_what_stands_in_padding_does_not_move_a_bit_behind_a_sample_of_one_place(
    numerics: str, lengths: tuple[int, ...], device: str
) -> None:
    """Its only row is its last: the row that mask "one" trains must lie elsewhere. Drawn once in many cases."""
    check_padding(
        Case(lengths=lengths, mask="one", teacher="compact", seed=713749), numerics, device
    )


def check_padding(case: Case, numerics: str, device: str) -> None:
    config, (batch, other) = (
        config_of(case, numerics),
        (on(device, tiny_batch(case, index)) for index in (0, 1)),
    )
    real = batch.attention_mask > 0
    noisy = batch._replace(
        input_ids=torch.where(real, batch.input_ids, other.input_ids + 1),
        aux_hidden=torch.where(
            real[..., None], batch.aux_hidden, torch.full_like(other.aux_hidden, 3.0)
        ),
        last_hidden=torch.where(
            real[..., None], batch.last_hidden, torch.full_like(other.last_hidden, -3.0)
        ),
    )
    plain, changed = evaluate(case, config, batch), evaluate(case, config, noisy)
    assert [name for name in plain if not torch.equal(plain[name], changed[name])] == []


@BOTH
@FEW
@given(data=st.data())
def test_causality_by_gradient_at_every_unroll_step(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Row t of step i sees features up to t, embeddings of tokens 1 … t + i + 1, no other sample, and no teacher.

    One row is trained, and an infinite count takes every other step out of the loss.
    """
    case = data.draw(
        drawn(
            numerics,
            mask="full",
            normalization="mask",
            tokens="inside",
            target_hidden=16,
            hidden=16,
        )
    )
    config, (frozen, params, batch) = config_of(case, numerics, loss="kl"), problem(case, device)
    sample = case.lengths.index(max(case.lengths))
    s = max(case.lengths)
    order = torch.randperm(case.vocab - 1, generator=generator(case, 50))[:s].to(device) + 1
    assume(len(order) == s)  # every place has a token of its own, none the 0 that enters at the end
    batch = batch._replace(
        input_ids=batch.input_ids.index_copy(0, torch.tensor([sample], device=device), order[None])
    )
    assert frozen.embed_tokens is not None
    for step in range(min(case.steps, s)):
        row = data.draw(st.integers(0, s - 1 - step))
        mask = torch.zeros_like(batch.row_mask)
        mask[sample, row + step] = 1
        n = torch.full((case.steps,), torch.inf, device=device)
        n[step] = 1.0

        def loss(inputs: dict[str, Tensor], mask: Tensor = mask, n: Tensor = n) -> Tensor:
            features = {name: inputs[name] for name in ("aux_hidden", "last_hidden")}
            changed = batch._replace(row_mask=mask, row_counts=n, **features)
            frozen_here = frozen._replace(embed_tokens=inputs["embed"])
            return e3.forward_loss(params, changed, config=config, frozen=frozen_here)[0]

        inputs = {
            "aux_hidden": batch.aux_hidden,
            "last_hidden": batch.last_hidden,
            "embed": frozen.embed_tokens,
        }
        value, slopes = e3.value_and_grad(loss)(inputs)
        features = slopes["aux_hidden"].abs().sum(-1)
        places = slopes["embed"].abs().sum(-1)[order]
        others = torch.arange(len(case.lengths), device=device) != sample
        assert features[sample, row + 1 :].sum() == 0 and features[others].sum() == 0
        assert places[row + step + 2 :].sum() == 0 and places[0] == 0
        assert slopes["last_hidden"].abs().sum() == 0
        if value > 0:
            assert features[sample, row] > 0 and (row + step + 1 == s or places[row + step + 1] > 0)


@BOTH
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@FEW
@given(data=st.data())
def test_micro_batches_add_up(numerics: str, dtype: str, device: str, data: st.DataObject) -> None:
    """Any split under "mask"; under "rows" one of equal parts. Counts are equal, sums within the bound."""
    case = data.draw(cases(loss="kl", dtype=dtype))
    config, (frozen, params, whole) = config_of(case, numerics), problem(case, device)
    rows, equal = len(case.lengths), case.normalization == "rows"
    cuts = (
        range(1, rows)
        if equal
        else sorted(data.draw(st.sets(st.integers(1, max(1, rows - 1)))) & set(range(rows)))
    )
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    columns = [None if x is None else x.split(sizes) for x in whole]
    parts = [e3.Batch(*(None if x is None else x[i] for x in columns)) for i in range(len(sizes))]  # pyright: ignore
    n = global_row_counts(parts, case.steps)
    one = accumulate(params, (whole,), config, frozen)
    two = accumulate(params, tuple(part._replace(row_counts=n) for part in parts), config, frozen)
    alone = [accumulate(params, (part._replace(row_counts=n),), config, frozen) for part in parts]
    assert near(two[0], one[0])
    assert torch.equal(two[1].rows, one[1].rows) and torch.equal(
        two[1].accept_rows, one[1].accept_rows
    )
    for name, leaf in one[2].items():
        assert near(two[2][name], leaf, sum(float(part[2][name].norm()) for part in alone)), name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@FEW
@given(data=st.data())
def test_the_compact_teacher_is_the_full_one(dtype: str, device: str, data: st.DataObject) -> None:
    """Any chunk, longer than the vocabulary too; the fast numerics always stream and are held against legacy."""
    case = data.draw(cases(dtype=dtype, teacher="compact"))
    batch = on(device, tiny_batch(case))
    compact, full = (
        evaluate(case, config_of(case, "plain", teacher=kind), batch) for kind in KINDS
    )
    for name, value in full.items():
        same = (
            near(compact[name], value)
            if value.is_floating_point()
            else torch.equal(compact[name], value)
        )
        assert same, name


KINDS = ("compact", "full")


@BOTH
@FEW
@given(data=st.data())
def test_inputs_are_untouched(numerics: str, device: str, data: st.DataObject) -> None:
    """Every tensor of state, batch and frozen: the same bits, and never written to. The step is a function of them."""
    case = data.draw(drawn(numerics))
    config, (frozen, params, batch) = config_of(case, numerics), problem(case, device)
    state = e3.init_state(params, config=config)
    inputs = named_leaves((state, batch, frozen))
    before = {name: (value.clone(), value._version) for name, value in inputs.items()}
    e3.forward_loss(state.params, batch, config=config, frozen=frozen)
    first, again = (e3.step(state, batch, config=config, frozen=frozen)[0] for _ in range(2))
    for name, value in inputs.items():
        assert torch.equal(value, before[name][0]) and value._version == before[name][1], name
    leaves, repeated = named_leaves(first), named_leaves(again)
    assert all(torch.equal(leaves[name], repeated[name]) for name in leaves)
    mine = {
        value.data_ptr()
        for value in named_leaves((state.params, state.masters, state.opt)).values()
    }
    assert not (mine - {0}) & {
        value.data_ptr() for value in leaves.values()
    }  # 0: nowhere, as on the stand-in


@given(cases())
def test_the_vocabulary_map_has_an_inverse(case: Case) -> None:
    """Draft to target to draft, and target to draft to target on what is kept, is where one began."""
    counts = torch.randint(0, 4, (case.vocab,), generator=torch.Generator().manual_seed(case.seed))
    for vocab_map in (build_map(counts, case.draft_vocab), tiny_frozen(case)):
        t2d, d2t = vocab_map.t2d, vocab_map.d2t
        to_draft = t2d.cumsum(0) - 1
        ids = torch.arange(case.draft_vocab)
        assert t2d.dtype == torch.bool and int(t2d.sum()) == len(d2t) == case.draft_vocab
        assert torch.equal(to_draft[ids + d2t], ids)
        kept = t2d.nonzero()[:, 0]
        assert torch.equal(to_draft[kept] + d2t[to_draft[kept]], kept)
