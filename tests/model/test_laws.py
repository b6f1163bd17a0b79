"""Laws of the objective that need no other implementation, on drawn cases, under both numerics.

Zeros are exact and equalities are `torch.equal`, except where another order of summation is the
point: there a leaf may be off by `BOUND` units of the dtype's rounding, relative to the sum of the
magnitudes that were added.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.data.collate import global_row_counts
from eagle3fn.data.vocab import build_map
from eagle3fn.model.table import EMBED
from eagle3fn.testing.builders import (
    Case,
    Unaligned,
    generator,
    on,
    tiny_batch,
    tiny_frozen,
    tiny_params,
    tiny_unaligned,
)
from eagle3fn.testing.strategies import cases
from eagle3fn.train.step import accumulate

BOUND = 2**10
"""In roundings: no sum of a drawn case has more terms, and a leaf passes through few of them."""

SERVED = ("drawn", "one", "empty")
"""Masks that train neither a padded row nor a sample's last one."""

FEW = settings(max_examples=max(10, settings().max_examples // 4))  # each costs many passes
BOTH = pytest.mark.parametrize("numerics", ["fast", "plain"])


def config_of(case: Case, numerics: str, **objective: Any) -> e3.Config:
    config = case.config()
    return replace(config, objective=replace(config.objective, numerics=numerics, **objective))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    _, slope = e3.value_and_grad(function)(x)
    return slope


class Problem(NamedTuple):
    """A case's tensors on a device."""

    frozen: Frozen
    params: Params
    batch: Batch


def make_problem(case: Case, device: str) -> Problem:
    return Problem(
        frozen=on(device, tiny_frozen(case)),
        params=on(device, tiny_params(case)),
        batch=on(device, tiny_batch(case)),
    )


def evaluate(case: Case, config: e3.Config, batch: Batch) -> dict[str, Tensor]:
    """Loss, metrics and gradients by name, on the batch's device."""
    frozen, params, _ = make_problem(case, str(batch.next_ids.device))

    def loss_of(params: Params) -> Any:
        return e3.forward_loss(params, batch, config=config, frozen=frozen)

    (loss, aux), gradients = e3.value_and_grad(loss_of, has_aux=True)(params)
    return {"loss": loss, **aux._asdict(), **gradients}


def near(a: Tensor, b: Tensor, magnitude: Tensor | float | None = None) -> bool:
    """`|a - b| ≤ BOUND · eps · magnitude`; without a magnitude, that of `b`."""
    size = float(b.norm()) if magnitude is None else float(magnitude)
    return float((a - b).norm()) <= BOUND * torch.finfo(a.dtype).eps * size


@BOTH
@given(data=st.data())
def test_rows_after_the_last_trained_one_have_exactly_zero_gradient(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Masked and padded ones, and all rows of a sample without a trained row."""
    mask = data.draw(st.sampled_from(["drawn", "full", "one", "empty"]))
    case = data.draw(cases(mask=mask))
    config = config_of(case, numerics)
    frozen, params, batch = make_problem(case, device)

    def loss(aux_hidden: Tensor) -> Tensor:
        changed = batch._replace(aux_hidden=aux_hidden)
        return e3.forward_loss(params, changed, config=config, frozen=frozen)[0]

    slope = gradient(loss, batch.aux_hidden)
    trained_from_here = batch.row_mask[:, 0].flip(1).cumsum(1).flip(1)  # (B, S)
    after = trained_from_here == 0
    assert (after | (batch.attention_mask > 0)).all()
    assert slope[after].abs().sum() == 0
    assert slope.isfinite().all()


@BOTH
@FEW
@given(data=st.data())
def test_contents_of_padding_do_not_change_a_bit(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Tokens and features of padded places; loss, metrics and every gradient."""
    mask = data.draw(st.sampled_from(SERVED))
    check_padding(data.draw(cases(mask=mask)), numerics, device)


@BOTH
@pytest.mark.parametrize("lengths", [(1, 9), (1, 1, 4)])
def test_contents_of_padding_do_not_change_a_bit_after_a_sample_of_one_token(
    numerics: str, lengths: tuple[int, ...], device: str
) -> None:
    """Its only row is its last: the row that mask "one" trains must be in another sample."""
    case = Case(lengths=lengths, mask="one", teacher="compact", seed=713749)
    check_padding(case, numerics, device)


def check_padding(case: Case, numerics: str, device: str) -> None:
    config = config_of(case, numerics)
    batch = on(device, tiny_unaligned(case, 0))
    other = on(device, tiny_unaligned(case, 1))
    real = batch.attention_mask > 0
    wide = real[..., None]
    noisy = batch._replace(
        input_ids=torch.where(real, batch.input_ids, other.input_ids + 1),
        aux_hidden=torch.where(wide, batch.aux_hidden, torch.full_like(other.aux_hidden, 3.0)),
        last_hidden=torch.where(wide, batch.last_hidden, torch.full_like(other.last_hidden, -3.0)),
    )

    plain = evaluate(case, config, batch.aligned(case.steps))
    changed = evaluate(case, config, noisy.aligned(case.steps))
    assert [name for name in plain if not torch.equal(plain[name], changed[name])] == []


@BOTH
@FEW
@given(data=st.data())
def test_causality_by_gradient_at_every_unroll_step(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Row t of step i sees features up to t, embeddings of tokens 1 … t + i + 1, nothing else.

    No other sample, and no gradient reaches the teacher. One row is trained, and an infinite count
    takes every other step out of the loss.
    """
    case = data.draw(
        cases(
            mask="full",
            normalization="mask",
            tokens="inside",
            target_hidden=16,
            hidden=16,
        )
    )
    config = config_of(case, numerics)
    frozen, params, _ = make_problem(case, device)
    samples = on(device, tiny_unaligned(case))
    assert frozen.embed_tokens is not None

    # In the longest sample every place has a token of its own; none is the 0 that the end reads.
    sample = case.lengths.index(max(case.lengths))
    s = max(case.lengths)
    order = torch.randperm(case.vocab - 1, generator=generator(case, 50))[:s].to(device) + 1
    assume(len(order) == s)
    index = torch.tensor([sample], device=device)
    samples = samples._replace(input_ids=samples.input_ids.index_copy(0, index, order[None]))

    for step in range(min(case.steps, s)):
        row = data.draw(st.integers(0, s - 1 - step))
        mask = torch.zeros_like(samples.row_mask)
        mask[sample, row + step] = 1
        counts = torch.full((case.steps,), torch.inf, device=device)
        counts[step] = 1.0
        trained = samples._replace(row_mask=mask, row_counts=counts)

        def loss(inputs: dict[str, Tensor], trained: Unaligned = trained) -> Tensor:
            changed = trained._replace(
                aux_hidden=inputs["aux_hidden"], last_hidden=inputs["last_hidden"]
            )
            own = frozen._replace(embed_tokens=inputs["embed"])
            weights = params | ({EMBED: inputs["embed"]} if EMBED in params else {})
            batch = changed.aligned(case.steps)
            return e3.forward_loss(weights, batch, config=config, frozen=own)[0]

        inputs = {
            "aux_hidden": samples.aux_hidden,
            "last_hidden": samples.last_hidden,
            "embed": frozen.embed_tokens,
        }
        value, slopes = e3.value_and_grad(loss)(inputs)
        features = slopes["aux_hidden"].abs().sum(-1)  # (B, S)
        tokens = slopes["embed"].abs().sum(-1)[order]  # (S,)
        others = torch.arange(len(case.lengths), device=device) != sample

        # What it must not see.
        assert features[sample, row + 1 :].sum() == 0
        assert features[others].sum() == 0
        assert tokens[row + step + 2 :].sum() == 0
        assert tokens[0] == 0
        assert slopes["last_hidden"].abs().sum() == 0

        # What it must see.
        if value > 0:
            assert features[sample, row] > 0
            assert row + step + 1 == s or tokens[row + step + 1] > 0


@BOTH
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@FEW
@given(data=st.data())
def test_micro_batches_add_up(numerics: str, dtype: str, device: str, data: st.DataObject) -> None:
    """Any split under "mask"; under "rows" one of equal parts. Counts are equal, sums near."""
    case = data.draw(cases(dtype=dtype))
    config = config_of(case, numerics)
    frozen, params, whole = make_problem(case, device)

    # Where the batch is cut: sorted numbers of samples.
    rows = len(case.lengths)
    if case.normalization == "rows":
        cuts = list(range(1, rows))
    else:
        chosen = data.draw(st.sets(st.integers(1, max(1, rows - 1))))
        cuts = sorted(chosen & set(range(rows)))
    parts = []
    for first, last in zip([0, *cuts], [*cuts, rows], strict=True):
        fields = (None if field is None else field[first:last] for field in whole)
        parts.append(Batch(*fields))  # pyright: ignore[reportArgumentType]
    counts = global_row_counts(parts)
    parts = tuple(part._replace(row_counts=counts) for part in parts)

    loss, aux, grads = accumulate(params, (whole,), config, frozen)
    loss_of_parts, aux_of_parts, grads_of_parts = accumulate(params, parts, config, frozen)
    assert near(loss_of_parts, loss)
    assert torch.equal(aux_of_parts.rows, aux.rows)
    assert torch.equal(aux_of_parts.accept_rows, aux.accept_rows)

    # Gradients may cancel: the bound is relative to what was added.
    alone = [accumulate(params, (part,), config, frozen)[2] for part in parts]
    for name, leaf in grads.items():
        magnitude = sum(float(part[name].norm()) for part in alone)
        assert near(grads_of_parts[name], leaf, magnitude), name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@FEW
@given(data=st.data())
def test_compact_teacher_equals_the_full_one_to_rounding(
    dtype: str, device: str, data: st.DataObject
) -> None:
    """Any chunk, longer than the vocabulary too. The fast numerics have a teacher of their own."""
    case = data.draw(cases(dtype=dtype, teacher="compact"))
    batch = on(device, tiny_batch(case))
    compact = evaluate(case, config_of(case, "plain", teacher="compact"), batch)
    full = evaluate(case, config_of(case, "plain", teacher="full"), batch)
    for name, value in full.items():
        if value.is_floating_point():
            assert near(compact[name], value), name
        else:
            assert torch.equal(compact[name], value), name


@BOTH
@FEW
@given(data=st.data())
def test_step_is_a_function_that_leaves_its_inputs_untouched(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Every tensor of state, batch and frozen has the same bits and was never written to."""
    case = data.draw(cases())
    config = config_of(case, numerics)
    frozen, params, batch = make_problem(case, device)
    state = e3.init_state(params, config=config)
    inputs = named_leaves((state, batch, frozen))
    before = {name: value.clone() for name, value in inputs.items()}
    versions = {name: value._version for name, value in inputs.items()}

    e3.forward_loss(state.params, batch, config=config, frozen=frozen)
    first, _ = e3.step(state, batch, config=config, frozen=frozen)
    again, _ = e3.step(state, batch, config=config, frozen=frozen)
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), name
        assert value._version == versions[name], name

    # The same result twice, and none of it in the given state's memory.
    assert equal(first, again)
    given_memory = addresses((state.params, state.masters, state.opt))
    assert not given_memory & addresses(first)


def addresses(tree: Any) -> set[int]:
    """Where the leaves' memory is, without 0: where tensors of the stand-in for a card are."""
    return {leaf.data_ptr() for leaf in named_leaves(tree).values()} - {0}


@given(cases())
def test_vocabulary_map_has_an_inverse(case: Case) -> None:
    """Draft to target to draft, and target to draft to target on what is kept, are identities."""
    source = torch.Generator().manual_seed(case.seed)
    counts = torch.randint(0, 4, (case.vocab,), generator=source)
    for made in (build_map(counts, case.draft_vocab), tiny_frozen(case)):
        assert made.t2d.dtype == torch.bool
        assert int(made.t2d.sum()) == len(made.d2t) == case.draft_vocab

        to_draft = made.t2d.cumsum(0) - 1  # (V,)
        ids = torch.arange(case.draft_vocab)
        assert torch.equal(to_draft[ids + made.d2t], ids)

        kept = made.t2d.nonzero()[:, 0]
        assert torch.equal(to_draft[kept] + made.d2t[to_draft[kept]], kept)
