"""Laws of the vocabulary map and what its file refuses."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import open_features
from eagle3fn.data.vocab import (
    StoredMap,
    build_map,
    check_map,
    chosen_size,
    count_tokens,
    coverage,
    load_map,
    map_size,
    save_map,
)
from tests.factories import random_sample, write_folder

MAP = build_map(torch.tensor([0, 3, 0, 2, 9]), 3)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
@settings(max_examples=80, deadline=None)
def test_most_frequent_tokens_are_kept_and_ties_go_to_the_lowest_id(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    vocab_map = build_map(torch.tensor(counts), size)
    by_count = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    kept = sorted(by_count[:size])
    assert vocab_map.t2d.nonzero().flatten().tolist() == kept
    assert [j + int(offset) for j, offset in enumerate(vocab_map.d2t)] == kept
    check_map(vocab_map, len(counts), size)


def test_only_supervised_tokens_of_the_named_samples_are_counted(tmp_path):
    samples = [random_sample(9, seed) for seed in range(5)]
    features = open_features(write_folder(tmp_path, samples))
    expected = [0] * 50
    for sample in (samples[1], samples[4]):
        for token, marked in zip(sample.input_ids, sample.token_mask, strict=True):
            expected[int(token)] += int(marked)
    assert count_tokens(features, [1, 4]).tolist() == expected


def test_coverage_is_the_share_of_the_counted_tokens():
    counts = torch.tensor([5, 0, 3, 2, 0])
    assert coverage(build_map(counts, 2), counts) == pytest.approx(0.8)
    assert coverage(build_map(counts, 2), torch.zeros(5, dtype=torch.int64)) == 0


@pytest.mark.parametrize(
    ("frequent", "rare", "size"),
    [
        (900, 0, 4096),  # the least
        (5000, 0, 5120),  # a multiple of 1,024
        (5120, 0, 5120),
        (5130, 0, 6144),
        (5000, 500, 5120),  # the rare tokens are 0.1% of all: not needed
        (5000, 700, 6144),
        (40_000, 0, 32_000),  # the most
    ],
)
def test_size_is_chosen_by_the_tokens_seen(frequent, rare, size):
    counts = torch.zeros(50_000, dtype=torch.int64)
    counts[1000 : 1000 + frequent] = 100
    counts[:rare] = 1
    assert chosen_size(counts) == size
    assert chosen_size(counts[: 1000 + min(frequent, 2000)]) <= 3000  # V


def test_no_supervised_token_gives_the_smallest_size():
    assert chosen_size(torch.zeros(50_000, dtype=torch.int64)) == 4096


def test_sizes_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"draft_vocab_size = 4.*3"):
        build_map(torch.ones(3, dtype=torch.int64), 4)
    with pytest.raises(UserError, match=r"draft_vocab_size = 0"):
        build_map(torch.ones(3, dtype=torch.int64), 0)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (MAP._replace(d2t=MAP.d2t + torch.arange(3)), "different tokens"),
        (MAP._replace(d2t=MAP.d2t[:2]), r"draft_vocab_size to 2"),
        (MAP._replace(t2d=MAP.t2d[:4]), "t2d has shape"),
        (MAP._replace(t2d=MAP.t2d.long()), "must be bool"),
        (MAP._replace(t2d=torch.ones(5, dtype=torch.bool)), "different tokens"),
    ],
)
def test_inconsistent_map_is_refused(broken, named):
    check_map(MAP, 5, 3)
    with pytest.raises(UserError, match=named):
        check_map(VocabMap(*broken), 5, 3)


def test_saved_map_loads_bit_for_bit(tmp_path):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {"target_hash": "abc"})
    assert equal(load_map(path, 5, 3), MAP)
    assert equal(load_map(path, 5, 3, "abc"), MAP)
    assert map_size(path) == 3
    assert map_size(path, vocab_size=3) == 3
    with pytest.raises(UserError) as raised:
        map_size(path, vocab_size=2)
    assert str(raised.value).startswith(f"{path}: a map of 3 tokens, but the target has 2: it was")


def test_map_of_another_target_is_refused(tmp_path):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {"target_hash": "abc", "target": "tiny", "vocab_size": 5, "data_hash": "d"})
    with pytest.raises(UserError, match=r"map.safetensors.*another target \(tiny\).*again"):
        load_map(path, 5, 3, "xyz")
    with pytest.raises(UserError, match=r"map.safetensors.*t2d has shape.*again"):
        load_map(path, 6, 3)


def test_map_of_another_format_is_read_by_a_given_function_and_checked(tmp_path):
    tensors = dict(MAP._asdict())

    def read(path):
        assert path == tmp_path / "other"
        return StoredMap(tensors, provenance={})

    assert equal(load_map(tmp_path / "other", 5, 3, "xyz", read), MAP)
    assert map_size(tmp_path / "other", read) == 3
    del tensors["t2d"]
    with pytest.raises(UserError, match=r"other: no tensor t2d.*again"):
        load_map(tmp_path / "other", 5, 3, read=read)
    del tensors["d2t"]
    with pytest.raises(UserError, match=r"other: no tensor d2t.*again"):
        map_size(tmp_path / "other", read)


@pytest.mark.parametrize("read", [lambda path: load_map(path, 5, 3), map_size])
def test_missing_map_is_refused(tmp_path, read):
    with pytest.raises(UserError, match=r"none.safetensors: no such file"):
        read(tmp_path / "none.safetensors")


@pytest.mark.parametrize("read", [lambda path: load_map(path, 5, 3), map_size])
@pytest.mark.parametrize(
    "data", [None, b"junk", b"", b"PK\x03\x04zip", b"hello world\n", b'{"a": 1}', b"12345678{"]
)
def test_damaged_map_is_refused(tmp_path, read, data):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {})
    path.write_bytes(path.read_bytes()[:-4] if data is None else data)
    with pytest.raises(UserError, match=r"map.safetensors: damaged.*again"):
        read(path)


@pytest.mark.parametrize("provenance", [[1], "abc", 3, None])
def test_provenance_that_is_no_dict_is_refused(tmp_path, provenance):
    path = tmp_path / "map.safetensors"
    save_file(MAP._asdict(), path, {"provenance": json.dumps(provenance)})
    with pytest.raises(UserError, match=r"map.safetensors: .*provenance.*again"):
        load_map(path, 5, 3, "abc")


def test_target_hash_that_is_no_string_is_compared_as_another_target(tmp_path):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {"target_hash": 7})
    with pytest.raises(UserError, match=r"map.safetensors: made for another target \(7\).*again"):
        load_map(path, 5, 3, "abc")


def test_an_empty_map_is_refused(tmp_path):
    """It is consistent, but proposes nothing."""
    empty = VocabMap(torch.zeros(5, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
    save_map(tmp_path / "map.safetensors", empty, {})
    with pytest.raises(UserError, match=r"d2t is empty: .*build the map again by eagle3fn vocab"):
        load_map(tmp_path / "map.safetensors")
