"""SpecForge's two launchers, `main()` and all, in this process, with what they compute recorded.

`train_eagle3.py` and `train_eagle3_dataflow.py` of SpecForge's pull request 600 are loaded from
`SPECFORGE_SRC` and run unchanged: arguments, data set, vocabulary map, loader, model, head,
optimizer, reports, checkpoints. What replaces a GPU, or packages that are not needed here, depends
on the device (bench/replacements.py); a finished run names it.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor

from bench.replacements import on_device
from bench.sides import weighted_sum
from eagle3fn.base.errors import UserError
from eagle3fn.specforge.oracle import Oracle, OracleMissingError
from eagle3fn.train.track import append_row

SCRIPTS = {  # sha256 at the commit
    "train_eagle3.py": "7f9089ea903af3ba4e299c8f691d15fd3fdc638355450c5da3f76d5593f2b718",
    "train_eagle3_dataflow.py": "cc310f522eb082d00f61590dc320515b0872b1f33abef8a26e0c9148c39259e6",
}
NOT_SAVED = "SpecForge's checkpoints are not written"


class LeafState(NamedTuple):
    """A trained leaf of SpecForge's optimizer."""

    weights: Tensor
    masters: Tensor
    mu: Tensor
    nu: Tensor


class Recorded(NamedTuple):
    """A finished run. Rows are named as in `metrics.jsonl`."""

    rows: list[dict[str, Any]]  # one an update
    # What the progress bar shows after each micro-batch; of the dataflow launcher what it logs.
    shown: list[dict[str, float]]
    logged: list[dict[str, Any]]  # what its tracker was given
    state: dict[str, LeafState]  # by the leaf's name
    replaced: tuple[str, ...]  # what was not SpecForge's own


class StepLists(NamedTuple):
    """What one update computes at each unroll step."""

    losses: Sequence[Tensor]
    accuracy: Sequence[Tensor]
    acceptance: Sequence[Tensor]


def script_path(oracle: Oracle, name: str) -> Path:
    """Where one of the launchers is.

    Raises:
        OracleMissingError: it is not there, or not the commit's file.
    """
    path = Path(str(oracle.optimizer.__file__)).parent.parent / "scripts" / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SCRIPTS[name]:
        raise OracleMissingError(
            f"{path}: not the commit's file; set SPECFORGE_SRC to a whole checkout"
        )
    return path


def load_script(oracle: Oracle, name: str) -> ModuleType:
    """One of the launchers as a module.

    Raises:
        OracleMissingError: as `script_path`.
    """
    path = script_path(oracle, name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def row_of(step: int, lists: StepLists, norm: Any, rate: float) -> dict[str, Any]:
    """One update as a row of `metrics.jsonl`; the loss is summed as the launchers sum it."""
    loss = weighted_sum([value.detach() for value in lists.losses])
    row: dict[str, Any] = {
        "step": step,
        "loss": float(loss),
        "grad_norm": float(norm),
        "learning_rate": rate,
    }
    for name, values in lists._asdict().items():
        row[name] = [float(value.detach()) for value in values]
    return row


def state_of(optimizer: Any) -> dict[str, LeafState]:
    """Weight, master and both moments of every trained leaf."""
    names = [name for name, leaf in optimizer.model.named_parameters() if leaf.requires_grad]
    moments = optimizer.optimizer.state
    state = {}
    for name, leaf, master in zip(
        names, optimizer.model_params, optimizer.fp32_params, strict=True
    ):
        mu = moments[master]["exp_avg"]
        nu = moments[master]["exp_avg_sq"]
        state[name] = LeafState(leaf.detach(), master.detach(), mu, nu)
    return state


def _refuse_accumulation(arguments: list[str]) -> None:
    if "--draft-accumulation-steps" in arguments:
        raise UserError(
            "--draft-accumulation-steps: its report holds the last micro-batch alone; "
            "leave it out here"
        )


class _Recorder:
    """Wraps the functions of `train_eagle3.py` that compute, and keeps what they return."""

    def __init__(self, script: ModuleType, metrics: Path) -> None:
        self.script = script
        self.metrics = metrics
        self.rows: list[dict[str, Any]] = []
        self.shown: list[dict[str, float]] = []
        self.logged: list[dict[str, Any]] = []
        self.optimizer: Any = None
        self._lists: Any = None
        self._forward = script.run_forward
        self._update = script.run_backward_and_update
        self._progress = script.get_progress_metrics

    def functions(self) -> dict[str, Any]:
        """What replaces the script's own, by name."""
        tracker = SimpleNamespace(log=self.log, close=lambda: None)
        return {
            "run_forward": self.run_forward,
            "run_backward_and_update": self.run_backward_and_update,
            "get_progress_metrics": self.get_progress_metrics,
            "build_tracker": lambda *_: tracker,
        }

    def run_forward(self, *args: Any) -> Any:
        """The script's; its lists are kept."""
        self._lists = self._forward(*args)
        return self._lists

    def run_backward_and_update(
        self, args: Any, losses: list[Tensor], optimizer: Any, step: int
    ) -> Any:
        """The script's; the update becomes a row, in the file too."""
        rate = optimizer.get_learning_rate()
        self.optimizer = optimizer
        norm = self._update(args, losses, optimizer, step)

        lists = StepLists(losses, accuracy=self._lists[1], acceptance=self._lists[2])
        row = row_of(step, lists, norm, rate)
        self.rows.append(row)
        append_row(self.metrics, row)
        return norm

    def get_progress_metrics(self, *args: Any) -> Any:
        """The script's; what the progress bar shows is kept."""
        result = self._progress(*args)
        self.shown.append({"loss": result[0], "acc": result[1]})
        return result

    def log(self, values: dict[str, Any], step: int) -> None:
        """In the place of a tracker's."""
        self.logged.append(values | {"step": step})


def run_script(
    oracle: Oracle,
    arguments: list[str],
    out: Path,
    stored: bool = False,
    device: str = "cpu",
    conversations: bool = True,
    saves: bool = True,
) -> Recorded:
    """`train_eagle3.py` with these arguments.

    Rows go into `OUT/metrics.jsonl` as they come, also of a run that fails.

    Args:
        oracle: SpecForge at its commit.
        arguments: the script's, without `--output-dir`.
        out: the folder that all it writes goes into.
        stored: its loader does not shuffle, nothing else differs.
        device: "cpu" or "cuda".
        conversations: False: they are not read; see `replacements`.
        saves: False: its checkpoints are not written.
    """
    _refuse_accumulation(arguments)
    metrics = out / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    cache = out / "datasets" if conversations else None
    with on_device(oracle, device, cache) as replaced, contextlib.ExitStack() as stack:
        script = load_script(oracle, "train_eagle3.py")
        recorder = _Recorder(script, metrics)
        changed = recorder.functions()
        if stored:
            loaders = script.prepare_dp_dataloaders
            changed["prepare_dp_dataloaders"] = lambda *args, **more: loaders(
                *args, **(more | {"shuffle": False})
            )
        if not saves:
            changed["save_checkpoints"] = lambda *_: None

        for name, function in changed.items():
            stack.enter_context(patch.object(script, name, function))
        _call(script.main, [*arguments, "--output-dir", str(out / "run")], out / "log.txt")
    state = state_of(recorder.optimizer)
    if not saves:
        replaced = (*replaced, NOT_SAVED)
    return Recorded(recorder.rows, recorder.shown, recorder.logged, state, replaced)


def run_dataflow(oracle: Oracle, arguments: list[str], out: Path, device: str = "cpu") -> Recorded:
    """`train_eagle3_dataflow.py`, pull request 600's new launcher, with these arguments."""
    _refuse_accumulation(arguments)
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, float]] = []
    seen: dict[str, Any] = {}
    with on_device(oracle, device, out / "datasets") as replaced, contextlib.ExitStack() as stack:
        launcher = load_script(oracle, "train_eagle3_dataflow.py")
        strategies = importlib.import_module("specforge.runtime.training.strategy")
        trainers = importlib.import_module("specforge.runtime.training.trainer")
        forward = strategies.Eagle3TrainStrategy.forward_loss
        step = trainers.TrainerCore.train_step

        def forward_loss(self: Any, batch: Any) -> Any:
            result = forward(self, batch)
            seen["metrics"] = result.metrics
            return result

        def train_step(self: Any, batch: Any) -> Any:
            seen["optimizer"] = self.backend.optimizer
            rate = self.backend.optimizer.get_learning_rate()
            result = step(self, batch)
            found = seen["metrics"]
            lists = StepLists(found["plosses"], found["acces"], found["acceptance_rates"])
            rows.append(row_of(len(rows) + 1, lists, result.grad_norm, rate))
            shown.append(result.metrics)
            return result

        put = stack.enter_context
        put(patch.object(strategies.Eagle3TrainStrategy, "forward_loss", forward_loss))
        put(patch.object(trainers.TrainerCore, "train_step", train_step))
        _call(launcher.main, [*arguments, "--output-dir", str(out / "run")], out / "log.txt")
    return Recorded(rows, shown, [], state_of(seen["optimizer"]), replaced)


def _call(main: Any, arguments: list[str], log: Path) -> None:
    """Call `main` with these arguments in `sys.argv`.

    What it prints goes into `log`, its warnings too, whatever filters the caller has.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        patch.object(sys, "argv", ["main", *arguments]),
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        warnings.catch_warnings(action="default"),
    ):
        main()
