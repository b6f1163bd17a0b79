"""Laws of the vocabulary map and what its file refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import open_features
from eagle3fn.data.vocab import build_map, check_map, count_tokens, load_map, map_size, save_map
from tests.data_tools import random_sample, write_folder


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
@settings(max_examples=80, deadline=None)
def test_the_most_frequent_are_kept_ties_to_the_lowest_id(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    vocab_map = build_map(torch.tensor(counts), size)
    wanted = sorted(sorted(range(len(counts)), key=lambda token: (-counts[token], token))[:size])
    assert vocab_map.t2d.nonzero().flatten().tolist() == wanted
    assert [j + int(offset) for j, offset in enumerate(vocab_map.d2t)] == wanted
    check_map(vocab_map, len(counts), size)


def test_counts_are_of_supervised_tokens_alone(tmp_path):
    samples = [random_sample(9, seed) for seed in range(5)]
    folder = open_features(write_folder(tmp_path, samples))
    plain = [0] * 50
    for sample in (samples[1], samples[4]):
        for token, marked in zip(
            sample.input_ids.tolist(), sample.token_mask.tolist(), strict=True
        ):
            plain[token] += marked
    assert count_tokens(folder, [1, 4]).tolist() == plain


def test_sizes_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"draft_vocab_size = 4.*3"):
        build_map(torch.ones(3, dtype=torch.int64), 4)
    with pytest.raises(UserError, match=r"draft_vocab_size = 0"):
        build_map(torch.ones(3, dtype=torch.int64), 0)


MAP = build_map(torch.tensor([0, 3, 0, 2, 9]), 3)


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
def test_inconsistent_maps_are_refused(broken, named):
    check_map(MAP, 5, 3)
    with pytest.raises(UserError, match=named):
        check_map(VocabMap(*broken), 5, 3)


def test_files_round_trip_and_another_targets_map_is_refused(tmp_path):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {"target_hash": "abc", "target": "tiny", "vocab_size": 5, "data_hash": "d"})
    for wanted in (None, "abc"):
        assert all(
            torch.equal(a, b) for a, b in zip(load_map(path, 5, 3, wanted), MAP, strict=True)
        )
    with pytest.raises(UserError, match=r"map.safetensors.*another target \(tiny\).*again"):
        load_map(path, 5, 3, "xyz")
    with pytest.raises(UserError, match=r"map.safetensors.*t2d has shape.*again"):
        load_map(path, 6, 3)


def test_the_older_trainers_map_is_read(tmp_path):
    path = tmp_path / "map.pt"
    torch.save({"d2t": MAP.d2t, "t2d": MAP.t2d}, path)
    assert all(torch.equal(a, b) for a, b in zip(load_map(path, 5, 3, "xyz"), MAP, strict=True))
    torch.save({"d2t": MAP.d2t}, path)
    with pytest.raises(UserError, match=r"map.pt: no tensor t2d.*again"):
        load_map(path, 5, 3)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        load_map(tmp_path / "none.pt", 5, 3)
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {})
    for data in (path.read_bytes()[:-4], b"junk", b"", b"PK\x03\x04zip"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"map.safetensors: damaged.*again"):
            load_map(path, 5, 3)


@pytest.mark.parametrize(
    "text", [b"hello world\n", b"t2d,d2t\n", b"abc", b"K", b"Gabc", b'{"a": 1}', b"12345678{"]
)
def test_text_in_place_of_a_map_is_refused(tmp_path, text):
    path = tmp_path / "map.pt"
    path.write_bytes(text)
    for read in (lambda: load_map(path, 5, 3), lambda: map_size(path)):
        with pytest.raises(UserError, match=r"map.pt: damaged.*again") as caught:
            read()
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("provenance", [[1], "abc", 3, None])
def test_a_provenance_that_is_no_dict_is_refused(tmp_path, provenance):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, provenance)
    with pytest.raises(UserError, match=r"map.safetensors: .*provenance.*again"):
        load_map(path, 5, 3, "abc")
    save_map(path, MAP, {"target_hash": 7})
    with pytest.raises(UserError, match=r"map.safetensors: made for another target \(7\).*again"):
        load_map(path, 5, 3, "abc")
