"""Checkpoints in one process: what is read back, ignored, refused. For several ranks see `ranks_job`, `faults_job`."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import eagle3fn as e3
from eagle3fn.base.tree import equal
from eagle3fn.train.checkpoint import checkpoints, digest_of, load_checkpoint, save_checkpoint
from tests.small import batch_of, config_of, frozen_of

DATA = {"features": "a", "vocabulary map": "b"}


@pytest.fixture
def saved(tmp_path):
    """A configuration, a state after one step, and its checkpoint."""
    config = replace(
        config_of("bfloat16"), train=replace(config_of("bfloat16").train, reduce="tree")
    )
    fns = e3.bind(config, frozen_of(config))
    state, _ = fns.step(fns.init_state(fns.init(0)), batch_of(1, (6, 4)))
    torch.manual_seed(5)
    path = save_checkpoint(tmp_path, state, config, DATA, {"best": 1.5}, 2)
    return config, state, path


def template(config):
    return e3.init_state(e3.init_params(config.draft, 1, torch.bfloat16, "cpu"), config=config)


def change(path, **values):
    meta = json.loads((path / "meta.json").read_text()) | values
    (path / "meta.json").write_text(json.dumps(meta | {"digest": digest_of(meta)}))


def test_the_whole_state_comes_back(saved):
    config, state, path = saved
    wanted = torch.rand(3)
    found = load_checkpoint(path, template(config), config, DATA)
    assert equal(found.state, state)
    assert found.extra == {"best": 1.5}
    torch.set_rng_state(found.rng)
    assert torch.equal(torch.rand(3), wanted)
    draft = load_file(path / "draft.safetensors")
    assert equal(draft, dict(state.params))


def test_newest_are_kept_and_half_written_ones_ignored(saved, tmp_path):
    config, state, path = saved
    for number in (2, 3):
        save_checkpoint(tmp_path, state._replace(step=torch.tensor(number)), config, DATA, {}, 2)
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
    ],
)
def test_others_are_refused(saved, values, message):
    config, _, path = saved
    change(path, **values)
    with pytest.raises(e3.UserError, match=message):
        load_checkpoint(path, template(config), config, DATA)


def test_threads_matter_to_the_tree_alone(saved):
    config, state, path = saved
    config = replace(config, train=replace(config.train, reduce="sum"))
    again = save_checkpoint(path.parent / "sum", state, config, DATA, {}, 1)
    change(again, threads=7)
    assert equal(load_checkpoint(again, template(config), config, DATA).state, state)


def test_a_flipped_bit_and_another_configuration_are_refused(saved):
    config, _, path = saved
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(e3.UserError, match=r"optimizer\.learning_rate was 0\.01, is 0\.5"):
        load_checkpoint(path, template(config), other, DATA)
    file = next(path.glob("__0_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(e3.UserError, match=r"damaged.*have changed.*delete"):
        load_checkpoint(path, template(config), config, DATA)


def test_what_stands_beside_the_state_is_whole_or_refused(saved):
    config, _, path = saved
    text = (path / "meta.json").read_text()
    wanted = {"schema", "config", "cursor", "rng", "world", "threads", "data"}
    assert wanted <= json.loads(text).keys()
    assert json.loads(text)["cursor"] == {"step": 1, "samples": 1, "seed": 0}
    changed = [text.replace('"best": 1.5', '"best": 1.7'), text.replace('"rng"', '"rnd"')]
    for damaged in (*changed, "", text[:100], "[]", "{}", '"schema"'):
        (path / "meta.json").write_text(damaged)
        with pytest.raises(
            e3.UserError, match=r"damaged \(.*meta\.json.*delete .* to resume from an older one"
        ):
            load_checkpoint(path, template(config), config, DATA)
