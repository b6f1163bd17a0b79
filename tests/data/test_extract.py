"""Extraction: right features, resumption to identical files, refusals before the target runs."""

import json

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data import extract as room
from eagle3fn.data.chat import encode
from eagle3fn.data.extract import extract
from eagle3fn.data.features import check_shards, open_features, read_sample
from eagle3fn.data.target import hidden_states
from tests.data_tools import talk, tiny_model, tiny_tokenizer, write_talks

LAYERS = (1, 2, 4)
MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


def run(conversations, out, **changes):
    options = {"max_length": 90, "batch": 2, "samples_per_shard": 3, "layers": LAYERS, **changes}
    return extract(MODEL, TOKENIZER, conversations, out, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_stored_features_are_the_targets(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    seen = []
    index = run(talks, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    opened = open_features(tmp_path / "out", vocab_size=300, hidden_size=16)
    check_shards(opened)
    assert seen == [(3, 8), (6, 8), (8, 8)] and index == opened.index
    assert (
        index["target"]["aux_layers"] == [1, 2, 4]
        and index["dtype"] == "float32"
        and index["dropped"] == 0
    )
    for number, line in enumerate(talks.read_text().splitlines()):
        ids, mask = encode(TOKENIZER, json.loads(line)["conversations"], "x")
        sample = read_sample(opened, number)
        assert opened.samples[number]["id"] == f"row{number}"
        assert torch.equal(sample.input_ids, ids[:90]) and torch.equal(sample.token_mask, mask[:90])
        aux, last = hidden_states(
            MODEL, ids[None, :90], torch.ones(1, len(ids[:90]), dtype=torch.int64), LAYERS
        )
        torch.testing.assert_close(sample.aux_hidden, aux[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sample.last_hidden, last[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("calls", [0, 2, 4])
def test_a_killed_extraction_resumes_to_identical_files(tmp_path, monkeypatch, calls):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "whole")
    count = [0]

    def stopping(*args):
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return hidden_states(*args)

    monkeypatch.setattr(room, "features", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(talks, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    count[0] = -100
    run(talks, tmp_path / "out")
    assert count[0] + 100 == 5 - calls
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_made_again_and_a_higher_limit_goes_on(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "whole")
    assert run(talks, tmp_path / "out", limit=4)["totals"]["samples"] == 4
    (tmp_path / "out" / "shard-00000.safetensors").write_bytes(b"cut")
    run(talks, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_whose_bytes_changed_is_made_again(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "out")
    before = contents(tmp_path / "out")
    shard = tmp_path / "out" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    run(talks, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_sidecar_or_index_that_is_no_object_is_refused_and_a_partial_one_made_again(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "out")
    before = contents(tmp_path / "out")
    for name in ("shard-00001.json", "index.json"):
        for text in ("[1]", "3", "null"):
            (tmp_path / "out" / name).write_text(text)
            with pytest.raises(UserError, match=rf"{name}: not a JSON object; remove the folder"):
                run(talks, tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(before[name])
    sidecar = json.loads(before["shard-00001.json"])
    for key in ("samples", "bytes", "sha256", "file"):
        kept = {k: value for k, value in sidecar.items() if k != key}
        (tmp_path / "out" / "shard-00001.json").write_text(json.dumps(kept))
        run(talks, tmp_path / "out")
        assert contents(tmp_path / "out") == before


def test_another_extraction_in_the_folder_is_refused(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "out")
    before = contents(tmp_path / "out")
    for change in ({"max_length": 80}, {"layers": (0, 1, 2)}, {"samples_per_shard": 4}):
        with pytest.raises(
            UserError,
            match=r"index.json: made from other.*remove the folder .*out or choose another",
        ):
            run(talks, tmp_path / "out", **change)
    (tmp_path / "out" / "index.json").unlink()
    write_talks(talks, 9)
    with pytest.raises(UserError, match=r"shard-00000.json: made from other.*remove the folder"):
        run(talks, tmp_path / "out")
    del before["index.json"]
    assert contents(tmp_path / "out") == before


def test_samples_without_a_supervised_token_are_dropped_and_counted(tmp_path):
    talks = tmp_path / "c.jsonl"
    rows = [talk("a", "b"), talk("a"), talk("a" * 200, "b"), talk("c", "d")]
    talks.write_text("".join(json.dumps({"conversations": row}) + "\n\n" for row in rows))
    index = run(talks, tmp_path / "out")
    assert index["dropped"] == 2 and [sample["id"] for sample in index["samples"]] == ["1", "7"]


def refused(tmp_path, rows, named, monkeypatch, **changes):
    def never(*_args):
        raise AssertionError("the target ran")

    monkeypatch.setattr(room, "features", never)
    talks = tmp_path / "c.jsonl"
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=named):
        run(talks, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


GOOD = {"conversations": talk("a", "b")}


def test_bad_input_is_refused_before_the_target_runs(tmp_path, monkeypatch):
    refused(tmp_path, [], "c.jsonl: no conversations; write", monkeypatch)
    refused(tmp_path, [GOOD, {"id": "r7"}], r"c.jsonl:2 \(id r7\): no list of turns", monkeypatch)
    refused(
        tmp_path,
        [{"conversations": talk("a")}],
        r"c.jsonl: 0% .*⟦ ⟧: '<\|im_start\|>user\\n",
        monkeypatch,
    )
    refused(
        tmp_path,
        [GOOD],
        "max_length = 257.*max_position_embeddings is 256; set --max-length to at most 256",
        monkeypatch,
        max_length=257,
    )
    refused(tmp_path, [GOOD], r"layers \[0, 1, 5\].*\[0, 5\)", monkeypatch, layers=(0, 1, 5))
    with pytest.raises(UserError, match=r"none.jsonl: no such file; name"):
        run(tmp_path / "none.jsonl", tmp_path / "out")


def test_all_tokens_supervised_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        room, "encode", lambda *_args: (torch.arange(4), torch.ones(4, dtype=torch.int64))
    )
    refused(tmp_path, [GOOD], r"c.jsonl: 100% of the tokens.*'⟦[^\n]*⟧'$", monkeypatch)


def test_another_targets_tokenizer_is_refused(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 2)
    with pytest.raises(
        UserError,
        match=r"c.jsonl:1 \(id row0\): token id \d+.*vocabulary has 100.*take the tokenizer",
    ):
        extract(
            tiny_model(vocab_size=100), TOKENIZER, talks, tmp_path / "out", LAYERS, max_length=90
        )
