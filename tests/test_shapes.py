"""Public records and functions have the shapes that their comments and `tests/shapes.py` state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base import rows
from eagle3fn.base.types import Params
from eagle3fn.data import collate as collate_file
from eagle3fn.data.survival import draw_survival
from eagle3fn.model import fast, forward, plain
from eagle3fn.model.losses import LOSSES, RowLoss
from eagle3fn.testing import cases
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import VALUES
from eagle3fn.train.optimizer import Moments
from tests.factories import make_draft, random_sample
from tests.small_run import write_run

shapes = pytest.importorskip(
    "tests.shapes", reason="jaxtyping is not installed: pip install -e '.[test]'"
)

ODD_CASES = cases(
    heads=(6, 2),
    head_dim=4,
    hidden=st.sampled_from([16, 24]),
    target_hidden=st.sampled_from([16, 20]),
    intermediate=st.sampled_from([13, 14, 15, 33]),
    vocab=st.integers(41, 47),
    draft_vocab=st.integers(25, 31),
    lengths=st.lists(st.integers(4, 11), min_size=3, max_size=3).map(tuple),
    steps=st.sampled_from([1, 5]),
    loss=st.sampled_from(sorted(LOSSES)),
    taps=9,
    switches=st.sampled_from(VALUES["switches"]),
)
"""Problems in which hardly two letters have one size."""


def sizes_of(case: Case) -> dict[str, int]:
    """The sizes that a case fixes; no two letters share one, but `H` and `Ht` may."""
    sizes = case.draft().sizes | {"K": case.steps, "B": len(case.lengths), "S": max(case.lengths)}
    different = {name: size for name, size in sizes.items() if name != "Ht"}
    assume(len(set(different.values())) == len(different))
    return sizes


def config_of(case: Case, numerics: str) -> e3.Config:
    """The case's configuration under these numerics."""
    config = case.config()
    objective = replace(config.objective, numerics=numerics)  # pyright: ignore
    return replace(config, objective=objective)


@contextmanager
def inner_functions_checked(checker: Any) -> Iterator[None]:
    """Check what the loss calls too: heads, logits, teacher, attention, head and loss by row."""

    def find_loss(*args: Any) -> RowLoss:
        loss = found(*args)
        closed = loss.closed and checker.checked(loss.closed, "loss closed")
        return loss._replace(value=checker.checked(loss.value, "loss value"), closed=closed)

    found = forward.find_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "find_loss", find_loss)
        for module, name in (
            (plain, "heads"),
            (plain, "logits"),
            (plain, "make_teacher"),
            (plain, "acceptance"),
            (fast, "block_attention"),
            (fast, "head_and_loss"),
        ):
            patch.setattr(module, name, checker.checked(getattr(module, name)))
        yield


# What is stated


@pytest.mark.parametrize("record", shapes.RECORDS, ids=lambda record: record.__name__)
def test_records_state_shapes_by_letters_of_the_legend(record):
    stated = shapes.fields_of(record)
    assert stated
    for text in stated.values():
        if isinstance(text, str):
            assert shapes.letters(text) <= shapes.legend(), text


def test_functions_state_shapes_by_letters_of_the_legend():
    def texts(wanted: Any) -> Iterator[str]:
        if isinstance(wanted, str):
            yield wanted
        elif isinstance(wanted, dict):
            for part in wanted.values():
                yield from texts(part)
        elif isinstance(wanted, list) or type(wanted) is tuple:
            for part in wanted:
                yield from texts(part)

    for function in shapes.FUNCTIONS.values():
        for text in [*texts(function.arguments), *texts(function.result)]:
            assert shapes.letters(text) <= shapes.legend(), text


def test_legend_is_that_of_the_configuration():
    assert set(make_draft().sizes) <= shapes.legend()


# Values


@pytest.mark.parametrize("numerics", ["plain", "fast"])
@given(case=ODD_CASES)
@settings(max_examples=12, deadline=None)
def test_shapes_of_the_loss_and_of_a_step(numerics, case):
    checker = shapes.Checker(sizes_of(case))
    config = config_of(case, numerics)
    frozen = tiny_frozen(case)
    batch = tiny_batch(case)

    with inner_functions_checked(checker):
        loss = checker.checked(e3.forward_loss)

        def of_params(params: Any) -> tuple[Tensor, e3.Aux]:
            return loss(params, batch, config=config, frozen=frozen)

        params = tiny_params(case)
        _, grads = e3.value_and_grad(of_params, has_aux=True)(params)
        checker.check(grads, Params)

        state = checker.checked(e3.init_state)(params, config=config)
        after, _ = checker.checked(e3.step)(state, batch, config=config, frozen=frozen)
        checker.check(after.opt, Moments)

    # Every part was there to be checked.
    parts = {"forward_loss", "init_state", "step"}
    if numerics == "plain":
        parts |= {"heads", "logits", "make_teacher", "acceptance", "loss value"}
    else:
        parts |= {"block_attention", "head_and_loss"}
    assert parts <= set(checker.calls)


@given(
    lengths=st.lists(st.integers(3, 13), min_size=5, max_size=5),
    k=st.sampled_from([2, 6]),
)
@settings(max_examples=12, deadline=None)
def test_shapes_from_samples_to_a_batch(lengths, k):
    draft = make_draft(8, 50, 20)
    config = e3.Config(draft, e3.ObjectiveConfig(ttt_length=k, survival=0.6))
    checker = shapes.Checker(draft.sizes | {"K": k, "B": 5, "S": max(lengths)})
    samples = [random_sample(length, seed, hidden=8) for seed, length in enumerate(lengths)]
    survives = draw_survival(samples, range(5), config, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collate_file, "align", checker.checked(collate_file.align))
        patch.setattr(collate_file, "plan_rows", checker.checked(rows.plan_rows))
        alone = shapes.Checker(draft.sizes | {"K": k})
        patch.setattr(collate_file, "over_steps", alone.checked(rows.over_steps))
        mask = alone.checked(e3.align_mask)
        batch = alone.checked(e3.collate)(samples, config, mask, survives)
    checker.check(batch, e3.Batch)
    assert batch.survives is not None and batch.plan is not None
    packed = alone.checked(e3.collate_packed)(samples, config, mask, survives)
    assert packed.starts is not None
    alone.checked(collate_file.global_row_counts)([batch, e3.collate(samples[:1], config)])
    assert {"align", "plan_rows"} <= set(checker.calls)
    assert {"over_steps", "align_mask", "collate"} <= set(alone.calls)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def test_shapes_from_files_to_an_exported_draft(run, tmp_path):
    tree = e3.target_config(run / "target")
    size = len(e3.load_map(run / "vocab.safetensors").d2t)
    draft = e3.draft_config_from_target(tree, "target", size)
    config = e3.Config(draft, train=e3.TrainConfig(dtype="float32"))
    checker = shapes.Checker(draft.sizes)

    vocab_map = checker.checked(e3.load_map)(run / "vocab.safetensors")
    target = checker.checked(e3.read_target_tensors)(run / "target", torch.float32)
    frozen = checker.checked(e3.make_frozen)(target, vocab_map, config)
    checker.checked(e3.read_sample)(e3.open_features(run / "features"), 0)
    params = checker.checked(e3.init_params)(draft, 0)
    params = checker.checked(e3.start_from_target)(params, frozen)
    layers = tree["num_hidden_layers"]
    checker.checked(e3.export)(params, frozen, draft, tmp_path / "draft", layers, torch.float32)
    checker.checked(e3.load_draft)(tmp_path / "draft", torch.float32)


# The check can fail


CASE = Case(heads=(6, 2), head_dim=4, lengths=(9, 7, 8), steps=5, intermediate=13)


def longer(x: Tensor) -> Tensor:
    """One entry more along the last axis."""
    return torch.cat([x, x[..., :1]], dim=-1)


def whole_batch() -> e3.Batch:
    """A batch with every field."""
    batch = tiny_batch(CASE)
    survives = torch.arange(27).view(3, 9) % CASE.steps + 1
    starts = torch.zeros(3, 9, dtype=torch.int64)
    return batch._replace(
        position_ids=torch.arange(9).expand(3, 9),
        starts=starts,
        row_counts=torch.ones(5),
        survives=survives,
        plan=rows.plan_rows(batch.row_mask, survives, starts),
    )


@pytest.mark.parametrize("field", [name for name in e3.Batch._fields if name != "plan"])
def test_a_field_of_another_shape_or_dtype_is_detected(field):
    checker = shapes.Checker(CASE.draft().sizes | {"K": CASE.steps})
    batch = whole_batch()
    checker.check(batch, e3.Batch)
    value = getattr(batch, field)
    for change in (value.to(torch.int16), longer(value), value[None]):
        with pytest.raises(shapes.ShapeError, match=rf"\.{field}|must be \("):
            checker.check(batch._replace(**{field: change}), e3.Batch)


@pytest.mark.parametrize("field", rows.RowPlan._fields)
def test_a_field_of_another_shape_or_dtype_in_a_plan_is_detected(field):
    checker = shapes.Checker(CASE.draft().sizes | {"K": CASE.steps})
    batch = whole_batch()
    assert batch.plan is not None
    checker.check(batch, e3.Batch)
    value = getattr(batch.plan, field)
    narrow = value.to(torch.int16) if isinstance(value, Tensor) else value.astype("int16")
    changes = [narrow, value[None]]
    if field in ("labels", "label", "row", "step", "state", "first"):  # as long as another
        changes.append(value[:-1])
    for change in changes:
        with pytest.raises(shapes.ShapeError, match=rf"\.plan\.{field}|must be \("):
            plan = batch.plan._replace(**{field: change})
            checker.check(batch._replace(plan=plan), e3.Batch)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, key, value, *rest: fast.block_attention(q, key, value, *rest)[:-1],
        lambda q, key, value, *rest: fast.block_attention(q, key, value, *rest).transpose(1, 2),
    ],
)
def test_a_result_of_another_shape_is_detected(change: Callable[..., Tensor]):
    checker = shapes.Checker(CASE.draft().sizes | {"K": CASE.steps})

    def block_attention(q, key, value, step_keys, step_values, blocks):
        return change_of(q, key, value, step_keys, step_values, blocks)

    original = fast.block_attention

    def change_of(*args: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast, "block_attention", original)
            return change(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "block_attention", checker.checked(block_attention))
        with pytest.raises(shapes.ShapeError, match="block_attention: result"):
            e3.forward_loss(
                tiny_params(CASE),
                tiny_batch(CASE),
                config=config_of(CASE, "fast"),
                frozen=tiny_frozen(CASE),
            )


class Stale(NamedTuple):
    """A record whose comments are of another shape than its tensors, or have none."""

    one: Tensor  # (B, S)
    # (S, B) int64: given in
    # two lines
    other: Tensor


def test_comments_are_read_and_a_stale_one_is_detected():
    assert shapes.fields_of(Stale) == {"one": "(B, S)", "other": "(S, B) int64"}
    checker = shapes.Checker({"B": 2})
    checker.check(Stale(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.int64)), Stale)
    with pytest.raises(shapes.ShapeError, match=r"other is torch.int64 \(2, 3\), must be \(S, B\)"):
        checker.check(Stale(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)), Stale)


class Silent(NamedTuple):
    """A record without shapes."""

    one: Tensor


def test_a_field_without_a_shape_is_detected():
    with pytest.raises(AssertionError, match="no shape in its comment"):
        shapes.fields_of(Silent)
