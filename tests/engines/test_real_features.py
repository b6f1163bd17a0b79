"""Features by vLLM itself are those of transformers: in a process, and from a server."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Sample
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.generate import Sampling
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import model_source
from eagle3fn.engines.vllm_process import VllmProcess, taps_of
from eagle3fn.engines.vllm_server import VllmServer
from tests.engines.made_rows import CUT, LAYERS, Made, make_target
from tests.factories import tiny_template
from tests.serving import python_of

pytestmark = pytest.mark.engines

ROOT = Path(__file__).resolve().parent.parent.parent
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # no heads of 8 on a CPU
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TEMPLATE = tiny_template()


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def compare(made: Made, engine: VllmProcess | VllmServer, out: Path) -> int:
    """Compare all samples of both sides by value; returns their number."""
    with engine:
        source = engine_source(engine, made.target, LAYERS, check="hf")
        extract(source, TEMPLATE, made.talks, out, max_length=CUT)
    ours = out.parent / "ours"
    extract(model_source(made.model, LAYERS), TEMPLATE, made.talks, ours, max_length=CUT)
    theirs, expected = open_features(out), open_features(ours)
    assert len(expected.samples) == len(theirs.samples)
    for number in range(len(theirs.samples)):
        pairs = zip(read_sample(theirs, number), read_sample(expected, number), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    return len(theirs.samples)


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("Qwen3Moe", MIXTURE)])
def test_process(tmp_path: Path, family: str, changes: dict[str, int]) -> None:
    made = make_target(tmp_path, name=family, **WIDE, **changes)
    names = (python_of("vllm"), made.target, made.taps, tmp_path / "log")
    engine = VllmProcess(*names, max_length=CUT, dtype=torch.float32)
    assert compare(made, engine, tmp_path / "out") == 8


def test_process_writes_as_transformers_does(tmp_path: Path) -> None:
    """One pass: the tokens are transformers' but for the stop token, and so are their states."""
    made = make_target(tmp_path, **WIDE)
    stops = tuple(range(0, 300, 12))
    prompts = [
        Encoded(row.id, row.input_ids[: 9 + number], torch.zeros(9 + number, dtype=torch.int64))
        for number, row in enumerate(made.rows)
    ]
    here = model_source(made.model, LAYERS, batch_tokens=1, stops=stops)
    greedy = Sampling(0.0, 1.0, 12)
    assert here.write
    expected = here.write(prompts, greedy, 3, torch.float32)

    names = (python_of("vllm"), made.target, made.taps, tmp_path / "log")
    with VllmProcess(*names, max_length=CUT, dtype=torch.float32) as engine:
        there = engine_source(engine, made.target, LAYERS, check="hf", stops=stops)
        assert there.write
        found = there.write(prompts, greedy, 3, torch.float32)
        again = there.write(prompts, greedy, 4, torch.float32)
        on_a_cpu = engine.record["device"] == "cpu"
        if on_a_cpu:
            with pytest.raises(UserError, match=r"^--temperature 1.0: vLLM .* loses it"):
                there.write(prompts, Sampling(1.0, 1.0, 12), 3, torch.float32)

    ended = 0
    for sample, other, whole in zip(found, again, expected, strict=True):
        stopped = int(whole.input_ids[-1]) in stops
        ended += stopped
        wanted = Sample(*(part[: len(part) - stopped] for part in whole))
        assert torch.equal(sample.input_ids, wanted.input_ids)
        assert torch.equal(sample.input_ids, other.input_ids)
        assert torch.equal(sample.token_mask, wanted.token_mask)
        torch.testing.assert_close(sample.aux_hidden, wanted.aux_hidden, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(sample.last_hidden, wanted.last_hidden, atol=1e-4, rtol=1e-3)
    assert 0 < ended < len(found)


def documented(target: Path, states: Path) -> list[str]:
    """The command line for CPUs of docs/engines.md, for another target, taps and folder."""
    page = (ROOT / "docs" / "engines.md").read_text()
    (text,) = re.findall(r"^PYTHONPATH=(?:.*\\\n)*.*$", page, re.M)
    words = shlex.split(text.replace("\\\n", ""))[1:]
    text = json.dumps([python_of("vllm"), *words[1:]])
    for old, new in {
        "MODEL": str(target),
        "[2,15,27,30]": json.dumps(taps_of(LAYERS, 5).ids),
        "/dev/shm/states": str(states),
        "8000": "8641",
    }.items():
        assert old in text
        text = text.replace(old, new)
    return json.loads(text)


@contextmanager
def server(command: list[str], log: Path):
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "eagle3fn" / "engines" / "programs")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=variables, start_new_session=True
        )
    try:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen("http://localhost:8641/version", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield "http://localhost:8641"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_server(tmp_path: Path) -> None:
    made = make_target(tmp_path, **WIDE)
    states = tmp_path / "states"
    with server(documented(made.target, states), tmp_path / "log") as url:
        running = VllmServer(url, made.taps, max_length=CUT)
        assert compare(made, running, tmp_path / "out") == 8
        assert not list(states.glob("*.safetensors"))

        # Other layers than it was started with.
        other = taps_of((0, 1, 4), 5)
        engine = VllmServer(url, other, max_length=CUT)
        source = engine_source(engine, made.target, (0, 1, 4), check="hf")
        with pytest.raises(UserError, match="its state after layer 1 is not that of transformers"):
            extract(source, TEMPLATE, made.talks, tmp_path / "other", max_length=CUT)
