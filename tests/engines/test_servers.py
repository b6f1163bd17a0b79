"""Running servers of vLLM and SGLang, by a small HTTP server in place of each."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.sources import model_source
from eagle3fn.engines.sglang import SglangServers
from eagle3fn.engines.vllm_process import taps_of
from eagle3fn.engines.vllm_server import VllmServer
from tests.engines.http_server import serving
from tests.engines.made_rows import (
    CUT,
    LAYERS,
    make_target,
    scores_of,
    states_of,
    write_answers,
)
from tests.factories import tiny_template

TEMPLATE = tiny_template()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    found = make_target(root, count=4)
    probe = found.rows[0]._replace(input_ids=torch.tensor([1, 2]))
    write_answers(found._replace(rows=[*found.rows, probe]), root / "answers")
    return found


def same_features(made, folder):
    """The folder's features are those of the model itself."""
    ours = folder.parent / "ours"
    extract(model_source(made.model, LAYERS), TEMPLATE, made.talks, ours, max_length=CUT)
    left, right = open_features(folder), open_features(ours)
    for number in range(4):
        pairs = zip(read_sample(left, number), read_sample(right, number), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# vLLM


def vllm(made, folder, **changes):
    """A server's answers; `changes` are other answers by path, or other versions and lengths."""
    answers = made.target.parent / "answers"
    rows = json.loads((answers / "rows.json").read_text())
    facts: dict[str, Any] = {"version": "0.32.0", "room": CUT + 1, "places": True, **changes}
    lock = threading.Lock()
    served = []

    def answer(path, body):
        if path in changes:
            return changes[path]
        if path == "/version":
            return {"version": facts["version"]}
        if path == "/v1/models":
            return {"data": [{"id": "it", "max_model_len": facts["room"]}]}
        assert path == "/v1/completions" and body["model"] == "it" and body["max_tokens"] == 1
        with lock:
            served.append(body["prompt"])
            name = folder / f"{len(served)}.safetensors"
        if len(served) > facts.get("until", 100):
            return facts["then"]
        found = rows[json.dumps(body["prompt"])]
        shutil.copy(answers / found["file"], name)
        places = [{str(token): {"logprob": p}} for _, token, p in found["scores"]]
        _, token, p = found["scores"][-1]
        choice: dict[str, Any] = {"text": ""}
        if body.get("prompt_logprobs") and facts["places"]:
            choice["prompt_logprobs"] = [None, *places[:-1]]
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{token}": p}]}
        return {"choices": [choice], "kv_transfer_params": {"hidden_states_path": str(name)}}

    return answer


def run(engine, made, out):
    with engine:
        source = engine_source(engine, made.target, LAYERS, batch_tokens=100)
        return extract(source, TEMPLATE, made.talks, out, max_length=CUT, samples_per_shard=2)


def test_vllm_server_gives_the_targets_features_and_its_files_are_deleted(made, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    with serving(vllm(made, files)) as url:
        index = run(VllmServer(url + "/", made.taps, max_length=CUT), made, tmp_path / "out")
    assert index["engine"] == {"name": "vllm", "version": "0.32.0", "server": True}
    assert index["computed_in"] == "float32"
    same_features(made, tmp_path / "out")
    assert not list(files.iterdir())


VLLM = {
    "old": ({"version": "0.17.0"}, {}, "vLLM 0.17.0 .*too old, 0.18 or later"),
    "short": ({"room": 50}, {}, "takes 50 tokens, 91 are needed .*at most 49, or start it with"),
    "other taps": ({}, {"taps": taps_of((0, 1, 2), 5)}, r"not \(tokens, 4, hidden size\).*starts"),
    "dtype": ({}, {"dtype": torch.bfloat16}, "--dtype bfloat16: vLLM at .* gives float32"),
    "no states": (
        {"/v1/completions": {"choices": []}},
        {},
        "named no file of hidden .*starts with",
    ),
    "elsewhere": (
        {"/v1/completions": {"kv_transfer_params": {"hidden_states_path": "/none/x"}}},
        {},
        "/none/x: not written, not readable here",
    ),
    "another program": ({"/version": b"<html>"}, {}, "answered no JSON object; is this vLLM"),
    "no version": ({"/version": 404}, {}, "/version: refused, 404: 404"),
    "no model": ({"/v1/models": {"data": []}}, {}, "names no model at /v1/models"),
    "ends": ({"/version": None}, {}, "it ended while it answered"),
}


@pytest.mark.parametrize(("changes", "options", "named"), VLLM.values(), ids=VLLM)
def test_vllm_server_that_was_started_otherwise_is_refused(made, tmp_path, changes, options, named):
    options = {"taps": made.taps, "max_length": CUT, **options}
    with (
        serving(vllm(made, tmp_path, **changes)) as url,
        pytest.raises(UserError, match=named),
    ):
        VllmServer(url, **options)


def test_server_that_is_not_there_is_named(made):
    with serving(lambda *_: None) as url:
        pass
    with pytest.raises(EngineGone, match=r"vLLM at .*: no server there .*mend --engine-url"):
        VllmServer(url, made.taps, max_length=CUT)


GONE = {"silent": None, "proxy": 503}


@pytest.mark.parametrize("answer", GONE.values(), ids=GONE)
def test_vllm_server_that_is_away_may_be_asked_again(made, tmp_path, answer):
    with (
        serving(vllm(made, tmp_path, **{"/v1/completions": answer})) as url,
        pytest.raises(EngineGone, match=r"it ended while|refused, 503"),
    ):
        VllmServer(url, made.taps, max_length=CUT)


def test_what_a_server_refuses_stays_wrong(made, tmp_path):
    with (
        serving(vllm(made, tmp_path, **{"/v1/completions": 400})) as url,
        pytest.raises(UserError, match="refused, 400") as found,
    ):
        VllmServer(url, made.taps, max_length=CUT)
    assert found.type is UserError


def test_vllm_server_without_probabilities_is_refused(made, tmp_path):
    with serving(vllm(made, tmp_path, places=False)) as url:
        engine = VllmServer(url, made.taps, max_length=CUT)
        with pytest.raises(UserError, match="without the engine's next token"):
            run(engine, made, tmp_path / "out")


@pytest.mark.parametrize("then", [None, 500])
def test_vllm_server_that_ends_keeps_the_finished_shards(made, tmp_path, then):
    # The short row, the compared row, then a shard of two.
    with serving(vllm(made, tmp_path, until=4, then=then)) as url:
        engine = VllmServer(url, made.taps, max_length=CUT)
        with pytest.raises(UserError, match=r"it ended while|refused, 500: 500"):
            run(engine, made, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("shard-*.json"))) == 1
    assert not list(tmp_path.glob("*.safetensors"))

    with serving(vllm(made, tmp_path)) as url:
        run(VllmServer(url, made.taps, max_length=CUT), made, tmp_path / "out")
    same_features(made, tmp_path / "out")


def test_threads_get_their_own_rows_of_a_server(made, tmp_path):
    expected = model_source(made.model, LAYERS).features(made.rows, torch.float32)
    with serving(vllm(made, tmp_path)) as url, ThreadPoolExecutor(4) as pool:
        source = engine_source(VllmServer(url, made.taps, max_length=CUT), made.target, LAYERS)
        groups = [[row] for row in made.rows]
        found = list(pool.map(lambda group: source.features(group, torch.float32), groups))
    for (sample,), wanted in zip(found, expected, strict=True):
        assert torch.equal(sample.input_ids, wanted.input_ids)
        torch.testing.assert_close(sample.aux_hidden, wanted.aux_hidden, atol=2e-5, rtol=1e-4)


# SGLang


def sglang(made, taps, nested=False, **changes):
    """One of the two servers' answers."""
    facts = {
        "version": "0.5.23",
        "dtype": "float32",
        "disable_radix_cache": True,
        "chunked_prefill_size": -1,
        "return_aux_hidden_state_layer_ids": list(LAYERS) if taps else None,
        "enable_return_hidden_states": not taps,
        **changes,
    }

    def answer(path, body):
        if path == "/get_server_info":
            return facts
        assert path == "/generate" and body["return_hidden_states"]
        ids = torch.tensor(body["input_ids"])
        states = states_of(made.model, ids, list(LAYERS)).flatten(1)  # (S, 3·Ht)
        if not taps:
            states = made.model.model.norm(states[:, -16:])
        found = states.tolist()[: changes.get("until")]
        meta = {"prompt_tokens": len(ids), "hidden_states": [found] if nested else found}
        return {"output_ids": [scores_of(made.model, ids)[-1].token], "meta_info": meta}

    return answer


def servers(made, stack, taps=None, last=None, nested=False, **both):
    return [
        stack.enter_context(serving(sglang(made, True, nested, **both, **(taps or {})))),
        stack.enter_context(serving(sglang(made, False, nested, **both, **(last or {})))),
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_sglangs_two_servers_give_the_targets_features(made, tmp_path, nested):
    with ExitStack() as stack:
        urls = servers(made, stack, nested=nested)
        index = run(SglangServers(urls, LAYERS), made, tmp_path / "out")
    assert index["engine"] == {"name": "sglang", "version": "0.5.23", "server": True}
    same_features(made, tmp_path / "out")


SGLANG = {
    "cache": ({"disable_radix_cache": False}, {}, "start it with --disable-radix-cache"),
    "chunks": ({"chunked_prefill_size": 512}, {}, "start it with --chunked-prefill-size -1"),
    "taps": (
        {},
        {"taps": {"return_aux_hidden_state_layer_ids": [0, 1, 4]}},
        "is .0, 1, 4.; start it with --return-aux-hidden-state-layer-ids 0 2 4",
    ),
    "last": (
        {},
        {"last": {"enable_return_hidden_states": False}},
        "start it with --enable-return-hidden-states",
    ),
    "versions": ({}, {"last": {"version": "0.5.22"}}, "the servers differ: versions .'0.5.22'"),
    "dtype": ({"dtype": "auto"}, {}, "dtype is 'auto'; name what they compute in with --dtype"),
}


@pytest.mark.parametrize(("both", "one", "named"), SGLANG.values(), ids=SGLANG)
def test_sglang_that_was_started_otherwise_is_refused(made, both, one, named):
    with ExitStack() as stack, pytest.raises(UserError, match=named):
        SglangServers(servers(made, stack, **both, **one), LAYERS)


def test_sglang_that_cuts_its_states_is_refused(made, tmp_path):
    with ExitStack() as stack:
        engine = SglangServers(servers(made, stack, until=5), LAYERS)
        with pytest.raises(UserError, match=r"states of shape \(5, 48\) for 28 tokens, not of 28"):
            run(engine, made, tmp_path / "out")


def test_sglang_of_another_dtype_is_refused(made):
    with ExitStack() as stack:
        urls = servers(made, stack)
        with pytest.raises(UserError, match=r"--dtype bfloat16: the servers compute in float32"):
            SglangServers(urls, LAYERS, dtype=torch.bfloat16)
        assert SglangServers(urls, LAYERS, dtype=torch.float32).dtype == torch.float32
