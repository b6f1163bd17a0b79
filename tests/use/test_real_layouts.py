"""Folders written for engines and loaded by them; what these write, read by ours."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import eagle3fn as e3
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.tree import equal
from eagle3fn.cli import main
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.target import load_target
from eagle3fn.model.rope import rope_table
from eagle3fn.train.foreign_drafts import read_foreign
from eagle3fn.use.decode import speculate
from tests.factories import make_map, tiny_tokenizer
from tests.serving import python_of, source_of

pytestmark = pytest.mark.engines

VOCAB, HIDDEN, LAYERS, DRAFT_VOCAB = 300, 128, 8, 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: vLLM has none of 16 on a CPU."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=192,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_draft(target: Path, out: Path, engine: str, **changes: Any) -> Path:
    """A random draft, exported and then written for an engine; its folder."""
    tree = json.loads((target / "config.json").read_text())
    config = draft_config_from_target(tree, "target", DRAFT_VOCAB)
    config = e3.DraftConfig(**{**vars(config), "aux_layers": (1, 3, 4), **changes})
    params = e3.init_params(config, 3, torch.float32)
    vocab = make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(2))
    embed = load_target(target, torch.float32)[0].get_input_embeddings().weight.detach()
    frozen = e3.Frozen(embed, torch.empty(0), *vocab)
    e3.export(params, frozen, config, out / "draft", LAYERS, torch.float32, any_rope=True)
    words = ["export", "--draft", out / "draft", "--out", out / engine, "--for", engine]
    assert main([*map(str, words), "--target", str(target)]) == 0
    return out / engine


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """By our names."""
    stored = load_file(folder / "model.safetensors")
    return {name.replace("layers.0.", "midlayer."): value for name, value in stored.items()}


def run(engine: str, code: str, *arguments: object) -> str:
    """A program in the engine's environment; what it prints."""
    command = [python_of(engine), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# speculators


LOAD = """
import sys
from safetensors.torch import save_file
from speculators import SpeculatorModel
model = SpeculatorModel.from_pretrained(sys.argv[1])
state = {name: value.contiguous() for name, value in model.state_dict().items()}
save_file(state, sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


@pytest.mark.parametrize("engine", ["speculators", "vllm"])
def test_speculators_loads_what_is_written_and_ours_reads_what_it_saves(target, tmp_path, engine):
    folder = write_draft(target, tmp_path, engine)
    run("speculators", LOAD, folder, tmp_path / "state", tmp_path / "saved")
    ours = tensors_of(folder)
    state = load_file(tmp_path / "state")
    theirs = {name.replace("layers.0.", "midlayer."): value for name, value in state.items()}
    assert equal({name: theirs[name] for name in ours}, ours)

    found = read_foreign(tmp_path / "saved")
    given = e3.load_draft(folder, torch.float32)
    assert found.origin == "speculators"
    assert equal(found.draft.params, given.params)
    assert equal(found.draft.vocab._asdict(), given.vocab._asdict())
    names = ("hidden_size", "head_dim", "rms_norm_eps", "rope_theta", "rope_type", "aux_layers")
    for name in names:
        assert getattr(found.draft.config, name) == getattr(given.config, name), name


DATA = """
import sys
from safetensors.torch import save_file
from speculators.train.data import ArrowDataset
data = ArrowDataset(1024, sys.argv[1], on_missing="raise")
for i in range(len(data)):
    sample = data[i]
    names = ("input_ids", "loss_mask", "hidden_states", "verifier_last_hidden_states")
    save_file({name: sample[name].contiguous() for name in names}, f"{sys.argv[2]}-{i}")
"""


def test_features_of_speculators_are_those_that_its_loader_gives(target, tmp_path):
    from datasets import Dataset

    source = torch.Generator().manual_seed(3)
    ids = [torch.randint(VOCAB, (6 + i,), generator=source) for i in range(3)]
    rows = [{"input_ids": x.tolist(), "loss_mask": [1] * len(x), "seq_len": len(x)} for x in ids]
    Dataset.from_list(rows).with_format("torch").save_to_disk(str(tmp_path / "data"))
    (tmp_path / "data/hidden_states").mkdir()
    for i, x in enumerate(ids):
        states = torch.randn(len(x), 4, HIDDEN, generator=source).bfloat16()
        path = tmp_path / f"data/hidden_states/hs_{i}.safetensors"
        save_file({"token_ids": x, "hidden_states": states}, path)

    words = ["convert", "--features", tmp_path / "data", "--out", tmp_path / "ours"]
    assert main([*map(str, words), "--target", str(target)]) == 0
    run("speculators", DATA, tmp_path / "data", tmp_path / "read")
    features = open_features(tmp_path / "ours", VOCAB, HIDDEN)
    norm = load_target(target, torch.float32)[0].model.norm
    for i in range(len(ids)):
        theirs = load_file(f"{tmp_path}/read-{i}")
        ours = read_sample(features, i)
        assert torch.equal(ours.input_ids, theirs["input_ids"])
        assert torch.equal(ours.token_mask, theirs["loss_mask"].long())
        assert torch.equal(ours.aux_hidden, theirs["hidden_states"])
        last = norm(theirs["verifier_last_hidden_states"].float())  # as its training does
        assert torch.equal(ours.last_hidden, last.bfloat16())


# vLLM


@contextmanager
def server(draft: Path, port: int, log: Path) -> Iterator[str]:
    """`vllm serve DRAFT`, whose own command this wheel's version lacks; its address."""
    words = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", draft]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 96, "--port", port]
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, words)), stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{port}"
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_vllm_serves_a_draft_with_the_target_that_its_folder_names(target, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_draft(target, tmp_path, "vllm")
    prompt, count = [5, 9, 11, 20], 16
    with server(folder, 8719, tmp_path / "log") as url:
        body = {"model": str(folder), "prompt": prompt, "max_tokens": count, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            (choice,) = json.load(response)["choices"]
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            metrics = response.read().decode()

    # The same tokens and rounds as here.
    model, _ = load_target(target, torch.float32)
    draft = e3.load_draft(folder, torch.float32)
    ours = speculate(model, draft, torch.tensor([prompt]), 3, count, ())
    assert choice["token_ids"] == ours.tokens
    name = "vllm:spec_decode_num_drafts_total"
    (rounds,) = [line for line in metrics.splitlines() if line.startswith(name)]
    assert float(rounds.split()[-1]) == ours.verifications > 4


# EAGLE


EAGLE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file, save_file
from eagle.model.cnets import Model
from eagle.model.configs import EConfig
config = EConfig.from_pretrained(sys.argv[2])
model = Model(config, load_emb=False)
model.load_state_dict(load_file(sys.argv[2] + "/model.safetensors"), strict=True)
cos, sin = model.midlayer.self_attn.rotary_emb(torch.zeros(1), seq_len=40)
save_file({"cos": cos.reshape(40, -1).contiguous(), "sin": sin.reshape(40, -1).contiguous()},
          sys.argv[3])
"""


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 10_000.0}],
    ids=["default", "linear"],
)
def test_eagle_loads_what_is_written_and_rotates_alike(target, tmp_path, changes):
    python_of("eagle")
    folder = write_draft(target, tmp_path, "eagle", **changes)
    run("eagle", EAGLE, source_of("eagle"), folder, tmp_path / "tables")
    theirs = load_file(tmp_path / "tables")
    ours = rope_table(e3.load_draft(folder, torch.float32).config, 40, torch.float32, CPU)
    for table, name in zip(ours, ("cos", "sin"), strict=True):
        torch.testing.assert_close(theirs[name], table, rtol=0, atol=1e-5)
