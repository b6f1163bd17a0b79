"""What a map always has, the target's own choices, and the data that a map was counted on."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Sample
from eagle3fn.data import choices as choices_module
from eagle3fn.data.choices import count_choices
from eagle3fn.data.feature_writing import write_index
from eagle3fn.data.features import Reader, open_features
from eagle3fn.data.kept_tokens import kept_tokens
from eagle3fn.data.map_data import CountedOn, counted_on, held_out_by, map_note, samples_hash
from eagle3fn.data.vocab import build_map, check_map, load_map, read_map, save_map
from tests.factories import random_sample, supervised_sample, tiny_tokenizer, write_folder

MAP = build_map(torch.tensor([0, 3, 0, 2, 9]), 3)


# Always in the map


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
@settings(max_examples=80, deadline=None)
def test_tokens_that_are_always_kept_take_the_place_of_the_rarest(counts, data):
    always = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=6))
    size = data.draw(st.integers(max(1, len(set(always))), len(counts)))
    made = build_map(torch.tensor(counts), size, always)
    check_map(made, len(counts), size)
    kept = set(made.t2d.nonzero().flatten().tolist())
    assert set(always) <= kept
    by_count = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    others = [token for token in by_count if token not in set(always)]
    assert kept - set(always) == set(others[: size - len(set(always))])


def test_more_tokens_always_kept_than_the_map_holds_is_refused():
    counts = torch.tensor([5, 4, 3, 2, 1])
    assert build_map(counts, 2, [4, 3, 4]).t2d.tolist() == [False, False, False, True, True]
    with pytest.raises(UserError, match=r"draft_vocab_size = 2: must be at least 3, .*stop tokens"):
        build_map(counts, 2, [4, 3, 0])
    assert build_map(counts, 5, [4]).t2d.all()  # D = V


def write_target(folder, template, **generation):
    """A folder of the tokenizer and generation_config.json alone."""
    tiny_tokenizer(template).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_stop_tokens_and_those_the_template_names_are_always_kept(tmp_path):
    tokenizer = tiny_tokenizer("{{ messages }}")
    named = tokenizer.convert_ids_to_tokens(0)
    assert named in {token.content for token in tokenizer.added_tokens_decoder.values()}

    plain = kept_tokens(write_target(tmp_path / "a", "{{ messages }}", eos_token_id=[7]), 300)
    assert set(plain.ids) == {7, tokenizer.eos_token_id}
    assert plain.unknown == ""
    marked = "{{ messages }}" + named
    marks = kept_tokens(write_target(tmp_path / "b", marked, eos_token_id=[7]), 300)
    assert set(marks.ids) == {*plain.ids, 0}
    assert named in marks.texts
    assert marks.ids == tuple(sorted(marks.ids))


def test_ids_without_a_logit_are_not_kept(tmp_path):
    target = write_target(tmp_path, "{{ messages }}", eos_token_id=[7, 290])
    assert 290 in kept_tokens(target, 291).ids
    assert kept_tokens(target, 290).ids == tuple(i for i in kept_tokens(target, 291).ids if i < 290)


def test_without_a_tokenizer_the_stop_tokens_are_kept_and_it_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    found = kept_tokens(tmp_path, 300)
    assert (found.ids, found.texts) == ((5,), ("5",))
    assert str(tmp_path) in found.unknown and "\n" not in found.unknown


# The target's own choices


def test_choices_are_the_argmax_between_two_supervised_tokens(tmp_path):
    samples = [random_sample(30, seed) for seed in range(4)]
    features = open_features(write_folder(tmp_path, samples))
    head = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = count_choices(features, [1, 3], head)

    expected = torch.zeros(5000, dtype=torch.int64)
    places = 0
    for sample in (samples[1], samples[3]):
        logits = sample.last_hidden.float() @ head.float().T
        for place in range(29):
            if sample.token_mask[place] and sample.token_mask[place + 1]:
                expected[logits[place].argmax()] += 1
                places += 1
    assert places > 5
    assert torch.equal(found.counts, expected)
    assert (found.places, found.all_places) == (places, places)


def test_equal_logits_choose_the_lowest_token(tmp_path):
    features = open_features(write_folder(tmp_path, [supervised_sample(9, 0)]))
    head = torch.zeros(5000, 4)
    assert count_choices(features, [0], head).counts[0] == 8


def test_so_many_places_are_looked_at_that_it_takes_seconds(tmp_path, monkeypatch):
    """Evenly spread, and at least one of every sample."""
    samples = [supervised_sample(20, seed) for seed in range(3)]
    features = open_features(write_folder(tmp_path, samples))
    head = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(choices_module, "_PRODUCTS", 6 * 200)
    found = count_choices(features, range(3), head)
    assert (found.places, found.all_places) == (6, 57)
    expected = torch.zeros(50, dtype=torch.int64)
    for sample in samples:
        for place in (0, 9):
            expected[(sample.last_hidden[place].float() @ head.T).argmax()] += 1
    assert torch.equal(found.counts, expected)


def test_samples_without_such_a_place_have_no_choices(tmp_path):
    sample = random_sample(5, 0)._replace(token_mask=torch.tensor([0, 0, 1, 0, 1]))
    features = open_features(write_folder(tmp_path, [sample]))
    found = count_choices(features, [0], torch.randn(50, 4))
    assert (found.places, found.all_places, int(found.counts.sum())) == (0, 0, 0)


# Hashes


def test_map_that_is_not_the_one_written_is_refused(tmp_path):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {"target_hash": "abc"})
    assert torch.equal(load_map(path, 5, 3).t2d, MAP.t2d)
    stored = read_map(path)
    other = build_map(torch.tensor([9, 3, 0, 2, 0]), 3)
    save_file(other._asdict(), path, {"provenance": json.dumps(stored.provenance)})
    with pytest.raises(UserError, match=r"map.safetensors: not the map that was written.*again"):
        load_map(path, 5, 3)

    # Files of earlier versions have no digest.
    save_file(MAP._asdict(), path, {"provenance": '{"target_hash": "abc", "covered": 1.0}'})
    assert torch.equal(load_map(path, 5, 3, "abc").d2t, MAP.d2t)
    assert counted_on(path) == CountedOn(None, None)


@pytest.mark.parametrize("said", [{"samples": 3, "held_out": 1}, {"samples": "a"}, {"held_out": 1}])
def test_damaged_record_of_the_data_is_refused(tmp_path, said):
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, said)
    with pytest.raises(UserError, match=r"map.safetensors: its provenance has samples .*again"):
        counted_on(path)
    for held_out in (-1, "2", True, 1.0):
        save_map(path, MAP, {"samples": "a", "held_out": held_out})
        with pytest.raises(UserError, match=r"must be a text and a number of 0 or more"):
            counted_on(path)


def with_tokens(folder, samples, seed=0):
    """A folder whose index has its samples' digests, as an extraction writes it."""
    write_folder(folder, samples)
    sidecars = []
    for path in sorted(folder.glob("shard-*.json")):
        sidecar = json.loads(path.read_text())
        for entry in sidecar["samples"]:
            entry["tokens"] = f"{seed}"
        sidecars.append(sidecar)
    target = {"name": "tiny", "hidden_size": 4, "vocab_size": 50}
    write_index(folder, {"target": target, "dtype": "bfloat16", "max_length": 64}, sidecars)
    return open_features(folder)


def test_samples_hash_is_of_tokens_alone(tmp_path):
    samples = [random_sample(6, seed) for seed in range(4)]
    louder = [sample._replace(last_hidden=sample.last_hidden * 2) for sample in samples]
    first = samples_hash(with_tokens(tmp_path / "a", samples))
    assert samples_hash(with_tokens(tmp_path / "b", louder)) == first
    assert samples_hash(with_tokens(tmp_path / "c", samples, seed=1)) != first
    assert samples_hash(with_tokens(tmp_path / "d", samples[:3])) != first


def test_samples_hash_of_a_readers_files_is_of_names_and_sizes(tmp_path):
    def files(folder):
        return sorted(folder.glob("*.x"))

    def sample(path):
        return Sample(*random_sample(6, 0))

    reader = Reader(".x", files, sample, lambda path: sample(path)[:2])
    (tmp_path / "a.x").write_text("one")
    first = samples_hash(open_features(tmp_path, 50, 4, reader))
    assert samples_hash(open_features(tmp_path, 50, 4, reader)) == first
    (tmp_path / "a.x").write_text("three")
    assert samples_hash(open_features(tmp_path, 50, 4, reader)) != first


# A run on other samples, or that holds out others


def test_run_as_the_map_was_counted_has_nothing_said(tmp_path):
    features = open_features(write_folder(tmp_path, [random_sample(6, s) for s in range(5)]))
    counted = CountedOn(samples_hash(features), 2)
    assert held_out_by(counted, features) == 2
    assert map_note("map", MAP, counted, features, 2) == ""
    assert held_out_by(CountedOn(None, None), features) is None
    assert map_note("map", MAP, CountedOn(None, None), features, 4) == ""


def test_run_that_holds_out_others_is_told_what_that_means(tmp_path):
    features = open_features(write_folder(tmp_path, [random_sample(6, s) for s in range(5)]))
    counted = CountedOn(samples_hash(features), 2)
    more = map_note("run/map", MAP, counted, features, 3)
    assert more.startswith("data.held_out = 3, run/map held out 2: the tokens of 1 held-out ")
    assert more.endswith("eagle3fn vocab --held-out 3")
    fewer = map_note("run/map", MAP, counted, features, 0)
    assert fewer.startswith("data.held_out = 0, run/map held out 2: what eagle3fn vocab said")


def test_map_of_other_samples_has_its_coverage_of_these_told(tmp_path):
    samples = [random_sample(6, seed, vocab=5) for seed in range(5)]
    features = open_features(write_folder(tmp_path, samples, vocab=5))
    counted = CountedOn("another", 2)
    assert held_out_by(counted, features) is None
    tokens = torch.cat([sample.input_ids[sample.token_mask == 1] for sample in samples])
    share = float(MAP.t2d[tokens].float().mean())
    note = map_note("run/map", MAP, counted, features, 2)
    assert f"of the supervised tokens here it has {share:.2%}" in note
    assert note.startswith(f"run/map: counted on other samples than {tmp_path} has")
