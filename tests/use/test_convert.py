"""Maps and features of other trainers, both ways; nothing but older output is replaced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eagle3fn as e3
from eagle3fn.base.errors import UserError
from eagle3fn.cli import main
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.target import load_target
from eagle3fn.data.vocab import build_map, load_map, save_map
from eagle3fn.specforge.feature_files import READER
from tests.factories import random_sample, tiny_model, tiny_tokenizer, write_folder

VOCAB, HIDDEN = 300, 16  # of `tiny_model`
MAP = build_map(torch.tensor([0, 3, 0, 2, 9, 1]), 3)


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


# Vocabulary maps


def test_maps_go_to_every_kind_and_back(tmp_path):
    ours = tmp_path / "ours"
    save_map(ours, MAP, {"target": "t", "target_hash": "h"})
    for kind, out in (("specforge", tmp_path / "a.pt"), ("speculators", tmp_path / "npy")):
        assert convert("--vocab", ours, "--out", out, "--for", kind) == 0
        back = tmp_path / f"back-{kind}"
        assert convert("--vocab", out, "--out", back) == 0
        assert all(map(torch.equal, load_map(back), MAP))

    # SpecForge's file as it loads it; speculators' two as it does.
    tree = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(tree["d2t"], MAP.d2t) and torch.equal(tree["t2d"], MAP.t2d)
    d2t, t2d = (np.load(tmp_path / "npy" / f"{name}.npy") for name in ("d2t", "t2d"))
    assert (d2t.dtype, t2d.dtype) == (np.int64, np.bool_)
    assert d2t.tolist() == MAP.d2t.tolist() and t2d.tolist() == MAP.t2d.tolist()


def test_what_a_map_was_made_for_is_kept(tmp_path):
    ours = tmp_path / "ours"
    save_map(ours, MAP, {"target": "t", "target_hash": "h"})
    assert convert("--vocab", ours, "--out", tmp_path / "copy") == 0
    with pytest.raises(UserError, match="made for another target"):
        load_map(tmp_path / "copy", target_hash="other")


def test_the_map_of_a_draft_is_written(tmp_path):
    from tests.use.tiny_target import draft_config, random_draft, vocab_map

    draft = random_draft()
    frozen = e3.Frozen(None, torch.empty(0), *vocab_map())
    e3.export(draft.params, frozen, draft_config(), tmp_path / "draft", 6, torch.float32)
    assert convert("--vocab", tmp_path / "draft", "--out", tmp_path / "map") == 0
    assert all(map(torch.equal, load_map(tmp_path / "map"), vocab_map()))


def test_speculators_names_with_the_size_are_read(tmp_path):
    np.save(tmp_path / "d2t-3.npy", MAP.d2t.numpy())
    np.save(tmp_path / "t2d-3.npy", MAP.t2d.numpy())
    assert convert("--vocab", tmp_path, "--out", tmp_path / "map") == 0
    assert all(map(torch.equal, load_map(tmp_path / "map"), MAP))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.mkdir(), "no d2t.npy with t2d.npy"),
        (lambda path: path.write_bytes(b"junk"), "damaged or not a vocabulary map"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_map_is_named(tmp_path, make, text, capsys):
    make(tmp_path / "map")
    assert convert("--vocab", tmp_path / "map", "--out", tmp_path / "out") == 2
    assert text in capsys.readouterr().err


def test_only_an_older_map_is_replaced(tmp_path, capsys):
    save_map(tmp_path / "ours", MAP, {})
    draft = tmp_path / "model.safetensors"
    save_file({"d2t": MAP.d2t, "t2d": MAP.t2d, "fc.weight": torch.ones(2)}, draft)
    words = ("--vocab", tmp_path / "ours", "--out")
    assert convert(*words, draft) == 2  # weights that have a map too
    assert "no older map" in capsys.readouterr().err

    folder = tmp_path / "npy"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    assert convert(*words, folder, "--for", "speculators") == 2
    (folder / "thesis.txt").unlink()
    for _ in range(2):
        assert convert(*words, folder, "--for", "speculators") == 0
        assert convert(*words, tmp_path / "copy") == 0


# Features


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_model(num_hidden_layers=7).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_features_go_to_specforge_and_back(tmp_path, target):
    """In the samples' order, also beyond ten and beyond a shard."""
    samples = [random_sample(3 + i % 5, i, VOCAB, HIDDEN) for i in range(70)]
    ours = write_folder(tmp_path / "ours", samples, VOCAB, HIDDEN)
    assert convert("--features", ours, "--out", tmp_path / "ckpt", "--for", "specforge") == 0
    theirs = open_features(tmp_path / "ckpt", VOCAB, HIDDEN, READER)
    words = ("--features", tmp_path / "ckpt", "--out", tmp_path / "back", "--target", target)
    assert convert(*words) == 0
    back = open_features(tmp_path / "back", VOCAB, HIDDEN)
    for number, sample in enumerate(samples):
        assert all(map(torch.equal, read_sample(theirs, number), sample))
        assert all(map(torch.equal, read_sample(back, number), sample))
    assert len(back.samples) == len(theirs.samples) == len(samples)
    assert back.index["target"]["config_hash"]
    assert len(back.index["shards"]) == 2


def test_files_hold_no_more_than_their_sample(tmp_path):
    """Not the shard that a sample's tensors are parts of."""
    samples = [random_sample(8, i, VOCAB, HIDDEN) for i in range(3)]
    ours = write_folder(tmp_path / "ours", samples, VOCAB, HIDDEN)
    assert convert("--features", ours, "--out", tmp_path / "ckpt", "--for", "specforge") == 0
    sizes = {file.stat().st_size for file in (tmp_path / "ckpt").iterdir()}
    assert max(sizes) < 8 * HIDDEN * 4 * 2 + 8 * 16 + 4096


def test_a_damaged_sample_leaves_nothing(tmp_path, target, capsys):
    sample = random_sample(5, 0, VOCAB, HIDDEN)
    good = {
        "input_ids": sample.input_ids,
        "loss_mask": sample.token_mask,
        "aux_hidden_state": sample.aux_hidden[None],
        "hidden_state": sample.last_hidden[None],
    }
    folder = tmp_path / "ckpt"
    folder.mkdir()
    torch.save(good, folder / "a.ckpt")
    torch.save(
        good | {"hidden_state": torch.full_like(sample.last_hidden, torch.nan)}, folder / "b.ckpt"
    )
    words = ("--features", folder, "--out", tmp_path / "out", "--target", target)
    assert convert(*words) == 2
    assert "NaN" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt"]


def test_samples_of_two_dtypes_are_refused(tmp_path, target, capsys):
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        sample = random_sample(5, 0, VOCAB, HIDDEN)
        tree = {"input_ids": sample.input_ids, "loss_mask": sample.token_mask}
        tree |= {"aux_hidden_state": sample.aux_hidden.to(dtype)[None]}
        tree |= {"hidden_state": sample.last_hidden.to(dtype)[None]}
        (tmp_path / "ckpt").mkdir(exist_ok=True)
        torch.save(tree, tmp_path / f"ckpt/{name}.ckpt")
    words = ("--features", tmp_path / "ckpt", "--out", tmp_path / "out", "--target", target)
    assert convert(*words) == 2
    assert "convert the folders of each dtype apart" in capsys.readouterr().err


def test_a_folder_that_is_there_is_not_written_into(tmp_path, capsys):
    samples = [random_sample(5, 0, VOCAB, HIDDEN)]
    ours = write_folder(tmp_path / "ours", samples, VOCAB, HIDDEN)
    assert convert("--features", ours, "--out", ours, "--for", "specforge") == 2
    assert "would replace it; name another" in capsys.readouterr().err

    # A link that leads to itself is no place.
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert convert("--features", ours, "--out", loop, "--for", "specforge") == 2
    assert capsys.readouterr().err.startswith(f"eagle3fn convert: {loop}")

    # Nor into a stranger's.
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    assert convert("--features", ours, "--out", tmp_path / "letters", "--for", "specforge") == 2
    assert "holds one.txt, and only what eagle3fn wrote" in capsys.readouterr().err
    assert (tmp_path / "letters" / "one.txt").read_text() == "dear"
    assert len(open_features(ours).samples) == 1


# speculators' hidden states


def write_speculators(folder: Path, count: int, states: int = 4) -> list[dict[str, torch.Tensor]]:
    """Its data: rows as `datasets` saves them, and a file of states for each; they are returned."""
    from datasets import Dataset

    source = torch.Generator().manual_seed(3)
    rows, files = [], []
    for i in range(count):
        ids = torch.randint(VOCAB, (4 + i,), generator=source)
        mask = torch.randint(2, (4 + i,), generator=source)
        rows.append({"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "seq_len": len(ids)})
        hidden = torch.randn(4 + i, states, HIDDEN, generator=source).bfloat16()
        files.append({"token_ids": ids, "hidden_states": hidden, "mask": mask})
    Dataset.from_list(rows).save_to_disk(str(folder))
    (folder / "hidden_states").mkdir()
    for i, tree in enumerate(files):
        kept = {name: value for name, value in tree.items() if name != "mask"}
        save_file(kept, folder / f"hidden_states/hs_{i}.safetensors")
    return files


def test_speculators_states_become_features_with_the_targets_norm(tmp_path, target):
    """In the order of the rows, where a file's name sorts otherwise; its norm is the target's."""
    files = write_speculators(tmp_path / "data", 12)
    words = ("--features", tmp_path / "data", "--out", tmp_path / "ours", "--target", target)
    assert convert(*words) == 0
    found = open_features(tmp_path / "ours", VOCAB, HIDDEN)
    model, _ = load_target(target, torch.float32)
    assert len(found.samples) == len(files)
    for number, tree in enumerate(files):
        sample = read_sample(found, number)
        assert torch.equal(sample.input_ids, tree["token_ids"])
        assert torch.equal(sample.token_mask, tree["mask"])
        assert torch.equal(sample.aux_hidden, tree["hidden_states"][:, :3].flatten(1))
        last = model.model.norm(tree["hidden_states"][:, 3].float())
        assert torch.equal(sample.last_hidden, last.bfloat16())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"token_ids": torch.zeros(4, dtype=torch.int64)}, "not those of its row"),
        ({"hidden_states": torch.zeros(4, 3, HIDDEN)}, "three taps and the last layer's output"),
    ],
)
def test_states_of_other_rows_or_layers_are_named(tmp_path, target, change, text, capsys):
    (tree,) = write_speculators(tmp_path / "data", 1)
    tree.pop("mask")
    save_file(tree | change, tmp_path / "data/hidden_states/hs_0.safetensors")
    words = ("--features", tmp_path / "data", "--out", tmp_path / "ours", "--target", target)
    assert convert(*words) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--target", "T", "--draft", "D", "--prompts", "P"),
        ("export", "--draft", "D", "--for", "vllm", "--target", "T"),
        ("convert", "--draft", "D"),
        ("convert", "--vocab", "V"),
        ("convert", "--vocab", "V", "--for", "speculators"),
        ("convert", "--features", "F", "--target", "T"),
        ("convert", "--features", "F", "--for", "specforge"),
    ],
    ids=" ".join,
)
def test_the_place_of_the_output_is_checked_first(tmp_path, capsys, words):
    """Before anything is read: none of the other files are there."""
    out = tmp_path / "letters"
    out.mkdir()
    (out / "one.txt").write_text("dear")
    assert main([*words, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "letters: holds one.txt" in said or "letters: is a folder; name a file" in said
    assert main([*words, "--out", "/dev/null"]) == 2
    assert "/dev/null: is a device; name a" in capsys.readouterr().err
