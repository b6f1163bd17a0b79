"""Files to samples: what is counted, in what order, by how many processes, and how much memory."""

import json
import tracemalloc

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data import encode as module
from eagle3fn.data.encode import (
    describe_counts,
    encode_all,
    encode_file,
    encode_rows,
)
from eagle3fn.data.row_stamps import stamps_of
from eagle3fn.data.sample_file import SampleFile, pack
from eagle3fn.data.samples import EMPTY, NO_ANSWER, TOO_LONG, Encoded, SampleMaker
from tests.factories import talk, tiny_template, write_talks

MAKER = SampleMaker(tiny_template(), 90)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def equal(left, right):
    return all(
        a.id == b.id
        and torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.token_mask, b.token_mask)
        for a, b in zip(left, right, strict=True)
    )


def test_a_rows_id_draws_nothing_on_the_terminal(tmp_path):
    ids = ["a\n\x1b[2J\x07" + "b" * 200, "\ud800"]
    path = write_rows(tmp_path / "c.jsonl", [{"id": name} for name in ids])
    with pytest.raises(UserError) as raised:
        encode_file(MAKER, path, 300)
    text = str(raised.value)
    assert r"c.jsonl:1 (id a \x1b[2J\x07bbb" in text and "…)" in text
    assert text.isprintable() and "b" * 100 not in text


def test_rows_without_a_sample_are_counted_by_reason(tmp_path):
    rows = [
        {"messages": talk("a", "b")},
        {"messages": talk("a")},
        {"messages": talk("a" * 200, "b")},
        {"messages": talk("a" * 200, "b")},
        {"messages": talk("a", "")},
        {"messages": talk("a", "b", "c", ""), "source": "web"},
    ]
    found = encode_file(MAKER, write_rows(tmp_path / "c.jsonl", rows), 300)
    with found.samples as samples:
        assert [sample.id for sample in samples] == ["1", "6"]
    counts = found.counts()
    assert counts == {
        "rows": 6,
        "rejected": 0,
        "dropped": 4,
        "dropped_reasons": {TOO_LONG: 2, NO_ANSWER: 1, EMPTY: 1},
        "lost_answers": {EMPTY: 1},
        "unused_keys": {"source": 1},
        "notes": {},
        "cut_rows": 0,
        "cut_tokens": 0,
    }
    assert describe_counts(counts)[0].startswith(
        "4 of 6 conversations dropped: 2 have no supervised token within the maximal length"
    )
    assert "source" in describe_counts(counts)[2]


def test_nothing_left_out_is_no_line(tmp_path):
    found = encode_file(MAKER, write_talks(tmp_path / "c.jsonl", 3), 300)
    found.samples.close()
    assert describe_counts(found.counts()) == []


def test_all_bad_rows_are_counted_and_refused_together(tmp_path):
    """As in three bad rows of thirty: one run names all of them."""
    good = {"messages": talk("a", "b")}
    rows: list[dict] = [dict(good, id=number) for number in range(1, 31)]
    for number in (10, 20, 30):
        rows[number - 1] = {"id": number, "messages": [*talk("a"), {"role": "assistant"}]}
    path = write_rows(tmp_path / "c.jsonl", rows)
    with pytest.raises(UserError, match="3 of 30 rows are bad") as refused:
        encode_file(MAKER, path, 300)
    named = "c.jsonl:10 (id 10), :20 (id 20), :30 (id 30): turn 2: content None"
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_rows_are_left_out_and_written_to_a_file(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": talk("a", "b")}) + '\n{"messages": 3}\n{broken\n')
    found = encode_file(MAKER, path, 300, skip_bad=0.7, rejects=tmp_path / "rejects.jsonl")
    with found.samples as samples:
        assert len(samples) == 1
    assert found.rejected == 2
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [row["where"] for row in written] == [f"{path}:2", f"{path}:3"]
    assert [row["row"] for row in written] == [{"messages": 3}, "{broken"]

    with pytest.raises(UserError, match="2 of 3 rows"):
        encode_file(MAKER, path, 300, skip_bad=0.3, rejects=tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_file_that_changes_is_refused_and_no_bad_row_is_written(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"messages": talk("a", "b")}, {"messages": 3}])
    stamps = stamps_of(path)
    bad_rows = {"skip_bad": 0.5, "rejects": tmp_path / "rejects.jsonl"}

    def grow(rows):
        with path.open("a") as file:
            file.write("\n")

    changed = r"c.jsonl: changed while it was read; wait .* call again$"
    with pytest.raises(UserError, match=changed):
        encode_file(MAKER, path, 300, **bad_rows, on_progress=grow)
    with pytest.raises(UserError, match=changed):
        encode_file(MAKER, path, 300, **bad_rows, stamps=stamps)
    assert not (tmp_path / "rejects.jsonl").exists()
    encode_file(MAKER, path, 300, **bad_rows, stamps=stamps_of(path)).samples.close()
    assert (tmp_path / "rejects.jsonl").exists()


def test_progress_counts_every_row_from_the_first(tmp_path):
    seen: list[int] = []
    path = write_talks(tmp_path / "c.jsonl", 5)
    encode_file(MAKER, path, 300, limit=4, on_progress=seen.append).samples.close()
    assert seen == [1, 2, 3, 4]


def test_several_processes_give_the_same_in_the_same_order(tmp_path, monkeypatch):
    path = write_talks(tmp_path / "c.jsonl", 40)
    with path.open("a") as file:
        file.write('{"messages": 3}\n')
    monkeypatch.setattr(module, "_ALONE", 4)
    monkeypatch.setattr(module, "_CHUNK", 3)
    alone = list(encode_rows(MAKER, path))
    assert list(encode_rows(MAKER, path, processes=2)) == alone
    assert alone[-1].fault
    assert len(list(encode_rows(MAKER, path, limit=11, processes=2))) == 11


def test_first_rows_of_a_file_are_encoded_without_further_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("started"))
    assert len(list(encode_rows(MAKER, write_talks(tmp_path / "c.jsonl", 5), processes=2))) == 5


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    """So the first is done before the file is read, and a file may be longer than memory."""
    path = write_talks(tmp_path / "c.jsonl", 3)
    with path.open("a") as file:
        file.write("not JSON\n")
    rows = encode_rows(MAKER, path)
    assert next(rows).where.endswith("c.jsonl:1 (id row0)")


def test_samples_come_back_from_their_file(tmp_path):
    samples = [
        Encoded("a", torch.tensor([5, 6, 7]), torch.tensor([0, 1, 1])),
        Encoded("ü:4", torch.tensor([2**31 - 1]), torch.tensor([1])),
        Encoded("", torch.tensor([1, 2]), torch.tensor([1, 0])),
    ]
    with SampleFile(tmp_path / "samples") as file:
        for sample in samples:
            file.append(pack(sample))
        assert len(file) == 3
        assert equal(file[:], samples)
        assert equal([file[-1], file[0]], [samples[2], samples[0]])
        assert equal(file[1:5], samples[1:])
        with pytest.raises(IndexError):
            file[3]

        # Another process opens the file by its name.
        file.flush()
        with SampleFile.written(tmp_path / "samples") as same:
            assert equal(same[:], samples)
            assert same.tokens == file.tokens == 6


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Held at the end of reading: a place of 8 bytes a sample, and nothing of the samples."""

    def held(rows: int) -> int:
        path = write_talks(tmp_path / f"{rows}.jsonl", rows)
        tracemalloc.start()
        with encode_file(MAKER, path, 300).samples:
            size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    held(10)
    assert held(600) - held(60) < 60_000


def test_id_beyond_the_vocabulary_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"c.jsonl:1 \(id row0\): token id \d+.*vocabulary has 100"):
        encode_all(MAKER, write_talks(tmp_path / "c.jsonl", 2), 100)


def test_target_without_a_template_is_no_fault_of_the_rows(tmp_path):
    maker = SampleMaker(tiny_template(None), 90)
    path = write_talks(tmp_path / "c.jsonl", 3)
    with pytest.raises(UserError, match=r"^[^:]*: no chat template; take an instruction-tuned"):
        encode_file(maker, path, 300, skip_bad=1.0, rejects=tmp_path / "rejects.jsonl")
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "plain"}])
    assert len(encode_all(maker, texts, 300)) == 1


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a", "response": "b"}, "have no assistant turn; .*not read: response; give"),
        ({"messages": talk("a" * 200, "b")}, "within the maximal length; raise --max-length"),
        ({"messages": talk("a", "b"), "train": False}, "weight.*; give an answer weight 1"),
    ],
)
def test_file_without_a_sample_is_refused_with_its_reason_and_remedy(tmp_path, row, named):
    with pytest.raises(UserError, match=f"no sample: 2 of 2 conversations dropped: 2 .*{named}"):
        encode_file(MAKER, write_rows(tmp_path / "c.jsonl", [row, row]), 300)


def test_file_of_one_bad_row_that_is_skipped_tells_it(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"messages": 3}])
    with pytest.raises(UserError, match=r"no sample: .*1 of 1 rows is bad.*messages 3"):
        encode_file(MAKER, path, 300, skip_bad=1.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [(None, "1"), (False, "1"), ("", "1"), ([1], "1"), (7, "7"), ("a\nb", "a b"), ("\ud800", "?")],
)
def test_row_is_named_by_its_id_if_it_is_a_name(tmp_path, name, expected):
    path = write_rows(tmp_path / "c.jsonl", [{"id": name, "messages": talk("a", "b")}])
    assert [row.name for row in encode_rows(MAKER, path)] == [expected]
    assert encode_all(MAKER, path, 300)[0].id == expected


def test_keys_are_listed_in_one_order(tmp_path):
    rows = [{"messages": talk("a", "b"), "source": 1, "meta": 2, "score": 3}] * 2
    found = encode_file(MAKER, write_rows(tmp_path / "c.jsonl", rows), 300)
    found.samples.close()
    assert describe_counts(found.counts()) == [
        "keys that are not read: meta (2), score (2), source (2)"
    ]


def test_tokens_that_are_cut_off_are_counted(tmp_path):
    maker = SampleMaker(tiny_template(), 60)
    rows = [{"messages": talk("a", "b" * 100)}, {"messages": talk("a", "b")}]
    path = write_rows(tmp_path / "c.jsonl", rows)
    found = encode_file(maker, path, 300)
    found.samples.close()
    whole = encode_all(MAKER, write_rows(tmp_path / "d.jsonl", [{"messages": talk("a", "b")}]), 300)
    prompt = len(whole[0].input_ids) - 2
    assert (found.cut_rows, found.cut_tokens) == (1, 101 - (60 - prompt))
    (line,) = describe_counts(found.counts())
    assert line.startswith(f"{found.cut_tokens} supervised tokens of 1 conversations are cut off")


def test_what_is_worth_a_look_is_told(tmp_path):
    """An empty thought that the template writes is trained unless thinking is turned off."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
        "{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    path = write_rows(tmp_path / "c.jsonl", [{"messages": talk("a", "b", "c", "d")}])
    found = encode_file(SampleMaker(tiny_template(template), 200), path, 300)
    found.samples.close()
    (line,) = describe_counts(found.counts())
    assert line.startswith("answers worth a look: 2 begin with an empty thought")
