"""llama.cpp decodes token ids, with an EAGLE-3 draft or plainly; run by `engines.decoding`.

Target and draft are GGUF files. The module xllamacpp has llama.cpp's server inside this process,
which is asked at its local address.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answering import Answer, serve

PREFIX = "llamacpp:spec_decode_num_"
ROUNDS = "drafts_total"
DRAFTED = "draft_tokens_total"
ACCEPTED = "accepted_tokens_total"
BY_POSITION = "accepted_tokens_per_pos_total"


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load target and draft."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    server = xllamacpp.Server(parameters(xllamacpp, settings))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return decode(server, request, settings)

    return {"version": xllamacpp.__version__}, answer


def parameters(xllamacpp: Any, settings: dict[str, Any]) -> Any:
    """llama.cpp's settings: one sequence at a time, of which nothing is kept for the next."""
    found = xllamacpp.CommonParams()
    found.model.path = settings["target"]
    found.n_ctx = settings["positions"]
    found.n_parallel = 1
    found.fit_params = False  # the context has the size above
    found.cache_prompt = False
    found.cache_ram_mib = 0
    found.endpoint_metrics = True

    if settings["draft"] is not None:
        kinds = xllamacpp.common_speculative_type
        found.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        draft = found.speculative.draft
        draft.mparams.path = settings["draft"]
        draft.n_max = settings["draft_length"]
        draft.n_min = 0
        draft.p_min = 0.0  # every round drafts all tokens

    for name, value in settings["arguments"].items():
        put(found, name, value)
    return found


def put(found: Any, name: str, value: Any) -> None:
    """Set `cpuparams.n_threads` and the like."""
    *outer, last = name.split(".")
    try:
        for part in outer:
            found = getattr(found, part)
        getattr(found, last)
        setattr(found, last, value)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"xllamacpp.CommonParams takes no {name} = {value!r}: {error}") from None


def decode(server: Any, request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One prompt's tokens, seconds and counts."""
    body = {
        "prompt": request["prompt"],
        "n_predict": request["max_new"],
        "return_tokens": True,
        "cache_prompt": False,
        "temperature": request["temperature"],
        "top_p": request["top_p"],
        "samplers": ["temperature", "top_p"],
        "seed": request["seed"],
    }
    before = metrics(server)
    begin = time.perf_counter()
    found = post(server.listening_address + "/completion", body)
    seconds = time.perf_counter() - begin

    # llama.cpp ends at the tokens that its file names, among which may not be all of `end_tokens`.
    tokens = until_end(found["tokens"], settings["end_tokens"])
    counts: dict[str, Any] | None = None
    if settings["draft"] is not None:
        counts = {}
        if len(tokens) == len(found["tokens"]):
            counts = difference(before, metrics(server), settings["draft_length"])
    return {"tokens": tokens, "seconds": seconds, "counts": counts}


def post(address: str, body: dict[str, Any]) -> Any:
    """The answer to a request; JSON both ways."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode(errors="replace")) from None


def until_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens


def metrics(server: Any) -> dict[str, Any]:
    """The counters of speculative decoding by name, from lines such as `PREFIX…_total 27`."""
    found: dict[str, Any] = {ROUNDS: 0, DRAFTED: 0, ACCEPTED: 0, BY_POSITION: {}}
    for line in server.handle_metrics().splitlines():
        name, _, value = line.partition(" ")
        name, _, label = name.removeprefix(PREFIX).partition("{")
        if name == BY_POSITION:
            position = int(label.split('"')[1])
            found[BY_POSITION][position] = int(float(value))
        elif name in found:
            found[name] = int(float(value))
    return found


def difference(before: dict[str, Any], after: dict[str, Any], length: int) -> dict[str, Any]:
    """What was counted between two readings.

    Rounds near the limit draft less, and drafted tokens are not counted by position.
    """
    by_position = None
    if after[BY_POSITION]:
        old, new = before[BY_POSITION], after[BY_POSITION]
        by_position = [new.get(i, 0) - old.get(i, 0) for i in range(length)]
    return {
        "rounds": after[ROUNDS] - before[ROUNDS],
        "drafted": after[DRAFTED] - before[DRAFTED],
        "accepted": after[ACCEPTED] - before[ACCEPTED],
        "drafted_by_position": None,
        "accepted_by_position": by_position,
    }


if __name__ == "__main__":
    serve(start)
