"""Packed weights: the same products and values, and models that decode with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eagle3fn.use.decode import speculate
from eagle3fn.use.packed import PackedWeight, pack, pack_draft, pack_target
from tests.use.tiny_target import prompt, random_draft, target

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 3, 8, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_ordinary_weight(rows, biased):
    weight, x = matrix(40, 24), matrix(2, rows, 24)
    bias = matrix(40) if biased else None
    packed = pack(weight)
    assert isinstance(packed, PackedWeight)
    torch.testing.assert_close(F.linear(x, packed, bias), F.linear(x, weight, bias))


def test_values_are_kept():
    """What reads a weight by another operation gets the very same values."""
    weight = matrix(40, 24)
    packed = pack(weight)
    assert torch.equal(packed.flatten()[:50], weight.flatten()[:50])
    assert torch.equal(packed @ weight.T, weight @ weight.T)
    kept = nn.Parameter(packed, requires_grad=False)
    assert isinstance(kept, PackedWeight)
    assert torch.equal(kept + 0, weight)


def test_a_dtype_that_is_not_multiplied_fast_stays(monkeypatch):
    assert type(pack(matrix(8, 8).double())) is torch.Tensor
    monkeypatch.setattr("eagle3fn.use.packed.multiplies_bf16", lambda device: False)
    assert type(pack(matrix(8, 8).bfloat16())) is torch.Tensor


def test_packed_models_decode_the_same_tokens():
    """A target of its own, as packing changes it."""
    ids = prompt(0, 9)
    expected = speculate(target(), random_draft(), ids, 4, 16, ())
    model = target.__wrapped__()
    before = model.get_input_embeddings().weight
    pack_target(model)
    draft = pack_draft(random_draft())
    assert type(model.lm_head.weight) is PackedWeight
    assert model.get_input_embeddings().weight is before
    assert type(draft.params["lm_head.weight"]) is PackedWeight
    found = speculate(model, draft, ids, 4, 16, ())
    assert found.tokens == expected.tokens
    assert found.accepted_by_position == expected.accepted_by_position
