"""The feature folder's reader: round trips, and every damage named with its file."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import sha256
from eagle3fn.data import features as module
from eagle3fn.data.feature_writing import tokens_digest
from eagle3fn.data.features import (
    Reader,
    check_made_for,
    check_shards,
    open_features,
    read_sample,
    read_tokens,
    tensors_of,
)
from eagle3fn.data.sample_table import (
    SampleTable,
    all_entries,
    columns_of,
    read_table,
    write_table,
)
from eagle3fn.data.vocab import count_tokens
from tests.factories import as_schema_1, random_sample, write_folder
from tests.fuzz.hashes import match

AGAIN = "run eagle3fn extract again"
GOOD = random_sample(6, 1)
NAN = GOOD.last_hidden.clone()
NAN[3, 1] = float("nan")
INF = GOOD.aux_hidden.clone()
INF[2, 5] = float("inf")


def same(left, right):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def change_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


# Shards


def test_samples_are_read_bit_for_bit(tmp_path):
    samples = [random_sample(4 + i, i) for i in range(7)]
    opened = open_features(write_folder(tmp_path, samples), vocab_size=50, hidden_size=4)
    check_shards(opened)
    assert len(opened.samples) == 7
    assert opened.index["totals"]["tokens"] == sum(4 + i for i in range(7))
    for number, sample in enumerate(samples):
        assert same(read_sample(opened, number), sample)
        assert same(read_tokens(opened, number), (sample.input_ids, sample.token_mask))


def test_token_mask_is_stored_as_loss_mask(tmp_path):
    write_folder(tmp_path, [GOOD])
    stored = load_file(tmp_path / "shard-00000.safetensors")
    fields = ("input_ids", "loss_mask", "aux_hidden", "last_hidden")
    assert same([stored.pop(f"0.{field}") for field in fields], GOOD)
    assert not stored


def test_opening_reads_no_shard(tmp_path):
    write_folder(tmp_path, [GOOD])
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert len(open_features(tmp_path).samples) == 1


def test_reading_tokens_reads_no_features(tmp_path):
    opened = open_features(write_folder(tmp_path, [GOOD]))
    shard = tmp_path / "shard-00000.safetensors"
    tokens = {k: v for k, v in load_file(shard).items() if k in ("0.input_ids", "0.loss_mask")}
    save_file(tokens, shard)
    assert same(read_tokens(opened, 0), (GOOD.input_ids, GOOD.token_mask))
    with pytest.raises(UserError, match=rf"shard-00000.safetensors: missing or damaged.*{AGAIN}"):
        read_sample(opened, 0)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_or_truncated_shard_is_refused(tmp_path, damage):
    opened = open_features(write_folder(tmp_path, [random_sample(6, i) for i in range(7)]))
    shard = tmp_path / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(data[:-10])

    with pytest.raises(UserError, match=rf"shard-00001.safetensors.*{AGAIN}"):
        open_features(tmp_path)
    with pytest.raises(UserError, match=rf"shard-00001.safetensors.*row4.*{AGAIN}"):
        read_sample(opened, 4)
    assert len(read_tokens(opened, 0)[0]) == 6  # the other shard is read


def test_changed_bytes_are_found_by_the_hash(tmp_path):
    opened = open_features(write_folder(tmp_path, [random_sample(6, 0)]))
    change_last_byte(tmp_path / "shard-00000.safetensors")
    refusal = rf"shard-00000.safetensors: its bytes have changed.*{AGAIN}"
    with pytest.raises(UserError, match=refusal):
        check_shards(opened)
    with pytest.raises(UserError, match=refusal):
        read_sample(opened, 0)


def test_each_shard_is_hashed_once_while_its_file_stays(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    hashed = []
    monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    opened = open_features(folder)
    for number in (0, 1, 4, 2, 3, 0):
        read_sample(opened, number)
    assert hashed == ["shard-00000.safetensors", "shard-00001.safetensors"]


@pytest.mark.parametrize("replace", [True, False])
def test_shard_that_changes_while_it_is_in_use_is_noticed(tmp_path, replace):
    """Replaced by another folder's shard of the same size, and written in place."""
    opened = open_features(write_folder(tmp_path / "a", [random_sample(6, i) for i in range(5)]))
    write_folder(tmp_path / "b", [random_sample(6, i + 10) for i in range(5)])
    read_sample(opened, 0)
    shard = tmp_path / "a" / "shard-00000.safetensors"
    if replace:
        os.replace(tmp_path / "b" / shard.name, shard)
    else:
        change_last_byte(shard)
    with pytest.raises(UserError, match=rf"shard-00000.safetensors: its bytes have.*{AGAIN}"):
        read_sample(opened, 1)


def test_shard_that_is_written_again_alike_is_read_on(tmp_path):
    opened = open_features(write_folder(tmp_path, [random_sample(6, i) for i in range(5)]))
    first = read_sample(opened, 0)
    write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    assert same(read_sample(opened, 0), first)


def test_shard_that_vanishes_while_it_is_in_use_is_named(tmp_path):
    opened = open_features(write_folder(tmp_path, [random_sample(6, i) for i in range(5)]))
    read_sample(opened, 0)
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(UserError, match=rf"shard-00000.safetensors: missing or damaged.*{AGAIN}"):
        read_sample(opened, 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"last_hidden": NAN}, "last_hidden holds NaN or infinity at token 3"),
        ({"aux_hidden": INF}, "aux_hidden holds NaN or infinity at token 2"),
        ({"input_ids": GOOD.input_ids.clone().fill_(50)}, r"token id 50: must be in \[0, 50\)"),
        ({"input_ids": GOOD.input_ids.clone().fill_(-1)}, "token id -1"),
        ({"token_mask": GOOD.token_mask + 1}, "values other than 0 and 1"),
        ({"token_mask": GOOD.token_mask[:5]}, r"token_mask \(5,\)"),
        ({"input_ids": GOOD.input_ids.int()}, "input_ids torch.int32"),
        ({"aux_hidden": GOOD.aux_hidden[:, :8]}, r"aux_hidden \(6, 8\)"),
        ({"last_hidden": GOOD.last_hidden[:5]}, r"last_hidden \(5, 4\)"),
        ({"last_hidden": GOOD.last_hidden.float()}, "last_hidden torch.float32"),
    ],
)
def test_bad_tensor_is_refused_with_its_file_and_sample(tmp_path, change, named):
    samples = [random_sample(6, 1), GOOD._replace(**change)]
    opened = open_features(write_folder(tmp_path, samples))
    assert same(read_sample(opened, 0), GOOD)
    refusal = rf"shard-00000.safetensors: sample 'row1': .*{named}.*{AGAIN}"
    with pytest.raises(UserError, match=refusal):
        read_sample(opened, 1)


def test_length_other_than_the_indexs_is_refused(tmp_path):
    folder = write_folder(tmp_path, [GOOD, random_sample(6, 2)])
    change_table(folder, length=np.array([5, 7]))
    opened = open_features(tmp_path)
    with pytest.raises(UserError, match=r"shard-00000.safetensors.*both must be \(5,\)"):
        read_tokens(opened, 0)


# The index


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 99}, "schema 99: this version reads 1 and 2"),
        ({"samples": []}, "no samples"),
        ({"shards": None}, "shards is missing"),
    ],
)
def test_bad_index_is_refused(tmp_path, change, named):
    path = as_schema_1(write_folder(tmp_path, [GOOD]))
    tree = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(UserError, match=f"index.json: {named}.*{AGAIN}"):
        open_features(tmp_path)


def test_index_that_is_no_json_is_refused(tmp_path):
    path = write_folder(tmp_path, [GOOD]) / "index.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"index.json: not readable"):
        open_features(tmp_path)


def left_out(samples):
    return samples[1:]


def doubled(samples):
    return [samples[0], *samples]


def swapped(samples):
    one, other, *rest = samples
    return [one | {"key": other["key"]}, other | {"key": one["key"]}, *rest]


def made_longer(samples):
    return [samples[0] | {"supervised": 1 + samples[0]["supervised"]}, *samples[1:]]


def change_index(folder, has_hash, **changes):
    """Change entries of an index; one of an earlier version has no hash of itself."""
    path = as_schema_1(folder) if "samples" in changes else folder / "index.json"
    tree = json.loads(path.read_text())
    tree |= {key: change(tree[key]) for key, change in changes.items()}
    if not has_hash:
        del tree["sha256"]
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("has_hash", [True, False])
@pytest.mark.parametrize("change", [left_out, doubled, swapped, made_longer])
def test_index_with_other_samples_is_refused(tmp_path, change, has_hash):
    """By its hash; without one by keys, totals and, when a shard is read, by its tensors."""
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    for entry in open_features(folder).samples:
        assert entry["length"] == 6  # swapped keys are found by the digest of tokens alone
    change_index(folder, has_hash, samples=change)
    if change is made_longer and not has_hash:
        open_features(folder)  # a number that nothing is read by
        return
    if change is swapped and not has_hash:
        entry_digests(folder)
    with pytest.raises(UserError, match=rf"(index.json|shard-00000.safetensors): .*{AGAIN}"):
        opened = open_features(folder)
        for number in range(len(opened.samples)):
            read_sample(opened, number)


def entry_digests(folder):
    """Give entries their digests of tokens, as `extract` does, by the ids that they have."""
    right = {f"row{i}": random_sample(6, i) for i in range(5)}
    path = folder / "index.json"
    tree = json.loads(path.read_text())
    for entry in tree["samples"]:
        sample = right[entry["id"]]
        entry["tokens"] = tokens_digest(entry["id"], sample.input_ids, sample.token_mask)
    path.write_text(json.dumps(tree))


def test_sample_that_the_index_lacks_is_found_by_its_tensors(tmp_path):
    """Where totals fit, too."""
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    change_index(folder, False, samples=left_out, totals=lambda _: {})
    with pytest.raises(UserError, match=rf"index.json: samples are missing.*0\..*{AGAIN}"):
        read_sample(open_features(folder), 0)


def test_sample_that_is_listed_twice_is_refused(tmp_path):
    """Where totals fit, too."""
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    change_index(folder, False, samples=doubled, totals=lambda _: {})
    with pytest.raises(UserError, match=rf"samples\[1\].key is '0': another sample.*{AGAIN}"):
        open_features(folder)


@pytest.mark.parametrize("name", ["../a/shard-00000.safetensors", "{}", "..", "a\nb", "x/../y"])
def test_shard_outside_of_the_folder_is_refused(tmp_path, name):
    folder = write_folder(tmp_path / "a", [random_sample(6, i) for i in range(2)])
    name = name.format(folder / "shard-00000.safetensors")
    change_index(
        folder,
        False,
        shards=lambda shards: [shards[0] | {"file": name}],
        samples=lambda samples: [entry | {"shard": name} for entry in samples],
    )
    with pytest.raises(UserError, match=rf"shards\[0\].file is .*must be the name.*{AGAIN}") as it:
        open_features(folder)
    assert "\n" not in str(it.value)


def lacking(key):
    return lambda entry: {name: value for name, value in entry.items() if name != key}


def having(**changes):
    return lambda entry: entry | changes


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        ("samples", lacking("id"), r"samples\[0\].id is missing"),
        ("samples", lacking("key"), r"samples\[0\].key is missing"),
        ("samples", lacking("shard"), r"samples\[0\].shard is missing"),
        ("samples", lacking("length"), r"samples\[0\].length is missing"),
        ("samples", having(key=3), r"samples\[0\].key is 3: must be a str"),
        ("samples", having(length="6"), r"samples\[0\].length is '6': must be a int"),
        ("samples", having(length=True), r"samples\[0\].length is True"),
        ("samples", having(shard="x"), r"samples\[0\].shard is 'x': must be one of its shards"),
        ("samples", having(supervised="x"), r"samples\[0\].supervised is 'x': must be a int"),
        ("samples", having(tokens=3), r"samples\[0\].tokens is 3: must be a str"),
        ("samples", lambda _: 7, r"samples\[0\] is 7: must be a dict"),
        ("shards", lacking("file"), r"shards\[0\].file is missing"),
        ("shards", lacking("bytes"), r"shards\[0\].bytes is missing"),
        ("shards", lacking("sha256"), r"shards\[0\].sha256 is missing"),
        ("shards", having(file=None), r"shards\[0\].file is None: must be a str"),
    ],
)
def test_bad_entry_of_the_index_is_refused(tmp_path, place, change, named):
    path = as_schema_1(write_folder(tmp_path, [GOOD]))
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {place: [change(index[place][0])]}))
    with pytest.raises(UserError, match=f"index.json: {named}.*{AGAIN}"):
        open_features(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", {"a": 1}),
        ("shards", "all"),
        ("target", []),
        ("target", {"name": "x"}),
        ("dtype", 3),
    ],
)
def test_field_of_a_wrong_type_in_the_index_is_refused(tmp_path, key, value):
    path = as_schema_1(write_folder(tmp_path, [GOOD]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"index.json: {key}.*{AGAIN}"):
        open_features(tmp_path, vocab_size=50)


# The samples' table


def change_table(folder, file="samples.safetensors", **columns):
    """Change columns of the table (None: leave one out), and the hashes that are of it."""
    table = folder / file
    tensors = load_file(table)
    for name, column in columns.items():
        tensors[name.replace("_ends", ".ends")] = column
    kept = {name: torch.as_tensor(column) for name, column in tensors.items() if column is not None}
    save_file(kept, table)
    match(table)


WHOLE = {"id": "row0", "key": "0", "shard": "shard-00000.safetensors", "length": 6}


ENTRIES = st.tuples(st.text(), st.integers(1, 99), st.booleans(), st.booleans())


@given(st.lists(st.lists(ENTRIES, max_size=4), min_size=1, max_size=5).filter(any))
@settings(max_examples=20, deadline=None)
def test_table_gives_back_every_entry_in_both_schemas(tmp_path_factory, shards):
    """Ids of any text, shards without a sample, numbers and digests that older folders lack."""
    folder = tmp_path_factory.mktemp("table")
    sidecars = []
    for number, samples in enumerate(shards):
        entries = []
        for key, (name, length, supervised, digest) in enumerate(samples):
            entry = {"id": name, "key": str(key), "length": length}
            entry |= {"supervised": length // 2} if supervised else {}
            entry |= {"tokens": f"{length:016x}"} if digest else {}
            entries.append(entry)
        sidecars.append({"file": f"s{number}", "bytes": 0, "sha256": "", "samples": entries})
    files = [sidecar["file"] for sidecar in sidecars]
    counts = [len(sidecar["samples"]) for sidecar in sidecars]
    record = write_table(folder, columns_of(all_entries(sidecars)))
    found = read_table(folder, record, files, counts)

    expected = [
        entry | {"shard": sidecar["file"]} for sidecar in sidecars for entry in sidecar["samples"]
    ]
    assert list(found) == expected == found[:]
    assert found[-1] == expected[-1]
    assert found.lengths.tolist() == [entry["length"] for entry in expected]
    for number, sidecar in enumerate(sidecars):
        own = [expected[sample] for sample in found.of_shard(number)]
        assert [entry["key"] for entry in own] == [entry["key"] for entry in sidecar["samples"]]
        assert all(found.shard_of(sample) == number for sample in found.of_shard(number))
    with pytest.raises(IndexError):
        found[len(expected)]


def test_folder_of_schema_1_opens_as_before(tmp_path):
    samples = [random_sample(4 + i, i) for i in range(7)]
    new = open_features(write_folder(tmp_path, samples))
    entries = list(new.samples)
    assert entries[0] == {**WHOLE, "length": 4, "supervised": int(samples[0].token_mask.sum())}
    as_schema_1(tmp_path)
    old = open_features(tmp_path)
    assert list(old.samples) == entries
    assert old.index["schema"] == 1
    check_shards(old)
    for number, sample in enumerate(samples):
        assert same(read_sample(old, number), sample)


def test_the_same_samples_have_the_same_bytes(tmp_path):
    samples = [random_sample(4 + i, i) for i in range(7)]
    for name in ("one", "two"):
        write_folder(tmp_path / name, samples)
    for file in ("samples.safetensors", "index.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damaged_table_is_named(tmp_path, damage):
    table = write_folder(tmp_path, [GOOD]) / "samples.safetensors"
    if damage == "missing":
        table.unlink()
    elif damage == "truncated":
        table.write_bytes(table.read_bytes()[:-3])
    else:
        change_last_byte(table)
    with pytest.raises(UserError, match=rf"samples.safetensors: .*(bytes|changed).*{AGAIN}"):
        open_features(tmp_path)


ONE = np.array([1])


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"length": None}, "length is missing"),
        ({"more": ONE}, "more is no column"),
        ({"length": np.array([6, 6])}, r"length is \(2,\) torch.int64, must be \(1,\) torch.int64"),
        ({"supervised": np.array([1.0])}, "supervised is .* torch.float64"),
        ({"key": np.array([[1]], np.uint8)}, r"key is \(1, 1\).*must be \(bytes,\) torch.uint8"),
        ({"id_ends": np.array([9])}, "id.ends are not the ends of its texts"),
        ({"id_ends": np.array([-1])}, "id.ends are not the ends of its texts"),
        ({"id": np.full(4, 255, np.uint8)}, "the id of sample 0 is no text"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, named):
    """By somebody who writes the hashes too."""
    change_table(write_folder(tmp_path, [GOOD]), **columns)
    with pytest.raises(UserError, match=rf"samples.safetensors: {named}.*{AGAIN}"):
        read_sample(open_features(tmp_path), 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"table": None}, "table is missing"),
        ({"table": 3}, "table is 3: must be a dict"),
        ({"table": {"file": "../x", "bytes": 1, "sha256": ""}}, r"table.file is '../x': must be"),
        ({"table": {"file": "samples.safetensors", "bytes": 1}}, "table.sha256 is missing"),
        ({"shards": [{"file": "a", "bytes": 0, "sha256": ""}]}, r"shards\[0\].samples is missing"),
        ({"totals": {"tokens": 7}}, "totals.tokens is 7, but 6 are listed"),
        ({"max_length": 7}, "has been changed since it was written"),
    ],
)
def test_bad_index_of_a_table_is_refused(tmp_path, change, named):
    path = write_folder(tmp_path, [GOOD]) / "index.json"
    tree = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(UserError, match=f"index.json: {named}.*{AGAIN}"):
        open_features(tmp_path)


def test_key_that_the_table_has_twice_is_refused_with_its_shard(tmp_path):
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(2)])
    change_table(folder, key=np.frombuffer(b"00", np.uint8).copy())
    with pytest.raises(UserError, match=rf"index.json: samples\[1\].key is '0': another.*{AGAIN}"):
        read_sample(open_features(folder), 1)


def test_opening_makes_no_entry(tmp_path, monkeypatch):
    """What a million samples would take long for."""
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    made = []
    make = SampleTable.__getitem__
    monkeypatch.setattr(SampleTable, "__getitem__", lambda *at: made.append(at[1]) or make(*at))
    opened = open_features(folder)
    assert made == []
    read_sample(opened, 4)
    assert set(made) == {3, 4}  # of its own shard


# The target that features were made with


def test_sizes_of_another_target_are_refused(tmp_path):
    write_folder(tmp_path, [GOOD])
    refusal = r"index.json: made with target 'tiny', vocab_size 50, not 60"
    with pytest.raises(UserError, match=refusal):
        open_features(tmp_path, vocab_size=60)
    with pytest.raises(UserError, match=r"hidden_size 4, not 8"):
        open_features(tmp_path, hidden_size=8)


def test_features_of_another_configuration_or_other_layers_are_refused(tmp_path):
    more = {"config_hash": "a" * 64, "aux_layers": [1, 2, 4]}
    change_index(write_folder(tmp_path, [GOOD]), False, target=lambda target: target | more)
    opened = open_features(tmp_path)
    check_made_for(opened, ["c" * 64, "a" * 64], (1, 2, 4), "the run")
    refusal = rf"index.json: .*config_hash a{{12}}.*the run.*b{{12}}.*{AGAIN}"
    with pytest.raises(UserError, match=refusal):
        check_made_for(opened, ["b" * 64], (1, 2, 4), "the run")
    refusal = rf"index.json: .*aux_layers \[1, 2, 4\].*the run.*\[0, 2, 4\].*{AGAIN}"
    with pytest.raises(UserError, match=refusal):
        check_made_for(opened, ["c" * 64, "a" * 64], (0, 2, 4), "the run")


RECORD = {"dtype": "float32", "embed_tokens": "a", "head": "b", "norm": "c"}


def test_record_of_the_targets_tensors_is_read_and_checked(tmp_path):
    path = write_folder(tmp_path, [GOOD]) / "index.json"
    assert tensors_of(open_features(tmp_path)) is None
    index = json.loads(path.read_text())
    del index["sha256"]
    for record, what in (
        (RECORD, None),
        (RECORD | {"dtype": "nix"}, "target.tensors.dtype is 'nix'"),
        (RECORD | {"head": 3}, "target.tensors.head is 3"),
        ([], r"target.tensors is \[\]"),
    ):
        index["target"]["tensors"] = record
        path.write_text(json.dumps(index))
        if what is None:
            assert tensors_of(open_features(tmp_path)) == record
            continue
        with pytest.raises(UserError, match=rf"index.json: {what}.*{AGAIN}"):
            open_features(tmp_path)


def test_index_without_configuration_and_layers_passes(tmp_path):
    opened = open_features(write_folder(tmp_path, [GOOD]))
    check_made_for(opened, ["abc"], [1, 2, 4], "the run")


# A folder without an index, and its reader


TOY = Reader(
    files=".toy",
    find=lambda folder: sorted(folder.glob("*.toy")),
    sample=lambda path: GOOD._replace(**load_file(path)),
    tokens=lambda path: GOOD._replace(**load_file(path))[:2],
)


def write_toy(path, **changes):
    save_file({"input_ids": GOOD.input_ids, **changes}, path)


def test_folder_without_an_index_is_read_by_the_given_reader(tmp_path):
    write_toy(tmp_path / "b.toy")
    write_toy(tmp_path / "a.toy", input_ids=GOOD.input_ids.flip(0))
    opened = open_features(tmp_path, vocab_size=50, hidden_size=4, reader=TOY)
    assert [entry["shard"] for entry in opened.samples] == ["a.toy", "b.toy"]
    assert same(read_sample(opened, 1), GOOD)
    assert same(read_tokens(opened, 0), (GOOD.input_ids.flip(0), GOOD.token_mask))
    check_shards(opened)
    check_made_for(opened, ["abc"], (1, 2, 3), "the run")
    assert int(count_tokens(opened, [0, 1]).sum()) == 2 * int(GOOD.token_mask.sum())


def test_what_the_reader_returns_is_checked(tmp_path):
    write_toy(tmp_path / "a.toy", last_hidden=NAN)
    opened = open_features(tmp_path, reader=TOY)
    refusal = r"a.toy: sample 'a.toy': last_hidden holds NaN.*delete the file or write it anew"
    with pytest.raises(UserError, match=refusal):
        read_sample(opened, 0)
    with pytest.raises(UserError, match=r"a.toy: .*aux_hidden \(6, 12\)"):
        read_sample(open_features(tmp_path, hidden_size=8, reader=TOY), 0)
    with pytest.raises(UserError, match=r"a.toy: .*token id"):
        read_tokens(open_features(tmp_path, vocab_size=1, reader=TOY), 0)


def test_vocabulary_size_must_be_given_where_no_index_holds_it(tmp_path):
    write_toy(tmp_path / "a.toy")
    opened = open_features(tmp_path, reader=TOY)
    with pytest.raises(UserError, match=r"no vocabulary size; name the target"):
        count_tokens(opened, [0])
    assert len(count_tokens(opened, [0], vocab_size=50)) == 50


def test_index_is_read_where_there_is_one_whatever_the_reader(tmp_path):
    write_folder(tmp_path, [GOOD])
    write_toy(tmp_path / "a.toy")
    opened = open_features(tmp_path, reader=TOY)
    assert opened.reader is None
    assert same(read_sample(opened, 0), GOOD)


@pytest.mark.parametrize(
    ("reader", "looked_for"), [(None, "no index.json"), (TOY, "no index.json and no .toy")]
)
def test_folder_without_samples_is_refused_with_what_was_looked_for(tmp_path, reader, looked_for):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"empty: {looked_for} there; {AGAIN} or name another"):
        open_features(tmp_path / "empty", reader=reader)


@pytest.mark.parametrize("reader", [None, TOY])
def test_what_is_no_folder_of_features_is_said_to_be_none(tmp_path, reader):
    with pytest.raises(UserError, match=rf"absent: no such folder; {AGAIN} or name another"):
        open_features(tmp_path / "absent", reader=reader)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match="file: is a file, no feature folder; "):
        open_features(tmp_path / "file", reader=reader)


def test_totals_that_are_no_object_are_refused(tmp_path):
    folder = write_folder(tmp_path, [random_sample(6, 0)])
    change_index(folder, False, totals=lambda _: 10**30)
    with pytest.raises(UserError, match=r"index.json: totals is 10+: must be a dict"):
        open_features(folder)
