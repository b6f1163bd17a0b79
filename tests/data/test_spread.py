"""Targets spread over several devices: `--device auto`, right or refused in one line."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eagle3fn.base import device as devices
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.cli import main
from eagle3fn.commands.extraction import _device
from eagle3fn.data import target_model
from eagle3fn.data.decoder import decoder, hidden_states
from eagle3fn.data.encode import encode_all
from eagle3fn.data.online import roll_out
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.target import load_target
from tests.factories import tiny_model, tiny_template, tiny_tokenizer, write_talks

accelerate = pytest.importorskip(
    "accelerate", reason="it spreads a target, and is not installed: pip install -e '.[demo]'"
)

LAYERS = (0, 1, 3)


@pytest.fixture
def folder(tmp_path):
    tiny_model(num_hidden_layers=5).save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path


def extract_line(folder, *more):
    line = ["extract", "--target", folder / "target", "--out", folder / "out"]
    line += ["--conversations", write_talks(folder / "c.jsonl", 2), *more]
    return [str(word) for word in line]


class Layer(nn.Module):
    """A layer on a device, which brings its input there."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def forward(self, states):
        return states.to(self.device) + 1


class Spread(nn.Module):
    """A decoder whose later layers are on another device."""

    def __init__(self, *places):
        super().__init__()
        self.layers = nn.ModuleList(Layer(place) for place in places)

    def forward(self, input_ids, attention_mask, use_cache):
        states = input_ids[..., None].expand(-1, -1, 4).float()  # (B, S, Ht)
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(last_hidden_state=states)


def test_states_of_layers_on_several_devices_come_to_the_last_ones():
    ids = torch.ones(2, 3, dtype=torch.int64)
    aux, last = hidden_states(Spread("cpu", "cpu", "meta"), ids, ids, (0, 2))
    assert (aux.device.type, last.device.type) == ("meta", "meta")
    assert aux.shape == (2, 3, 8) and last.shape == (2, 3, 4)


def test_a_spread_target_gives_the_features_of_the_target_on_one_device(folder, monkeypatch):
    """By accelerate's hooks around every layer; the devices are one here, the CPU."""
    monkeypatch.setattr(target_model, "check_spread", lambda: "cpu")
    spread, _ = load_target(folder / "target", torch.float32, "auto")
    names = [f"model.layers.{number}" for number in range(5)]
    names += ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    spread = accelerate.dispatch_model(spread, dict.fromkeys(names, "cpu"), force_hooks=True)
    assert hasattr(decoder(spread).layers[2], "_hf_hook")

    model, _ = load_target(folder / "target", torch.float32)
    talks = write_talks(folder / "c.jsonl", 3)
    rows = encode_all(SampleMaker(tiny_template(), 90), talks, 300)
    for found, expected in zip(
        roll_out(spread, rows, LAYERS), roll_out(model, rows, LAYERS), strict=True
    ):
        assert torch.equal(found.aux_hidden, expected.aux_hidden)
        assert torch.equal(found.last_hidden, expected.last_hidden)


def test_a_target_that_the_cards_have_no_room_for_is_refused(folder, monkeypatch):
    monkeypatch.setattr(target_model, "check_spread", lambda: "cuda")
    load_weights = target_model.load_weights

    def offloaded(*arguments):
        model, loading = load_weights(*arguments[:3])
        model.model.layers[3].to("meta")
        return model, loading

    monkeypatch.setattr(target_model, "load_weights", offloaded)
    with pytest.raises(UserError, match=r"layers.3.* offloaded .*spread over more") as it:
        load_target(folder / "target", torch.float32, "auto")
    assert "\n" not in str(it.value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a card")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1", "meta", "gpu", "0"])
def test_devices_that_are_not_there_are_refused_in_one_line(folder, capfd, name):
    """Before anything is loaded or written."""
    assert main(extract_line(folder, "--device", name)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"eagle3fn extract: device {name!r}: ") and "; name cpu" in line
    assert not (folder / "out").exists()


def test_spreading_without_accelerate_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'auto': needs accelerate; pip install accelerate, or"):
        devices.check_spread()


@pytest.mark.parametrize("name", ["auto", "cuda:0"])
def test_one_device_for_several_ranks_is_refused(name):
    options = SimpleNamespace(device=name)
    with pytest.raises(UserError, match=rf"--device = '{name}' on 2 ranks: .*--device=cuda"):
        _device(options, World(rank=1, size=2))


def test_ranks_with_an_engine_are_refused_in_one_line(folder, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = extract_line(folder, "--engine", "vllm", "--engine-python", "python")
    assert main(line) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--engine vllm: an engine spreads by itself; start one process" in line
    assert "--engine-arg tensor_parallel_size=2" in line


def test_features_that_do_not_fit_the_disk_are_refused_before_the_target_runs(
    folder, capfd, monkeypatch
):
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr("eagle3fn.data.feature_size.shutil.disk_usage", lambda path: free)
    line = extract_line(folder, "--aux-layers", "0,1,3", "--max-length", 90)
    assert main(line) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert "MiB of features are to be written, 0.0 MiB are free on the disk; make room" in last
    assert not (folder / "out").exists()

    # Shards that are there need no room.
    monkeypatch.undo()
    assert main(line) == 0
    monkeypatch.setattr("eagle3fn.data.feature_size.shutil.disk_usage", lambda path: free)
    assert main(line) == 0
    assert "0.0 MiB of it there" in capfd.readouterr().out
