"""A draft's logits in another program, on rows that are given or that the program names.

    with open_logits("vllm", python, target, draft, settings, log) as engine:
        rows = engine.logits(prompt_ids, None)

An engine that holds the target as well takes a prompt and says on which features its draft ran; one
that holds the draft alone is given them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.engines.process import EngineClient, EngineProcess, scratch


class Chain(NamedTuple):
    """A proposal: the rows that the draft reads, and the tokens that it drafts after them."""

    aux: Tensor  # the target's features of the rows, (R, A·Ht), fp32
    next_ids: Tensor  # the token after each row, (R,)
    drafted: Tensor  # target ids, (K,)


class Engine(NamedTuple):
    """What is known of a program that gives logits."""

    program: str  # file of `engines/programs/`
    given: bool  # it is given the rows; else it takes a prompt
    environment: dict[str, str]


ENGINES = {
    "vllm": Engine(
        "vllm_logits.py", False, {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    ),
    "speculators": Engine("speculators_logits.py", True, {"HF_HUB_OFFLINE": "1"}),
    "eagle": Engine("eagle_decode.py", True, {"HF_HUB_OFFLINE": "1"}),
}


@dataclass(frozen=True)
class LogitSettings:
    """What a program starts with.

    Attributes:
        positions: tokens that it has room for.
        draft_length: K, tokens drafted after a prompt.
        taps: the target's tapped layers, counted from 0.
        threads: on a CPU.
        arguments: further arguments of the program's own, by its names.
    """

    positions: int
    draft_length: int
    taps: Sequence[int]
    threads: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


class LogitEngine(EngineClient):
    """A program that holds a draft; a context manager."""

    def __init__(self, process: EngineProcess, given: bool) -> None:
        self.version = str(process.facts["version"])
        self.given = given
        super().__init__(process)
        self._own = ExitStack()
        self._folder = self._own.enter_context(scratch("logits"))

    def logits(self, prompt_ids: Sequence[int], chain: Chain) -> tuple[Chain, Tensor]:
        """The draft's logits of each step of a proposal.

        Args:
            prompt_ids: token ids of the prompt that the proposal follows.
            chain: our proposal, for a program that is given the rows.

        Returns:
            The proposal, the given one or the program's own, and the logits `(K, D)`, or `(K, V)`
            from a program that spreads them over the target's vocabulary.

        Raises:
            UserError: the program reports a fault, died, or took too long.
        """
        out = self._folder / "out.safetensors"
        request: dict[str, Any] = {"prompt": list(prompt_ids), "out": str(out)}
        if self.given:
            rows = out.with_name("rows.safetensors")
            tensors = {name: value.contiguous() for name, value in chain._asdict().items()}
            save_file(tensors, rows)
            request["rows"] = str(rows)

        self._process.ask(request)
        found = load_file(out)
        logits = found.pop("logits")
        wanted = (len(found["drafted"]), logits.shape[-1])
        if tuple(logits.shape) != wanted or len(found["aux"]) != len(found["next_ids"]):
            shapes = {name: tuple(value.shape) for name, value in found.items()}
            raise UserError(
                f"{self._process.engine}: gave logits {tuple(logits.shape)} for {shapes}; "
                f"see {self._process.log}"
            )
        return Chain(**found), logits

    def close(self) -> None:
        """End the program and remove its files; safe to call again."""
        super().close()
        self._own.close()


def open_logits(
    engine: str,
    python: str | Path,
    target: str | Path,
    draft: str | Path,
    settings: LogitSettings,
    log: str | Path,
) -> LogitEngine:
    """Start a program with a draft, in fp32.

    Args:
        engine: a key of `ENGINES`.
        python: the Python of an environment that has it.
        target: the target's folder.
        draft: exported folder.
        settings: what it starts with.
        log: file for what the program prints; replaced.

    Raises:
        UserError: the program is missing, refuses the draft, or dies.
    """
    known = ENGINES[engine]
    values = {
        "target": str(target),
        "draft": str(draft),
        "positions": settings.positions,
        "draft_length": settings.draft_length,
        "taps": list(settings.taps),
        "threads": settings.threads,
        "end_tokens": [0],  # nothing is decoded to its end
        "dtype": "float32",
        "arguments": dict(settings.arguments),
    }
    process = EngineProcess(
        engine, python, known.program, values, log, environment=known.environment
    )
    return LogitEngine(process, known.given)
