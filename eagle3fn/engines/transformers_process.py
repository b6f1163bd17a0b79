"""Hidden states from transformers in a process of its own, with the bits of this process."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eagle3fn.base.errors import UserError
from eagle3fn.engines.hidden_states import Row, Score, Writing
from eagle3fn.engines.process import (
    ANSWER_SECONDS,
    START_SECONDS,
    EngineClient,
    EngineProcess,
    scratch,
)


class TransformersProcess(EngineClient):
    """The target in another process, by this package; a context manager that ends it.

    Rows that are asked for together are one batch, padded on the right to the longest: the run of
    `data.sources.run_target`, with its bits where versions, device and threads are the same.
    """

    normed = True
    remedy = "look at the target's weights and dtype"

    def __init__(
        self,
        python: str | Path,
        target: str | Path,
        layers: Sequence[int],
        log: str | Path,
        *,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        threads: int | None = None,
        seconds: float = ANSWER_SECONDS,
        abandoned: threading.Event | None = None,
    ) -> None:
        """Start the process, which loads the target.

        Args:
            python: of the environment that has torch and transformers; this one's is
                `sys.executable`.
            target: the target's folder or id.
            layers: the tapped decoder layers, ascending and counted from 0.
            log: file for what it prints; replaced.
            max_length: tokens of the longest row, answers included.
            dtype: what it computes in; None: bfloat16, or on a CPU what that multiplies fast.
            device: torch's, or "auto" to spread the layers over all cards.
            threads: CPU threads; None leaves the number to torch.
            seconds: the longest time for an answer.
            abandoned: as of `EngineProcess`.

        Raises:
            EngineGone: it died while it started, took too long or is abandoned.
            UserError: no such Python, or as `data.target.load_target` and
                `data.sources.check_extraction`.
        """
        settings = {
            "target": str(Path(target).resolve()) if Path(target).is_dir() else str(target),
            "layers": list(layers),
            "max_length": max_length,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "device": device,
            "threads": threads,
        }
        limits = None if threads is None else {"OMP_NUM_THREADS": str(threads)}
        with ExitStack() as own:
            self._folder = own.enter_context(scratch("transformers"))
            process = EngineProcess(
                "transformers",
                python,
                "transformers_states.py",
                settings,
                log,
                environment=limits,
                seconds=max(START_SECONDS, seconds),
                abandoned=abandoned,
            )
            self._own = own.pop_all()
        super().__init__(process)

        facts = self._process.facts
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        self.title = f"transformers {facts['version']}"
        self.record: dict[str, Any] = {
            "name": "transformers",
            "version": facts["version"],
            "device": facts["device"],
        }
        self._numbers = count()
        self._seconds = seconds

    def rows(self, rows: Sequence[Sequence[int]], scores: bool) -> Iterator[Row]:
        """As `HiddenStates.rows`: one batch."""
        yield from self._asked({"rows": [list(row) for row in rows], "scores": scores})

    def write(self, prompts: Sequence[Sequence[int]], writing: Writing) -> Iterator[Row]:
        """As `Writer.write`; the bits are those of `data.sources.model_source`'s."""
        yield from self._asked(
            {
                "write": [list(prompt) for prompt in prompts],
                "sampling": [writing.temperature, writing.top_p, writing.max_new],
                "stops": writing.stops,
                "seed": writing.seed,
                "batch_tokens": writing.batch_tokens,
            }
        )

    def _asked(self, request: dict[str, Any]) -> list[Row]:
        """The rows that a request gives, out of a file of its own, which is deleted."""
        path = self._folder / f"{next(self._numbers)}.safetensors"
        try:
            found = self._process.ask({**request, "file": str(path)}, self._seconds)
            tensors = load_file(path)
            scores = [[Score(*score) for score in row] for row in found["scores"]]
            return [
                Row(
                    tensors[f"ids.{number}"],
                    tensors[f"aux.{number}"],
                    tensors[f"last.{number}"],
                    scores[number] if scores else [],
                )
                for number in range(found["rows"])
            ]
        except (OSError, SafetensorError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.title}: {path}: not written or damaged ({error}); look at "
                f"{self._process.log} and at the room on that disk"
            ) from None
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the process and remove its files; safe to call again."""
        super().close()
        self._own.close()
