"""Hidden states from a running vLLM server; it writes them to a file system that both see."""

import contextlib
import fcntl
import os
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.engines.hidden_states import Row, Score
from eagle3fn.engines.process import ANSWER_SECONDS, engine_version
from eagle3fn.engines.server import Server
from eagle3fn.engines.vllm_process import OLDEST, Taps, read_row, remove_file

_PROBE = [1, 2]  # token ids
_WAIT = 0.01  # seconds between two looks at a lock


class VllmServer:
    """A server that was started with `extract_hidden_states`; docs/engines.md has the command.

    The constructor asks for its version and runs a short row, which shows how many states it gives
    and in which dtype. Which layers they come from cannot be asked.
    """

    normed = False

    def __init__(
        self,
        url: str,
        taps: Taps,
        *,
        max_length: int,
        dtype: torch.dtype | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Look at the server.

        Args:
            url: where it is, `http://HOST:PORT`.
            taps: the states that it must give.
            max_length: tokens of the longest row.
            dtype: what it must compute in; None takes what it does.
            seconds: the longest time for an answer.

        Raises:
            UserError: no server there, an old one, too short rows, another number of states,
                another dtype, or files that cannot be read here.
        """
        self._server = Server("vLLM", url)
        self._taps = taps
        self._seconds = seconds
        version = engine_version(self._server.get("/version"), OLDEST, "vLLM", url)
        self.title = f"vLLM {version}"

        # The model, and how long its rows may be.
        try:
            (model, *_) = self._server.get("/v1/models")["data"]
            self._model = str(model["id"])
            room = int(model.get("max_model_len") or 0)
        except (LookupError, TypeError, ValueError):
            raise UserError(f"vLLM at {url}: names no model at /v1/models") from None
        if room < max_length + 1:
            raise UserError(
                f"vLLM at {url}: takes {room} tokens, {max_length + 1} are needed for --max-length "
                f"{max_length}; set it to at most {room - 1}, or start it with --max-model-len "
                f"{max_length + 1}"
            )

        # A short row.
        try:
            (row,) = self.rows([_PROBE], False)
        except UserError as error:
            raise type(error)(f"{error}; it starts with {start_words(taps)}") from None
        self.dtype: torch.dtype = row.last.dtype
        name = str(self.dtype).removeprefix("torch.")
        if dtype not in (None, self.dtype):
            wanted = str(dtype).removeprefix("torch.")
            raise UserError(
                f"--dtype {wanted}: vLLM at {url} gives {name}; leave --dtype out, or start it "
                f"with --dtype {wanted}"
            )
        self.record = {"name": "vllm", "version": version, "server": True}
        self.remedy = f"start it with this target and {start_words(taps)}"

    def rows(self, rows: Sequence[Sequence[int]], scores: bool) -> Iterator[Row]:
        """As `HiddenStates.rows`; all rows are in flight together."""
        answers, faults = self._ask_all(rows, scores)
        try:
            if faults:
                raise faults[0]
            for answer in answers:
                path = _path_of(answer)
                self._wait(path)
                found = scores_of(answer) if scores else []
                yield read_row(path, self._taps, found, f"vLLM at {self._server.url}: ")
        finally:
            for answer in answers:
                remove_file(_path_of(answer))

    def _ask_all(
        self, rows: Sequence[Sequence[int]], scores: bool
    ) -> tuple[list[dict[str, Any]], list[Exception]]:
        """Answers in the rows' order, and what went wrong: then some are missing."""
        answers: dict[int, dict[str, Any]] = {}
        faults: list[Exception] = []

        def ask(number: int) -> None:
            try:
                answers[number] = self._ask(rows[number], scores)
            except Exception as error:
                faults.append(error)

        # An interrupt does not wait for a silent server: these threads end with the process.
        threads = [
            threading.Thread(target=ask, args=(number,), daemon=True) for number in range(len(rows))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answers[number] for number in sorted(answers)], faults

    def _ask(self, row: Sequence[int], scores: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(row),
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
        }
        if scores:
            body |= {"logprobs": 1, "prompt_logprobs": 1, "return_tokens_as_token_ids": True}
        return self._server.post("/v1/completions", body, self._seconds)

    def _wait(self, path: str | None) -> None:
        """Wait until a file is written: its lock is held so long."""
        end = time.monotonic() + self._seconds
        if not os.path.isfile(f"{path}.lock"):
            return
        # A lock that cannot be looked at says nothing; half a file is refused where it is read.
        with contextlib.suppress(OSError), open(f"{path}.lock", "rb") as lock:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return
                if time.monotonic() > end:
                    raise EngineGone(f"{path}: not written within {self._seconds:.0f} s")
                time.sleep(_WAIT)

    def close(self) -> None:
        """Leave the server; it goes on."""

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_words(taps: Taps) -> str:
    """The option that a server must have been started with."""
    ids = ",".join(map(str, taps.ids))
    config = (
        '{"method":"extract_hidden_states","num_speculative_tokens":1,"draft_model_config":'
        f'{{"hf_config":{{"eagle_aux_hidden_state_layer_ids":[{ids}]}}}}}}'
    )
    return f"--speculative-config {shlex.quote(config)}"


def _path_of(answer: dict[str, Any]) -> str | None:
    parameters = answer.get("kv_transfer_params")
    path = parameters.get("hidden_states_path") if isinstance(parameters, dict) else None
    return path if isinstance(path, str) else None


def scores_of(answer: dict[str, Any]) -> list[Score]:
    """The most probable token after each place; none, where the answer has no probabilities."""
    try:
        (choice,) = answer["choices"]
        places = [
            {int(token): one["logprob"] for token, one in place.items()}
            for place in choice["prompt_logprobs"][1:]
        ]
        written = choice["logprobs"]["top_logprobs"][0]
        places.append({int(name.removeprefix("token_id:")): p for name, p in written.items()})
    except (LookupError, TypeError, ValueError, AttributeError):
        return []
    if not all(places):
        return []
    best = [max(place, key=lambda token: place[token]) for place in places]
    return [Score(at, token, places[at][token]) for at, token in enumerate(best)]
