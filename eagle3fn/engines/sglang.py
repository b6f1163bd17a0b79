"""Hidden states from two running SGLang servers, written from its interface: never run with it.

A server that returns the tapped layers does not return the last state, so a second one does. Both
answer with numbers in JSON.

    taps    --speculative-algorithm EAGLE3 --enable-return-aux-hidden-states
            --return-aux-hidden-state-layer-ids A B C --disable-radix-cache
            --chunked-prefill-size -1
    last    --enable-return-hidden-states --disable-radix-cache --chunked-prefill-size -1

An id is that of the layer whose output is returned. The last state comes after the final norm.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.engines.hidden_states import Row, Score
from eagle3fn.engines.process import ANSWER_SECONDS
from eagle3fn.engines.server import Server

_INFO = "/get_server_info"


class SglangServers:
    """The taps' server and the last state's.

    The constructor reads what they say of themselves.
    """

    normed = True
    remedy = "start the servers with this target, as docs/engines.md says, or take another engine"

    def __init__(
        self,
        urls: Sequence[str],
        layers: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Look at the servers.

        Args:
            urls: the taps' server's, and the last state's.
            layers: the tapped layers, ascending, counted from 0.
            dtype: what they compute in; None takes what they name.
            seconds: the longest time for an answer.

        Raises:
            UserError: not two servers; one is not there, or was started with other options.
        """
        if len(urls) != 2:
            raise UserError(
                "--engine sglang: needs --engine-url twice, the server of the tapped layers and "
                "that of the last state, for no server returns both (docs/engines.md)"
            )
        self._count = len(layers)
        self._taps, self._last = (Server("SGLang", url) for url in urls)
        self._seconds = seconds
        facts = [_facts(self._taps), _facts(self._last)]
        _check_option(self._taps, facts[0], "return_aux_hidden_state_layer_ids", list(layers))
        _check_option(self._last, facts[1], "enable_return_hidden_states", True)

        versions = {str(one.get("version")) for one in facts}
        dtypes = {str(one.get("dtype")) for one in facts}
        if len(versions) != 1 or len(dtypes) != 1:
            raise UserError(
                f"--engine sglang: the servers differ: versions {sorted(versions)}, dtypes "
                f"{sorted(dtypes)}; start both alike"
            )
        self.dtype: torch.dtype = _dtype(dtypes.pop(), dtype)
        version = versions.pop()
        self.title = f"SGLang {version} (unverified)"
        self.record = {"name": "sglang", "version": version, "server": True}

    def rows(self, rows: Sequence[Sequence[int]], scores: bool) -> Iterator[Row]:
        """As `HiddenStates.rows`. SGLang returns no ids: the numbers of tokens are compared."""
        for row in rows:
            aux, _ = self._run(self._taps, row)
            last, token = self._run(self._last, row)
            if aux.shape[1] % self._count:
                raise UserError(
                    f"SGLang at {self._taps.url}: gave states {tuple(aux.shape)}, not of "
                    f"{self._count} layers"
                )
            found = [Score(len(row) - 1, token, None)] if scores and token is not None else []
            yield Row(torch.tensor(row), aux.unflatten(1, (self._count, -1)), last, found)

    def _run(self, server: Server, row: Sequence[int]) -> tuple[Tensor, int | None]:
        """The states `(S, …)` that a server returns, and its next token."""
        body = {
            "input_ids": list(row),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "return_hidden_states": True,
        }
        answer = server.post("/generate", body, self._seconds)
        try:
            found = answer["meta_info"]["hidden_states"]
            states = torch.tensor(_prefill(found), dtype=torch.float32)
            count = answer["meta_info"].get("prompt_tokens", len(row))
            tokens = answer.get("output_ids")
            token = int(tokens[0]) if isinstance(tokens, list) and tokens else None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"SGLang at {server.url}: returned no hidden states "
                f"({type(error).__name__}); start it as docs/engines.md says"
            ) from None
        if count != len(row) or states.ndim != 2 or len(states) != len(row):
            raise UserError(
                f"SGLang at {server.url}: gave states of shape {tuple(states.shape)} for {count} "
                f"tokens, not of {len(row)}; start it without prefix caching and chunked prefill"
            )
        return states.to(self.dtype), token

    def close(self) -> None:
        """Leave the servers; they go on."""

    def __enter__(self) -> "SglangServers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prefill(found: list[Any]) -> list[Any]:
    """The states of the prompt: all that is there, or the first of a list by runs."""
    first = found[0]
    return first if isinstance(first[0], list) else found


def _facts(server: Server) -> dict[str, Any]:
    """What a server says of itself, if it returns states of whole rows."""
    facts = server.get(_INFO)
    _check_option(server, facts, "disable_radix_cache", True)
    _check_option(server, facts, "chunked_prefill_size", -1)
    return facts


def _check_option(server: Server, facts: dict[str, Any], name: str, value: Any) -> None:
    if facts.get(name) == value:
        return
    option = f"--{name.replace('_', '-')}"
    words = " ".join(map(str, value)) if isinstance(value, list) else value
    raise UserError(
        f"SGLang at {server.url}: {name} is {facts.get(name)!r}; start it with "
        f"{option if value is True else f'{option} {words}'}"
    )


def _dtype(named: str, wanted: torch.dtype | None) -> torch.dtype:
    found = getattr(torch, named, None)
    if not isinstance(found, torch.dtype):
        if wanted is None:
            raise UserError(
                f"--engine sglang: the servers' dtype is {named!r}; name what they compute in with "
                "--dtype"
            )
        return wanted
    if wanted not in (None, found):
        wanted_name = str(wanted).removeprefix("torch.")
        raise UserError(f"--dtype {wanted_name}: the servers compute in {named}; leave it out")
    return found
