"""A collated batch against its definition by loops, and nothing after `collate` shifts."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eagle3fn
import eagle3fn as e3
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.collate import align_mask, collate
from eagle3fn.testing.builders import Case, tiny_batch, tiny_unaligned
from eagle3fn.testing.strategies import cases
from tests.factories import make_config, random_sample

PACKAGE = Path(eagle3fn.__file__).parent


def no_mask(token_mask: torch.Tensor) -> torch.Tensor:
    """A row mask that trains every row, as a user's own `align_mask`."""
    return torch.ones_like(token_mask)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    max_length=st.integers(3, 14),
    k=st.integers(1, 6),
    align=st.sampled_from([align_mask, no_mask]),
)
@settings(deadline=None)
def test_collate_by_the_definition_of_batch(lengths, max_length, k, align):
    samples = [random_sample(length, seed) for seed, length in enumerate(lengths)]
    config = make_config(ttt_length=k)
    config = e3.Config(config.draft, config.objective, data=e3.DataConfig(max_length=max_length))
    batch = collate(samples, config, align)
    check_by_loops(batch, samples, max_length, k, align)


def check_by_loops(batch: Batch, samples: list[Sample], max_length: int, k: int, align) -> None:
    """Every entry of every field, one at a time, as `Batch` describes it."""
    kept = [min(len(sample.input_ids), max_length) for sample in samples]
    s = max(kept)
    rows = []
    labels = []
    for b, sample in enumerate(samples):
        n = kept[b]
        trained = align(sample.token_mask[:n]).tolist()
        for t in range(s):
            assert int(batch.attention_mask[b, t]) == (t < n)
            taps = sample.aux_hidden[t] if t < n else torch.zeros_like(sample.aux_hidden[0])
            assert torch.equal(batch.aux_hidden[b, t], taps)

            # The label at t is made from token t + 1, and it is trained if row t is at step 0.
            last = (
                sample.last_hidden[t + 1]
                if t + 1 < n
                else torch.zeros_like(taps[: taps.numel() // 3])
            )
            assert torch.equal(batch.label_hidden[b, t], last)
            if t < n and trained[t]:
                labels.append(b * s + t)

            # Row t at step i reads token t + i + 1, against the label at t + i.
            is_trained = []
            for i in range(k):
                token = int(sample.input_ids[t + i + 1]) if t + i + 1 < n else 0
                assert int(batch.next_ids[b, t + i]) == token
                is_trained.append(int(t + i < n and trained[t + i]))
            assert batch.row_mask[b, :, t].tolist() == is_trained
            if any(is_trained):
                rows.append(b * s + t)

    assert batch.plan is not None
    assert batch.plan.rows.sort().values.tolist() == (rows or [0])
    assert batch.plan.labels.tolist() == (labels or [0])
    assert batch.survives is None
    assert batch.row_counts is None
    assert batch.position_ids is None
    assert batch.next_ids.shape == (len(samples), s + k - 1)
    assert batch.row_mask.shape == (len(samples), k, s)
    of_plan = [field for field in batch.plan if isinstance(field, torch.Tensor)]
    whole = (batch.next_ids, batch.attention_mask, batch.row_mask, *of_plan)
    assert all(field.dtype == torch.int64 for field in whole)
    assert batch.aux_hidden.dtype == batch.label_hidden.dtype == torch.bfloat16


@given(cases())
def test_drawn_batches_are_aligned_as_collated_ones(case: Case) -> None:
    """`align` of padded tensors, by loops: what the tests of the objective start from."""
    samples = tiny_unaligned(case)
    batch = tiny_batch(case)
    b, s = samples.input_ids.shape
    for sample in range(b):
        for t in range(s):
            ids = samples.input_ids[sample].tolist() + [0] * case.steps
            assert batch.next_ids[sample, t : t + case.steps].tolist() == ids[t + 1 :][: case.steps]
            mask = samples.row_mask[sample].tolist() + [0] * case.steps
            assert batch.row_mask[sample, :, t].tolist() == mask[t : t + case.steps]
    assert torch.equal(batch.label_hidden[:, :-1], samples.last_hidden[:, 1:])
    assert batch.label_hidden[:, -1].count_nonzero() == 0
    assert torch.equal(batch.aux_hidden, samples.aux_hidden)
    assert torch.equal(batch.attention_mask, samples.attention_mask)


# Where tensors are moved along the sequence.

SHIFTS = {"shift", "roll"}


def calls_in(path: Path) -> set[str]:
    """Names of what a file calls, the last part of each."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found.add(name.rpartition(".")[2])
    return found


@pytest.mark.parametrize("folder", ["base", "model", "train", "use", "testing", "data"])
def test_nothing_but_collate_shifts(folder: str) -> None:
    """A batch is aligned when it is made; SpecForge's scripts shift themselves."""
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    assert paths
    shifting = {path.relative_to(PACKAGE).as_posix() for path in paths if calls_in(path) & SHIFTS}
    assert shifting <= {"data/collate.py"}


def test_collate_is_seen_to_shift() -> None:
    assert "shift" in calls_in(PACKAGE / "data/collate.py")
