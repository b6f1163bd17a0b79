"""Extraction: right features, resumption to identical files, refusals before the target runs."""

import json
import math
import os
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import sha256
from eagle3fn.data import shards as module
from eagle3fn.data import sources, target_files
from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.encode import encode_all
from eagle3fn.data.extract import extract
from eagle3fn.data.features import check_shards, open_features, read_sample
from eagle3fn.data.row_files import rows_digest
from eagle3fn.data.samples import NO_ANSWER, TOO_LONG, SampleMaker
from eagle3fn.data.sources import model_source
from eagle3fn.data.target import load_target
from eagle3fn.data.target_files import KEPT, check_weights_of, target_digests
from eagle3fn.data.template import ChatTemplate
from tests.factories import talk, tiny_model, tiny_template, tiny_tokenizer, write_talks

LAYERS = (1, 2, 4)
MODEL = tiny_model()
TEMPLATE = tiny_template()
GOOD = {"conversations": talk("a", "b")}


def run(conversations, out, template=TEMPLATE, **changes):
    options = {"max_length": 90, "samples_per_shard": 3, **changes}
    source = model_source(MODEL, options.pop("layers", LAYERS), batch_tokens=100)
    return extract(source, template, conversations, out, **options)


def contents(folder):
    files = sorted(path for path in folder.iterdir() if path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


@contextmanager
def before_each_run(action):
    """Call `action` whenever the target is run."""
    hook = MODEL.model.register_forward_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        hook.remove()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_stored_features_are_the_targets(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    seen = []
    index = run(talks, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    opened = open_features(tmp_path / "out", vocab_size=300, hidden_size=16)
    lengths = [entry["length"] for entry in opened.samples]
    assert seen == [(sum(lengths[:count]), sum(lengths)) for count in (0, 3, 6, 8)]
    check_shards(opened)
    assert index == opened.index
    assert index["target"]["aux_layers"] == [1, 2, 4]
    assert index["dtype"] == "float32"
    assert index["dropped"] == 0

    for number, row in enumerate(encode_all(SampleMaker(TEMPLATE, 90), talks, 300)):
        ids = row.input_ids
        sample = read_sample(opened, number)
        assert opened.samples[number]["id"] == row.id == f"row{number}"
        assert torch.equal(sample.input_ids, ids)
        assert torch.equal(sample.token_mask, row.token_mask)

        # Alone in its run: equal to rounding.
        aux, last = hidden_states(MODEL, ids[None], torch.ones_like(ids)[None], LAYERS)
        torch.testing.assert_close(sample.aux_hidden, aux[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sample.last_hidden, last[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("runs", [0, 2, 4])
def test_killed_extraction_resumes_to_identical_files(tmp_path, runs):
    """Killed after `runs` of the target's five runs; whole shards are not made again."""
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "whole")
    out = tmp_path / "out"
    done = []

    def stop_later():
        if len(done) == runs:
            raise KeyboardInterrupt
        done.append(1)

    with before_each_run(stop_later), pytest.raises(KeyboardInterrupt):
        run(talks, out)
    assert not (out / "index.json").exists()

    done.clear()
    with before_each_run(lambda: done.append(1)):
        run(talks, out)
    assert len(done) == 5 - runs
    assert contents(out) == contents(tmp_path / "whole")


def test_truncated_shard_is_made_again_when_a_higher_limit_goes_on(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    run(talks, tmp_path / "whole")
    assert run(talks, out, limit=4)["totals"]["samples"] == 4
    (out / "shard-00000.safetensors").write_bytes(b"cut")
    run(talks, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_folder_has_no_index_while_a_higher_limit_goes_on(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    run(talks, tmp_path / "out", limit=3)

    def stop():
        raise KeyboardInterrupt

    with before_each_run(stop), pytest.raises(KeyboardInterrupt):
        run(talks, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["shard-00000.json", "shard-00000.safetensors"]


def test_time_ends_an_extraction_that_a_later_call_completes(tmp_path, monkeypatch):
    """Each run takes a second of a clock of its own; the first shard's time is the next one's."""
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])

    def run_a_second():
        seconds[0] += 1

    whole = run(talks, tmp_path / "whole")
    assert whole["remaining"] == 0
    with before_each_run(run_a_second):
        # Shards of two runs each: the third would end after 5.9 seconds.
        index = run(talks, out, minutes=5.9 / 60)
        assert (index["totals"]["samples"], index["remaining"], seconds[0]) == (6, 2, 4)
        open_features(out, 300, 16)

        # No time at all is enough for the first shard, and for what is there.
        assert run(talks, out, minutes=0)["totals"]["samples"] == 6
        assert run(talks, tmp_path / "first", minutes=0)["totals"]["samples"] == 3
    run(talks, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_features_are_stored_in_the_dtype_asked_for(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 4)
    run(talks, tmp_path / "wide")
    index = run(talks, tmp_path / "out", stored=torch.bfloat16)
    assert (index["dtype"], index["computed_in"]) == ("bfloat16", "float32")
    wide = open_features(tmp_path / "wide")
    narrow = open_features(tmp_path / "out")
    for number in range(4):
        expected = read_sample(wide, number)
        found = read_sample(narrow, number)
        assert torch.equal(found.aux_hidden, expected.aux_hidden.bfloat16())
        assert torch.equal(found.last_hidden, expected.last_hidden.bfloat16())

    # Computed otherwise, they are other features.
    with pytest.raises(UserError, match="made from other"):
        run(talks, tmp_path / "out")


def test_shard_whose_bytes_changed_is_made_again(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    run(talks, out)
    before = contents(out)
    shard = out / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run(talks, out)
    assert contents(out) == before


@pytest.mark.parametrize("text", ["[1]", "3", "[1,", "\xff"])
def test_a_damaged_index_is_refused_and_a_damaged_sidecar_costs_its_shard_alone(tmp_path, text):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    run(talks, out)
    before = contents(out)
    (out / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"index.json: not a JSON object; delete this file"):
        run(talks, out)

    (out / "index.json").unlink()
    (out / "shard-00001.json").write_bytes(text.encode("latin-1"))
    run(talks, out)
    assert contents(out) == before


@pytest.mark.parametrize("key", ["samples", "bytes", "sha256", "file"])
def test_shard_with_a_partial_sidecar_is_made_again(tmp_path, key):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    run(talks, out)
    before = contents(out)
    sidecar = json.loads(before["shard-00001.json"])
    del sidecar[key]
    (out / "shard-00001.json").write_text(json.dumps(sidecar))
    run(talks, out)
    assert contents(out) == before


def test_rejected_rows_lie_beside_the_features_of_the_others(tmp_path):
    out = tmp_path / "out"
    rows = [GOOD, {"id": "bad"}, GOOD]
    index = run(write_rows(tmp_path / "c.jsonl", rows), out, skip_bad=0.5)
    assert (index["rows"], index["rejected"], index["totals"]["samples"]) == (3, 1, 2)
    (line,) = (out / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == {"id": "bad"}

    # Without bad rows, in a folder of the same features, none are left.
    shutil.rmtree(out)
    out.mkdir()
    (out / "rejects.jsonl").write_text("of an earlier call")
    run(write_rows(tmp_path / "c.jsonl", [GOOD]), out)
    assert not (out / "rejects.jsonl").exists()


def test_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    talks = write_talks(tmp_path / "c.jsonl", 4)

    def grow(rows):
        with talks.open("a") as file:
            file.write(json.dumps(GOOD) + "\n")

    never = before_each_run(lambda: pytest.fail("the target ran"))
    with never, pytest.raises(UserError, match=r"c.jsonl: changed while it was read"):
        run(talks, tmp_path / "out", limit=3, on_rows=grow)

    # After their digest was made, too.
    def digest_then_grow(path):
        digest = rows_digest(path)
        grow(0)
        return digest

    monkeypatch.setattr("eagle3fn.data.extract_rows.rows_digest", digest_then_grow)
    never = before_each_run(lambda: pytest.fail("the target ran"))
    with never, pytest.raises(UserError, match=r"c.jsonl: changed while it was read"):
        run(talks, tmp_path / "out", limit=3)


def test_shard_of_other_tokens_is_made_again(tmp_path):
    """As of another tokenizer with the same template: lengths and masks are alike."""
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    other = tiny_template()
    letters = other.tokenizer.backend_tokenizer
    tree = json.loads(letters.to_str())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["q"] = vocabulary["q"], vocabulary["a"]
    other.tokenizer._tokenizer = type(letters).from_str(json.dumps(tree))
    run(talks, out, other)
    run(talks, out)
    run(talks, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_folder_of_another_extraction_is_refused_and_left_as_it_is(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 8)
    out = tmp_path / "out"
    run(talks, out)
    before = contents(out)
    for change, said in (
        ({"max_length": 80}, "with max_length 90, not 80"),
        ({"layers": (0, 1, 2)}, r"with layers \[.*\], not \[0, 1, 2\]"),
        ({"samples_per_shard": 4}, "from other conversations, another target or other settings"),
    ):
        refusal = rf"index.json: made {said}; remove the folder .*out or choose another"
        with pytest.raises(UserError, match=refusal):
            run(talks, out, **change)

    # Other conversations; without an index the sidecars are compared.
    write_talks(talks, 9)
    with pytest.raises(UserError, match=r"index.json: made from other conversations; remove"):
        run(talks, out)
    (out / "index.json").unlink()
    with pytest.raises(UserError, match=r"shard-00000.json: made from other.*remove the folder"):
        run(talks, out)
    del before["index.json"]
    assert contents(out) == before


def test_samples_without_a_supervised_token_are_dropped_and_counted(tmp_path):
    talks = tmp_path / "c.jsonl"
    rows = [talk("a", "b"), talk("a"), talk("a" * 200, "b"), talk("c", "d")]
    # Ids are line numbers where a row has none; empty lines count.
    talks.write_text("".join(json.dumps({"conversations": row}) + "\n\n" for row in rows))
    index = run(talks, tmp_path / "out")
    assert index["dropped"] == 2
    assert index["dropped_reasons"] == {NO_ANSWER: 1, TOO_LONG: 1}
    samples = open_features(tmp_path / "out").samples
    assert [sample["id"] for sample in samples] == ["1", "7"]


@pytest.mark.parametrize(
    ("rows", "changes", "named"),
    [
        ([], {}, "c.jsonl: no rows; write"),
        ([GOOD, {"id": "r7"}], {}, r"c.jsonl:2 \(id r7\): no list of turns"),
        (
            [{"conversations": talk("a")}],
            {},
            "no sample: 1 of 1 .*have no assistant turn",
        ),
        (
            [GOOD],
            {"max_length": 257},
            "max_length = 257.*max_position_embeddings is 256; set --max-length to at most 256",
        ),
        ([GOOD], {"layers": (0, 1, 5)}, r"layers \[0, 1, 5\].*\[0, 5\)"),
    ],
)
def test_bad_input_is_refused_before_the_target_runs(tmp_path, rows, changes, named):
    talks = write_rows(tmp_path / "c.jsonl", rows)
    never = before_each_run(lambda: pytest.fail("the target ran"))
    with never, pytest.raises(UserError, match=named):
        run(talks, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_missing_conversations_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: no such file; name"):
        run(tmp_path / "none.jsonl", tmp_path / "out")


def test_tokenizer_of_another_target_is_refused(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 2)
    smaller = tiny_model(vocab_size=100)
    refusal = r"c.jsonl:1 \(id row0\): token id \d+.*vocabulary has 100.*take the tokenizer"
    with pytest.raises(UserError, match=refusal):
        extract(model_source(smaller, LAYERS), TEMPLATE, talks, tmp_path / "out", max_length=90)


# The target's files


@pytest.fixture
def target(tmp_path):
    """A target in a folder, and its features of four conversations in two shards."""
    tiny_model(num_hidden_layers=5).save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    write_talks(tmp_path / "c.jsonl", 4)
    from_files(tmp_path)
    return tmp_path / "target"


def from_files(tmp_path, **changes):
    model, tokenizer = load_target(tmp_path / "target", torch.float32)
    options = {"max_length": 90, "samples_per_shard": 2, **changes}
    source = model_source(model, LAYERS, batch_tokens=100)
    template = ChatTemplate(tokenizer, (1,))
    return extract(source, template, tmp_path / "c.jsonl", tmp_path / "out", **options)


def swap_letters(target):
    path = target / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    vocab["X"], vocab["Y"] = vocab["Y"], vocab["X"]
    path.write_text(json.dumps(tree))


def change_a_late_weight(target):
    path = target / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [swap_letters, change_a_late_weight])
@pytest.mark.parametrize("without", ["index.json", "shard-00000.json"])
def test_features_of_other_files_of_the_target_are_not_gone_on_with(
    target, tmp_path, change, without
):
    """The tokens are the same, and so is the fingerprint of earlier versions."""
    change(target)
    (tmp_path / "out" / without).unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"other files of the target: .*remove the folder") as it:
        from_files(tmp_path)
    assert "\n" not in str(it.value)
    assert contents(tmp_path / "out") | {KEPT: b""} == before | {KEPT: b""}


def swap_in_another_file(target):
    """A rename, as tools that write whole files do; size and time are the old ones."""
    before = (target / "model.safetensors").stat()
    shutil.copytree(target, target.with_name("other"))
    change_a_late_weight(target.with_name("other"))
    os.utime(target.with_name("other") / "model.safetensors", ns=(0, before.st_mtime_ns))
    os.replace(target.with_name("other") / "model.safetensors", target / "model.safetensors")


@pytest.mark.parametrize("when", ["loaded", "extracted"])
@pytest.mark.parametrize("change", [swap_letters, swap_in_another_file])
def test_a_target_whose_files_change_while_it_is_read_is_refused(target, tmp_path, change, when):
    stamps = target_files.target_stamps(target)
    model, tokenizer = load_target(target, torch.float32)
    if when == "loaded":
        change(target)
    source = model_source(model, LAYERS, batch_tokens=100, stamps=stamps)

    def changed(done, total):
        if when == "extracted" and done == total:
            change(target)

    with pytest.raises(UserError, match="the target's files changed while they were read; wait"):
        extract(
            source,
            ChatTemplate(tokenizer, (1,)),
            tmp_path / "c.jsonl",
            tmp_path / "new",
            max_length=90,
            on_progress=changed,
        )
    assert not (tmp_path / "new/index.json").exists()


def test_features_without_a_digest_of_the_targets_files_are_gone_on_with(target, tmp_path):
    """As earlier versions wrote them; what is made now has it."""
    out = tmp_path / "out"
    (out / "index.json").unlink()
    (out / KEPT).unlink()
    for path in out.glob("shard-*.json"):
        tree = json.loads(path.read_text())
        del tree["target_files"]
        path.write_text(json.dumps(tree))
    (out / "shard-00001.json").unlink()

    with runs_counted() as runs:
        index = from_files(tmp_path)
    assert len(runs) == 1  # of two shards
    assert index["target"]["files"] == target_digests(target).files
    assert open_features(out).index == index


@contextmanager
def runs_counted():
    """The groups that the source is asked for."""
    runs = []
    original = sources.run_target
    sources.run_target = lambda *args: runs.append(1) or original(*args)
    try:
        yield runs
    finally:
        sources.run_target = original


def test_a_targets_files_are_hashed_once_while_they_stay(target, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        target_files, "sha256", lambda path: hashed.append(path.name) or sha256(path)
    )
    keep = tmp_path / "kept.json"
    digest = target_digests(target, keep)
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= set(hashed)
    hashed.clear()
    assert target_digests(target, keep) == digest and not hashed

    # Another time is reason enough to hash again; a file of hashes that is damaged is none.
    os.utime(target / "tokenizer.json", ns=(1, 1))
    assert target_digests(target, keep) == digest and hashed == ["tokenizer.json"]
    for text in ("{", "[]", '{"a": 1}', '{"a": {"stamp": []}}'):
        keep.write_text(text)
        assert target_digests(target, keep) == digest


def test_features_of_other_weights_are_not_trained_on(target, tmp_path):
    """Where embedding, head and norm are the same; another tokenizer harms no training."""
    features = open_features(tmp_path / "out")
    swap_letters(target)
    check_weights_of(features, target)
    change_a_late_weight(target)
    with pytest.raises(UserError, match=r"index.json: made with other weights than .*target has"):
        check_weights_of(features, target)
    del features.index["target"]["weights"]  # as earlier versions wrote it
    check_weights_of(features, target)


# Two at once


def test_the_second_of_two_extractions_into_a_folder_is_refused(tmp_path):
    talks = write_talks(tmp_path / "c.jsonl", 4)
    others = write_talks(tmp_path / "other.jsonl", 5)
    refusals = []

    def second():
        with pytest.raises(UserError, match=r"out: another process is at work there") as it:
            run(others, tmp_path / "out")
        refusals.append(str(it.value))

    with before_each_run(second):
        run(talks, tmp_path / "out")
    assert refusals and all("\n" not in line for line in refusals)
    run(talks, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Features that training refuses


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (2, math.nan, "after layer 2"),
        (4, math.inf, "after layer 4"),
        (1, 1e13, "after layer 1"),
        (None, math.inf, "after its last layer"),
    ],
)
def test_features_that_training_refuses_are_not_written(tmp_path, place, value, named):
    """Sample and layer are named; shards that were finished before are kept."""
    talks = write_talks(tmp_path / "c.jsonl", 4)
    source = model_source(MODEL, LAYERS, batch_tokens=100)

    def spoiled(group, stored):
        samples = source.features(group, stored)
        if len(group) == 1:  # the second shard
            sample = samples[0]
            state = sample.last_hidden
            if place is not None:
                state = sample.aux_hidden.chunk(3, -1)[LAYERS.index(place)]
            state[2, 3] = value
        return samples

    with pytest.raises(UserError, match=rf"sample '.*': .*at token 2.*{named} ") as it:
        extract(
            source._replace(features=spoiled),
            TEMPLATE,
            talks,
            tmp_path / "out",
            max_length=90,
            samples_per_shard=3,
        )
    assert "\n" not in str(it.value) and "float32" in str(it.value)
    assert sorted(contents(tmp_path / "out")) == ["shard-00000.json", "shard-00000.safetensors"]
