"""transformers in a process: the bits of this process, what it writes, and how it can fail."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.generate import Sampling
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import model_source
from eagle3fn.data.target import load_target
from eagle3fn.engines import transformers_process as module
from eagle3fn.engines.process import PROGRAMS
from eagle3fn.engines.transformers_process import TransformersProcess
from tests.engines.made_rows import CUT, LAYERS, make_target

BUDGET = 200  # tokens of a run: a group needs several
STOPS = tuple(range(0, 300, 12))
DRAWN = Sampling(temperature=1.0, top_p=0.95, max_new=12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The bits of a run on CPUs are those of a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(made, log: Path, **changes) -> TransformersProcess:
    options = {"target": made.target, "layers": LAYERS, "max_length": CUT, "threads": 1, **changes}
    target = options.pop("target")
    layers = options.pop("layers")
    return TransformersProcess(sys.executable, target, layers, log, **options)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def sources(made, request, tmp_path_factory):
    """A process of one dtype as a source, and the model in this process."""
    dtype = request.param
    model, _ = load_target(made.target, dtype)
    here = model_source(model, LAYERS, batch_tokens=BUDGET, stops=STOPS)
    with start(made, tmp_path_factory.mktemp("log") / "log", dtype=dtype) as engine:
        said: list[str] = []
        there = engine_source(
            engine,
            made.target,
            LAYERS,
            batch_tokens=BUDGET,
            check="logits",
            say=said.append,
            stops=STOPS,
        )
        yield there, here, dtype


def same(found, expected) -> bool:
    """Whether two lists of samples have the same bits and dtypes."""
    return len(found) == len(expected) and all(
        ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        for one, other in zip(found, expected, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    )


def prompts_of(made) -> list[Encoded]:
    """The beginnings of the conversations, of different lengths."""
    return [
        Encoded(row.id, row.input_ids[: 9 + number % 5], row.token_mask[: 9 + number % 5] * 0)
        for number, row in enumerate(made.rows)
    ]


def test_features_have_the_bits_of_the_model_in_this_process(made, sources):
    there, here, dtype = sources
    assert there.dtype == dtype
    assert same(there.features(made.rows, dtype), here.features(made.rows, dtype))


def test_written_samples_have_the_bits_of_those_in_this_process(made, sources):
    there, here, dtype = sources
    prompts = prompts_of(made)
    assert there.write and here.write
    found = there.write(prompts, DRAWN, 5, dtype)
    assert same(found, here.write(prompts, DRAWN, 5, dtype))
    assert not same(found, there.write(prompts, DRAWN, 6, dtype))


def test_features_of_what_was_written_are_those_of_its_tokens(made, sources):
    there, _, dtype = sources
    found = there.write(prompts_of(made), DRAWN, 5, dtype)
    rows = [Encoded("", sample.input_ids, sample.token_mask) for sample in found]
    assert same(found, there.features(rows, dtype))


def test_prompt_is_not_supervised_and_the_stop_token_ends_what_is(made, sources):
    _, here, dtype = sources
    prompts = prompts_of(made)
    assert here.write
    ended = 0
    for prompt, sample in zip(prompts, here.write(prompts, DRAWN, 5, dtype), strict=True):
        length = len(prompt.input_ids)
        assert torch.equal(sample.input_ids[:length], prompt.input_ids)
        written = sample.input_ids[length:].tolist()
        assert sample.token_mask.tolist() == [0] * length + [1] * len(written)
        assert not set(written[:-1]) & set(STOPS)
        ended += written[-1] in STOPS
        assert written[-1] in STOPS or len(written) == DRAWN.max_new
    assert 0 < ended < len(prompts)


def test_threads_get_their_own_rows(made, sources, monkeypatch):
    def late(path):
        time.sleep(0.02)  # meanwhile the other threads' rows are written
        return load_file(path)

    there, _, dtype = sources
    monkeypatch.setattr(module, "load_file", late)
    groups = [made.rows[number : number + 2] for number in range(0, 8, 2)]
    expected = [there.features(group, dtype) for group in groups]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda group: there.features(group, dtype), groups * 3))
    assert all(same(one, expected[number % 4]) for number, one in enumerate(found))


def test_a_row_beyond_the_maximal_length_is_refused(made, sources):
    there, _, dtype = sources
    assert there.write
    long = Encoded("long", torch.ones(CUT + 1, dtype=torch.int64), torch.ones(CUT + 1).long())
    with pytest.raises(UserError, match=r"^transformers: a row of 91 tokens: at most 90 fit; cut"):
        there.features([long], dtype)
    prompts = prompts_of(made)
    with pytest.raises(UserError, match=r"a row of 13 tokens: at most 9 fit"):
        there.write(prompts, DRAWN._replace(max_new=CUT - 9), 5, dtype)


def test_a_killed_process_is_gone_and_its_files_too(made, tmp_path):
    with start(made, tmp_path / "log", dtype=torch.float32) as engine:
        folder = engine._folder
        os.kill(engine._process._process.pid, signal.SIGKILL)
        with pytest.raises(EngineGone, match=r"^transformers: was killed by SIGKILL"):
            list(engine.rows([[1, 2, 3]], False))
    assert not folder.exists()


def test_a_target_without_the_positions_is_one_line(made, tmp_path):
    said = r"max_length = 257: [^\n]*set --max-length to at most 256; see [^\n]*log"
    with pytest.raises(UserError, match=rf"^transformers: {said}$") as found:
        start(made, tmp_path / "log", max_length=257)
    assert found.type is UserError


@pytest.fixture
def program(monkeypatch):
    """The program's module, which runs the package that is loaded here."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = spec_from_file_location("program", PROGRAMS / "transformers_states.py")
    assert spec and spec.loader
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.setattr(found, "use_package", lambda folder: None)
    return found


WRONG = {
    "target": ({"target": "none/such"}, "none/such: "),
    "device": ({"device": "cuda:99"}, "device 'cuda:99': not usable here .*name cpu or cuda"),
    "layers": ({"layers": [0, 2, 5]}, r"layers \[0, 2, 5\]: must be layers of the target"),
}


@pytest.mark.parametrize(("changes", "named"), WRONG.values(), ids=WRONG)
def test_what_the_program_cannot_start_with_is_refused(made, program, monkeypatch, changes, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {
        "target": str(made.target),
        "layers": list(LAYERS),
        "max_length": CUT,
        "dtype": None,
        "device": "cpu",
        "threads": None,
    }
    with pytest.raises(UserError, match=named):
        program.start({**settings, **changes})
    facts, _ = program.start(settings)
    assert facts["device"] == "cpu"
