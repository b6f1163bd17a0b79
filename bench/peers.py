"""Other projects' training steps as sides, each in a process of its own.

| side | what it is |
|---|---|
| `speculators` | vLLM's speculators at the version of scripts/speculators-requirements.txt |
| `specforge_main` | as `specforge`, from the checkout that SPECFORGE_MAIN_SRC names |

A process makes its side on the same problem, answers with its memory and first loss, and then makes
a step whenever it is asked (`bench.answers`); between two steps it is blocked.

speculators has an environment of its own, made here where it is missing. SpecForge's main branch
runs in this one, so that it differs from `specforge` by its source alone.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from bench.common import ROOT, Elsewhere
from bench.problem import Problem
from eagle3fn.base.provenance import git_revision
from eagle3fn.base.types import Params

NAMES = ("speculators", "specforge_main")
FOLDER = ROOT / ".venv-peers"
REQUIREMENTS = ROOT / "scripts" / "speculators-requirements.txt"
SOURCE = "SPECFORGE_MAIN_SRC"
STAMP = ".stamp"  # written into an environment when it is complete
ON_CPU = "it is run on the CPU only"
READY_S = 1800.0  # for imports and the first steps
STEP_S = 900.0  # for one step
END_S = 20.0  # for a process to end by itself


class PeerError(Exception):
    """A side cannot be used, or its process ended; the message says which and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Peer:
    """A side's process.

    Args:
        name: of the side.
        command: what is run; it answers as `bench.answers` says.
        variables: that its environment has besides ours.

    Raises:
        PeerError: it ended, or did not answer in time.
    """

    def __init__(self, name: str, command: Sequence[str], variables: dict[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.ready = self._answer(READY_S)
        except PeerError:
            self.close()
            raise

    def step(self) -> Elsewhere:
        """One step."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return Elsewhere(**self._answer(STEP_S))

    def close(self) -> None:
        """End the process: it reads no further line; if that is not enough it is killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._wait()
        self.process.stdout.close()

    def _wait(self) -> int:
        """Its exit code; a process that does not end is killed."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _answer(self, limit: float) -> dict[str, Any]:
        """The next line; it is short, so that it comes whole."""
        stdout = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], limit)[0]:
            self.process.kill()
            raise PeerError(self.name, f"its process gave no answer in {limit:g} s")
        line = stdout.readline()
        if not line:
            raise self._ended()
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            said = line.decode(errors="replace").strip()
            raise PeerError(self.name, f"its process answered {said!r}") from None

    def _ended(self) -> PeerError:
        reason = f"its process ended with exit code {self._wait()}; the reason is on stderr"
        return PeerError(self.name, reason)


class Peers(NamedTuple):
    """The sides that run, and why others do not."""

    running: dict[str, Peer]
    missing: dict[str, str]

    def drop(self, error: PeerError) -> None:
        """Leave a side out from now on."""
        self.running.pop(error.name).close()
        self.missing[error.name] = error.reason

    def describe(self) -> dict[str, Any]:
        """For a result: each side's versions, notes and own first loss, or why it is left out."""
        about: dict[str, Any] = {}
        for name, peer in self.running.items():
            hidden = ("memory", "first_loss")
            about[name] = {key: value for key, value in peer.ready.items() if key not in hidden}
        for name, reason in self.missing.items():
            about[name] = {"missing": reason}
        return about


def said(about: dict[str, Any]) -> str:
    """A side of a result in one line: its versions or files, or why it is left out."""
    if "missing" in about:
        return f"left out: {about['missing']}"
    if "specforge" in about:
        found = about["specforge"]
        return f"{found['kind']} {found['digest'][:16]}, revision {about['revision']}"
    return ", ".join(f"{name} {value}" for name, value in about["versions"].items())


class Case(NamedTuple):
    """What a side is made on: a problem and what is done with it."""

    problem: Problem
    params: Params
    k: int
    decay: float


@contextlib.contextmanager
def started(
    names: Sequence[str],
    case: Callable[[], Case],
    tiny: Callable[[], Case],
    arguments: Sequence[str],
    folder: Path,
) -> Iterator[Peers]:
    """Start these sides; those that cannot be used are said to be missing.

    Args:
        names: of `NAMES`.
        case: makes what is measured.
        tiny: makes a small case, of which one step loads a side's libraries.
        arguments: `bench.step`'s, by which it makes the same problem again.
        folder: of the environments.
    """
    peers = Peers({}, {})
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                if name == "speculators":
                    peer = _speculators(name, environment(name, folder), (case, tiny))
                else:
                    peer = _specforge_main(name, arguments)
            except PeerError as error:
                peers.missing[name] = error.reason
            else:
                stack.callback(peer.close)
                peers.running[name] = peer
        yield peers


def _speculators(name: str, python: str, cases: Sequence[Callable[[], Case]]) -> Peer:
    """speculators, from its own environment; it gets the cases as files."""
    with TemporaryDirectory(prefix="eagle3fn-peers-") as folder:
        paths = []
        for number, case in enumerate(cases):
            paths.append(Path(folder, f"{number}.safetensors"))
            write_case(paths[-1], case())
        command = [python, "bench/speculators_step.py", *map(str, paths)]
        return Peer(name, command, {"HF_HUB_OFFLINE": "1"})


def _specforge_main(name: str, arguments: Sequence[str]) -> Peer:
    """SpecForge's main branch: `bench.step`'s side of SpecForge, from another checkout."""
    source = os.environ.get(SOURCE)
    if not source or not Path(source).is_dir():
        raise PeerError(name, f"{SOURCE} must name a checkout of SpecForge, it is {source!r}")
    command = [sys.executable, "-m", "bench.step", *arguments, "--serve", "specforge"]
    peer = Peer(name, command, {"SPECFORGE_SRC": source})
    peer.ready["revision"] = git_revision(Path(source))
    return peer


def write_case(path: Path, case: Case) -> None:
    """A case as a safetensors file: parameters, frozen tensors and batch by name.

    Its head has draft, K, decay and dtype.
    """
    tensors = {f"params.{name}": value for name, value in case.params.items()}
    for group in ("frozen", "batch"):
        for name, value in getattr(case.problem, group)._asdict().items():
            if isinstance(value, torch.Tensor):
                tensors[f"{group}.{name}"] = value.contiguous()
    head = {
        "draft": json.dumps(asdict(case.problem.draft)),
        "k": str(case.k),
        "decay": str(case.decay),
        "dtype": str(next(iter(case.params.values())).dtype).removeprefix("torch."),
    }
    save_file(tensors, path, head)


def stamp() -> str:
    """What an environment was made of."""
    return REQUIREMENTS.read_text(encoding="utf-8")


def environment(name: str, folder: Path) -> str:
    """The interpreter of a side's environment, made where it is missing or of other requirements.

    Raises:
        PeerError: an installation failed.
    """
    made = folder / name
    python = made / "bin" / "python"
    mark = made / STAMP
    if mark.is_file() and mark.read_text(encoding="utf-8") == stamp():
        return str(python)

    print(f"installing {name} into {made}", file=sys.stderr)
    calls = (
        [sys.executable, "-m", "venv", "--clear", str(made)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)],
    )
    for call in calls:
        try:
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        except OSError as error:
            raise PeerError(name, f"its environment cannot be made: {error}") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            words = " ".join(call[1:4])
            raise PeerError(name, f"{words} failed: {lines[-1]}")
    mark.write_text(stamp(), encoding="utf-8")
    return str(python)
