"""`bench.stores`: another store keeps the samples, and what is lost is counted."""

import pytest
import torch

from bench.stores import compare, convert
from eagle3fn.base.errors import UserError
from eagle3fn.data.features import check_shards, open_features, read_sample
from eagle3fn.data.storage import decode, encode
from tests.factories import supervised_sample, write_folder

HIDDEN = 16


@pytest.fixture
def plain(tmp_path):
    samples = [supervised_sample(20, seed, hidden=HIDDEN) for seed in range(5)]
    return write_folder(tmp_path / "plain", samples, hidden=HIDDEN)


@pytest.mark.parametrize("store", ["bf16", "fp8", "int8"])
def test_converted_folder_has_the_samples_in_its_store(plain, tmp_path, store):
    index = convert(plain, tmp_path / "out", store)
    before = open_features(plain)
    after = open_features(tmp_path / "out")
    check_shards(after)
    assert index.get("store", "bf16") == store
    assert list(after.samples) == list(before.samples)
    for number in range(5):
        exact = read_sample(before, number)
        expected = exact
        if store != "bf16":
            expected = exact._replace(
                aux_hidden=decode(store, encode(store, exact.aux_hidden, HIDDEN)),
                last_hidden=decode(store, encode(store, exact.last_hidden, HIDDEN)),
            )
        found = read_sample(after, number)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(UserError, match=r"out: holds index.json"):
        convert(plain, tmp_path / "out", store)


def test_loss_of_each_store_is_counted_by_hand(plain):
    features = open_features(plain)
    head = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    found = compare(features, head, rows=64)
    assert (found["rows"], found["samples"]) == (64, 4)
    for store in ("fp8", "int8"):
        divergences = []
        for number in (0, 1, 2, 3):
            last = read_sample(features, number).last_hidden
            stored = decode(store, encode(store, last, HIDDEN))[:16]
            log_p = (last[:16].float() @ head.T).log_softmax(-1)
            log_q = (stored.float() @ head.T).log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        result = found["stores"][store]
        assert result["kl_mean"] == pytest.approx(float(torch.cat(divergences).mean()), abs=1e-6)
        assert result["kl_largest"] == pytest.approx(float(torch.cat(divergences).max()), abs=1e-6)
        assert 0.5 < result["same_choice"] <= 1
        assert all(0 < error < 0.05 for error in result["taps_error"])


def test_folder_in_a_store_is_not_compared(plain, tmp_path):
    convert(plain, tmp_path / "out", "fp8")
    with pytest.raises(UserError, match=r"stored in fp8; name a folder in bf16"):
        compare(open_features(tmp_path / "out"), torch.zeros(50, HIDDEN), 16)
