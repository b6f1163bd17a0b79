"""Checkpoints in one process: what is read back, what is ignored, what is refused.

Those of several ranks are checked by `ranks_job` and `faults_job`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

import eagle3fn as e3
from eagle3fn.base.sections import Role
from eagle3fn.base.tree import equal
from eagle3fn.train import checkpoint
from eagle3fn.train.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from tests.train.saved_checkpoint import DATA, Saved, make_saved, other_state, rewrite_meta


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return make_saved(tmp_path)


def rewrite_as_older(path: Path, **data: str) -> None:
    """Give a checkpoint the settings that it had before recipes; `data` differ from the default."""
    meta = json.loads((path / "meta.json").read_text())
    config = meta["config"]
    config["data"] |= {"mask_alignment": "serving", "order": "shuffled"} | data
    config["optimizer"]["horizon"] = config["optimizer"].pop("schedule_steps")
    rewrite_meta(path, config=config)


def test_whole_state_comes_back(saved):
    expected = torch.rand(3)
    found = load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)
    assert equal(found.state, saved.state)
    assert found.extra == {"best": 1.5}

    # The random numbers go on where they were when the checkpoint was written.
    torch.set_rng_state(found.rng)
    assert torch.equal(torch.rand(3), expected)

    # The draft's parameters are there once more, for other programs.
    draft = load_file(saved.path / "draft.safetensors")
    assert equal(draft, dict(saved.state.params))


def test_state_is_read_into_the_leaves_given(saved):
    into = other_state(saved.config)
    found = load_checkpoint(saved.path, into, saved.config, DATA).state
    for name, leaf in found.params.items():
        assert leaf.data_ptr() == into.params[name].data_ptr(), name


def test_newest_checkpoints_are_kept_and_unfinished_ones_ignored(saved, tmp_path):
    config, state, path = saved
    for number in (2, 3):
        later = state._replace(step=torch.tensor(number))
        save_checkpoint(tmp_path, later, config, DATA, {}, keep=2)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".step-00000008.tmp").mkdir()
    assert [found.name for found in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert not path.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"schema": 1},
            "schema 1, this version reads 2; finish the run with the version that began it",
        ),
        ({"threads": 7}, "set OMP_NUM_THREADS=7"),
        ({"data": DATA | {"features": "other"}}, "written for other features"),
        ({"data": DATA | {"vocabulary map": "other"}}, "written for other vocabulary map"),
    ],
)
def test_checkpoint_of_another_run_is_refused(saved, values, message):
    rewrite_meta(saved.path, **values)
    with pytest.raises(e3.UserError, match=message):
        load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"recipe": "first"}, {"recipe": "second"}, r"another recipe \(first, now second\)"),
        ({"recipe": "first"}, {}, r"another recipe \(first, now none\)"),
        ({}, {"recipe": "second"}, r"another recipe \(none, now second\)"),
    ],
)
def test_checkpoint_of_another_recipe_is_refused_by_name(saved, before, now, message):
    rewrite_meta(saved.path, data=DATA | before)
    with pytest.raises(e3.UserError, match=message):
        load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA | now)
    found = load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA | before)
    assert equal(found.state, saved.state)


def test_thread_count_is_compared_under_the_tree_reduction_alone(saved):
    config = replace(saved.config, train=replace(saved.config.train, reduce="sum"))
    path = save_checkpoint(saved.path.parent / "sum", saved.state, config, DATA, {}, keep=1)
    rewrite_meta(path, threads=7)
    assert equal(load_checkpoint(path, other_state(config), config, DATA).state, saved.state)


def test_changed_setting_is_refused_by_name(saved):
    other = replace(saved.config, optimizer=replace(saved.config.optimizer, learning_rate=0.5))
    with pytest.raises(e3.UserError, match=r"optimizer\.learning_rate was 0\.01, is 0\.5.*back"):
        load_checkpoint(saved.path, other_state(other), other, DATA)


def test_settings_that_may_change_do(saved):
    train = replace(saved.config.train, checkpoint_every=7, keep_last=9, on_nonfinite="skip")
    other = replace(saved.config, train=train, data=replace(saved.config.data, prefetch=0))
    assert equal(load_checkpoint(saved.path, other_state(other), other, DATA).state, saved.state)


def test_checkpoint_with_older_names_of_settings_is_read(saved):
    rewrite_as_older(saved.path)
    found = load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)
    assert equal(found.state, saved.state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"order": "stored"}, r"data\.order was 'stored', a setting that is gone; go on .*--from"),
        ({"mask_alignment": "x"}, r"data\.mask_alignment was 'x', a setting that is gone"),
    ],
)
def test_checkpoint_with_another_value_of_a_removed_setting_is_refused(saved, data, message):
    rewrite_as_older(saved.path, **data)
    with pytest.raises(e3.UserError, match=message):
        load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)


def test_setting_that_the_checkpoint_does_not_have_has_its_default(saved):
    """So a new switch of the draft does not keep a run from being resumed."""
    config = json.loads((saved.path / "meta.json").read_text())["config"]
    assert config["draft"].pop("rms_norm_eps") == 1e-6
    assert config["optimizer"].pop("decay_roles") == list(get_args(Role))
    rewrite_meta(saved.path, config=config)
    found = load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)
    assert equal(found.state, saved.state)

    del config["optimizer"]["learning_rate"]
    rewrite_meta(saved.path, config=config)
    with pytest.raises(e3.UserError, match=r"learning_rate was 0\.0001, is 0\.01"):
        load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)


def test_schedule_span_under_its_older_name_is_compared(saved):
    optimizer = replace(saved.config.optimizer, schedule_steps=30)
    config = replace(saved.config, optimizer=optimizer)
    path = save_checkpoint(saved.path.parent / "span", saved.state, config, DATA, {}, keep=1)
    rewrite_as_older(path)
    assert equal(load_checkpoint(path, other_state(config), config, DATA).state, saved.state)
    with pytest.raises(e3.UserError, match=r"optimizer\.schedule_steps was 30, is 0"):
        load_checkpoint(path, other_state(config), saved.config, DATA)


def test_a_checkpoint_whose_removal_was_killed_is_none(saved, monkeypatch):
    """It vanishes at once: a part of it is never taken for a checkpoint."""
    folder = saved.path.parent
    assert checkpoints(folder) == [saved.path]
    later = saved.state._replace(step=saved.state.step + 1)
    removed = []
    monkeypatch.setattr(checkpoint, "_remove", removed.append)
    path = save_checkpoint(folder, later, saved.config, DATA, {}, keep=1)
    assert checkpoints(folder) == [path]
    assert removed[-1].exists()
    monkeypatch.undo()
    newest_checkpoint(folder)
    assert [found.name for found in folder.iterdir()] == [path.name]


def test_flipped_bit_is_refused(saved):
    file = next(saved.path.glob("__0_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(e3.UserError, match=r"damaged.*have changed.*delete"):
        load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)


def test_meta_holds_what_a_resume_needs(saved):
    meta = json.loads((saved.path / "meta.json").read_text())
    needed = {"schema", "config", "cursor", "rng", "world", "threads", "data"}
    assert needed <= meta.keys()
    assert meta["cursor"] == {"step": 1, "samples": 1, "seed": 0}


def test_damaged_meta_is_refused(saved):
    text = (saved.path / "meta.json").read_text()
    changed = [text.replace('"best": 1.5', '"best": 1.7'), text.replace('"rng"', '"rnd"')]
    message = r"damaged \(.*meta\.json.*delete .* to resume from an older one"
    for damaged in (*changed, "", text[:100], "[]", "{}", '"schema"'):
        (saved.path / "meta.json").write_text(damaged)
        with pytest.raises(e3.UserError, match=message):
            load_checkpoint(saved.path, other_state(saved.config), saved.config, DATA)
