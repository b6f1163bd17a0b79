"""Hidden states from vLLM in a process of its own, by its method `extract_hidden_states`.

vLLM's id `i` is the stream after `i` layers, before any norm: the output of layer `l`, counted from
0, is id `l + 1`, and id `L` is what the target's final norm reads. It gives the states in ascending
order of their ids, each once.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from eagle3fn.base.device import fast_dtype
from eagle3fn.base.errors import UserError
from eagle3fn.engines.hidden_states import Row, Score, Writing
from eagle3fn.engines.process import (
    ANSWER_SECONDS,
    START_SECONDS,
    EngineClient,
    EngineProcess,
    engine_version,
    scratch,
)

OLDEST = (0, 18)  # with `extract_hidden_states`
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


class Taps(NamedTuple):
    """Which states vLLM is asked for, and where they are in its answer."""

    ids: list[int]  # vLLM's, ascending
    aux: list[int]  # the columns of the taps
    last: int  # the column of what the final norm reads


def taps_of(layers: Sequence[int], num_layers: int) -> Taps:
    """vLLM's ids of layers' outputs, counted from 0, and of the last of `num_layers`."""
    ids = sorted({*(layer + 1 for layer in layers), num_layers})
    return Taps(ids, [ids.index(layer + 1) for layer in layers], ids.index(num_layers))


class VllmProcess(EngineClient):
    """vLLM in the environment of another Python; a context manager that ends it.

    The constructor reads its version. It loads the target when the first rows are asked for.
    """

    normed = False
    remedy = "take another version of vLLM, or extract without --engine"

    def __init__(
        self,
        python: str | Path,
        target: str | Path,
        taps: Taps,
        log: str | Path,
        *,
        max_length: int,
        dtype: torch.dtype | None = None,
        arguments: dict[str, Any] | None = None,
        threads: int | None = None,
        seconds: float = ANSWER_SECONDS,
        abandoned: threading.Event | None = None,
    ) -> None:
        """Start the process.

        Args:
            python: of the environment that has vLLM.
            target: the target's folder or id.
            taps: what it is asked for.
            log: file for what vLLM prints; replaced.
            max_length: tokens of the longest row.
            dtype: what it computes in; None: bfloat16, or on a CPU what that multiplies fast.
            arguments: further arguments of `vllm.LLM`, JSON values.
            threads: CPU threads; None leaves the number to vLLM.
            seconds: the longest time for loading, and for an answer.
            abandoned: as of `EngineProcess`.

        Raises:
            UserError: no such Python, no vLLM there, or an old one.
        """
        environment = dict(_ENVIRONMENT)
        if threads is not None:
            environment |= {
                "OMP_NUM_THREADS": str(threads),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
        program = "vllm_features.py"
        super().__init__(
            EngineProcess(
                "vLLM", python, program, {}, log, environment=environment, abandoned=abandoned
            )
        )
        try:
            facts = self._process.facts
            version = engine_version(facts, OLDEST, "vLLM", str(python))
        except BaseException:
            self._process.close()
            raise

        device = facts.get("device")
        on_cpu = device == "cpu"
        self.dtype: torch.dtype = dtype or (fast_dtype("cpu") if on_cpu else torch.bfloat16)
        self.title = f"vLLM {version}"
        self.record = {
            "name": "vllm",
            "version": version,
            "device": device,
            "arguments": arguments or {},
        }
        self._own = ExitStack()
        self._folder = self._own.enter_context(scratch("vllm"))
        self._taps = taps
        self._seconds = seconds
        self._loaded = False
        self._loading = threading.Lock()
        self._load = {
            "target": str(Path(target).resolve()) if Path(target).is_dir() else str(target),
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_length": max_length,
            "ids": taps.ids,
            "folder": str(self._folder),
            "arguments": arguments or {},
        }

    def rows(self, rows: Sequence[Sequence[int]], scores: bool) -> Iterator[Row]:
        """As `HiddenStates.rows`; the files that vLLM writes are deleted one by one."""
        request = {"rows": [list(row) for row in rows], "scores": scores}
        yield from self._asked(request, len(rows))

    def write(self, prompts: Sequence[Sequence[int]], writing: Writing) -> Iterator[Row]:
        """As `Writer.write`; one pass of vLLM gives the tokens and their states.

        No run reads the last token, so vLLM has no state of it: a stop token is not in the row. One
        token more is asked for, so that an answer that the limit ends is whole. What is drawn
        after a prompt depends on the seed and the prompt's place among those of this call; vLLM
        cuts its runs itself, whatever `batch_tokens`.

        Raises:
            UserError: also as `check_temperature`.
        """
        self.check_temperature(writing.temperature)
        sampling = {
            "max_tokens": writing.max_new + 1,
            "temperature": writing.temperature,
            "top_p": writing.top_p,
            "stop_token_ids": writing.stops,
        }
        request = {
            "write": [list(prompt) for prompt in prompts],
            "sampling": sampling,
            "seeds": [place_seed(writing.seed, place) for place in range(len(prompts))],
        }
        yield from self._asked(request, len(prompts))

    def check_temperature(self, temperature: float) -> None:
        """Refuse to draw where vLLM loses the temperature: 0.32 does on a CPU, where it drafts.

        Raises:
            UserError: it would write other tokens than the target does.
        """
        if temperature > 0 and not self._process.facts.get("samples", True):
            raise UserError(
                f"--temperature {temperature}: {self.title} loses it on this device; take 0, or "
                "--engine transformers"
            )

    def _asked(self, request: dict[str, Any], count: int) -> Iterator[Row]:
        """The rows that a request gives; the first request loads the target."""
        with self._loading:
            if not self._loaded:
                self._process.ask({"load": self._load}, max(START_SECONDS, self._seconds))
                self._loaded = True
        answers = self._process.ask(request, self._seconds)
        for path, found in self._parsed(answers, count):
            yield read_row(path, self._taps, found, f"{self.title}: ")

    def _parsed(self, answers: Any, count: int) -> list[tuple[str | None, list[Score]]]:
        """Path and scores of each row of an answer."""
        try:
            found = [(one["path"], [Score(*score) for score in one["scores"]]) for one in answers]
        except (LookupError, TypeError):
            found = []
        if len(found) != count:
            raise UserError(
                f"{self.title}: its answer is not one of {count} rows; see {self._process.log}, "
                f"and {self.remedy}"
            )
        return found

    def close(self) -> None:
        """End the process and remove its files; safe to call again."""
        super().close()
        self._own.close()


def place_seed(seed: int, place: int) -> int:
    """The seed in [0, 2^63) of the prompt at a place of a request."""
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_row(path: str | None, taps: Taps, scores: list[Score], who: str) -> Row:
    """A row out of the safetensors file that vLLM wrote; the file is deleted, no other one is.

    Args:
        path: the file's; None, where vLLM named none.
        taps: what it was asked for.
        scores: the row's.
        who: begins an error.

    Raises:
        UserError: no such file, a damaged one, or another number of states.
    """
    if not isinstance(path, str) or not path:
        raise UserError(
            f"{who}named no file of hidden states; take a vLLM with the method "
            "extract_hidden_states, and start it as docs/engines.md says"
        )
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("no such file")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{who}{path}: not written, not readable here or damaged ({error}); look at its log "
            "and at the room on that disk"
        ) from None
    finally:
        remove_file(path)

    states = tensors.get("hidden_states")  # (S, n, Ht)
    ids = tensors.get("token_ids")
    if states is None or ids is None or states.ndim != 3 or states.shape[1] != len(taps.ids):
        shape = None if states is None else tuple(states.shape)
        raise UserError(
            f"{who}gave states of shape {shape}, not (tokens, {len(taps.ids)}, hidden size) for "
            f"the ids {taps.ids}; it must run with eagle_aux_hidden_state_layer_ids {taps.ids}"
        )
    return Row(ids, states[:, taps.aux], states[:, taps.last], scores)


def remove_file(path: str | None) -> None:
    """Delete a file of states and its lock, if they are there and may be deleted.

    An engine may name any file: what holds no states is not its own, and stays.
    """
    if not path or not _holds_states(path):
        return
    for name in (path, f"{path}.lock"):
        with contextlib.suppress(OSError):
            Path(name).unlink(missing_ok=True)


def _holds_states(path: str) -> bool:
    """Whether a file, and no link to one, is as vLLM writes it."""
    if not os.path.isfile(path) or os.path.islink(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == {"hidden_states", "token_ids"}
    except (OSError, SafetensorError):
        return False
