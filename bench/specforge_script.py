"""SpecForge's two launchers, `main()` and all, in this process, with what they compute recorded.

`train_eagle3.py` and `train_eagle3_dataflow.py` of SpecForge's pull request 600 are loaded from `SPECFORGE_SRC` and run
as they stand: arguments, data set, vocabulary map, loader, model, head, optimizer, reports, checkpoints. What stands in
for a GPU, or for packages that are not needed here, is chosen by the device in bench/replacements.py; a finished run
names it.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.replacements import on_device
from eagle3fn.base.errors import UserError
from eagle3fn.specforge.oracle import Oracle, OracleMissingError
from eagle3fn.train.track import append_row

SCRIPTS = {  # sha256 at the commit
    "train_eagle3.py": "7f9089ea903af3ba4e299c8f691d15fd3fdc638355450c5da3f76d5593f2b718",
    "train_eagle3_dataflow.py": "cc310f522eb082d00f61590dc320515b0872b1f33abef8a26e0c9148c39259e6",
}
DECAY = 0.8
NOT_SAVED = "SpecForge's checkpoints are not written"


class Recorded(NamedTuple):
    """A finished run. Rows are named as in `metrics.jsonl`."""

    rows: list[dict[str, Any]]  # one an update
    shown: list[
        dict[str, float]
    ]  # what the progress bar shows after each micro-batch, or the logger of the new one
    logged: list[dict[str, Any]]  # what its tracker was given
    state: dict[str, tuple[torch.Tensor, ...]]  # weight, master and both moments by name
    replaced: tuple[str, ...]  # what was not SpecForge's own


def script_path(oracle: Oracle, name: str) -> Path:
    """Where one of the launchers lies.

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
    """One of the launchers as a module; raises as `script_path`."""
    path = script_path(oracle, name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def row_of(
    step: int, losses: list, accuracy: list, acceptance: list, norm: Any, rate: float
) -> dict[str, Any]:
    """One update as a row of `metrics.jsonl`; the loss is summed as the launchers sum it."""
    loss = sum(DECAY**i * value.detach() for i, value in enumerate(losses))
    row = {"step": step, "loss": float(loss), "grad_norm": float(norm), "learning_rate": rate}
    lists = {"losses": losses, "accuracy": accuracy, "acceptance": acceptance}
    return row | {
        name: [float(value.detach()) for value in values] for name, values in lists.items()
    }


def state_of(optimizer: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    """Weight, master and both moments of every trained leaf."""
    names = [name for name, leaf in optimizer.model.named_parameters() if leaf.requires_grad]
    moments = optimizer.optimizer.state
    leaves = zip(names, optimizer.model_params, optimizer.fp32_params, strict=True)
    return {
        name: (leaf.detach(), m.detach(), *(moments[m][k] for k in ("exp_avg", "exp_avg_sq")))
        for name, leaf, m in leaves
    }


def _one_batch(arguments: list[str]) -> None:
    if "--draft-accumulation-steps" in arguments:
        raise UserError(
            "--draft-accumulation-steps: its report holds the last micro-batch alone; leave it out here"
        )


def run_old(
    oracle: Oracle,
    arguments: list[str],
    out: Path,
    stored: bool = False,
    device: str = "cpu",
    conversations: bool = True,
    saves: bool = True,
) -> Recorded:
    """`train_eagle3.py` with these arguments. Rows go into `OUT/metrics.jsonl` as they come, also of a run that fails.

    Args:
        oracle: SpecForge at its commit.
        arguments: the script's, without `--output-dir`.
        out: the folder that all it writes goes into.
        stored: its loader does not shuffle, nothing else differs.
        device: "cpu" or "cuda".
        conversations: False: they are not read; see `replacements`.
        saves: False: its checkpoints are not written.
    """
    _one_batch(arguments)
    rows, shown, logged, seen, more = [], [], [], {}, []
    (out / "metrics.jsonl").unlink(missing_ok=True)
    cache = out / "datasets" if conversations else None
    with on_device(oracle, device, cache) as replaced, contextlib.ExitStack() as stack:
        old = load_script(oracle, "train_eagle3.py")
        forward, update, progress, loaders = (
            old.run_forward, old.run_backward_and_update, old.get_progress_metrics, old.prepare_dp_dataloaders
        )  # fmt: skip

        def run_forward(*args: Any) -> Any:
            seen["lists"] = forward(*args)
            return seen["lists"]

        def run_backward_and_update(args: Any, losses: list, optimizer: Any, step: int) -> Any:
            rate, seen["optimizer"] = optimizer.get_learning_rate(), optimizer
            norm = update(args, losses, optimizer, step)
            rows.append(row_of(step, losses, seen["lists"][1], seen["lists"][2], norm, rate))
            append_row(out / "metrics.jsonl", rows[-1])
            return norm

        def get_progress_metrics(*args: Any) -> Any:
            result = progress(*args)
            shown.append({"loss": result[0], "acc": result[1]})
            return result

        tracker = SimpleNamespace(
            log=lambda values, step: logged.append(values | {"step": step}), close=lambda: None
        )
        changed = [run_forward, run_backward_and_update, get_progress_metrics]
        for function in changed:
            stack.enter_context(patch.object(old, function.__name__, function))
        stack.enter_context(patch.object(old, "build_tracker", lambda *_: tracker))
        if stored:
            unshuffled = lambda *a, **k: loaders(*a, **(k | {"shuffle": False}))  # noqa: E731
            stack.enter_context(patch.object(old, "prepare_dp_dataloaders", unshuffled))
        if not saves:
            more.append(NOT_SAVED)
            stack.enter_context(patch.object(old, "save_checkpoints", lambda *_: None))
        _call(old.main, [*arguments, "--output-dir", str(out / "run")], out / "log.txt")
    return Recorded(rows, shown, logged, state_of(seen["optimizer"]), (*replaced, *more))


def run_dataflow(oracle: Oracle, arguments: list[str], out: Path, device: str = "cpu") -> Recorded:
    """`train_eagle3_dataflow.py`, the new launcher of pull request 600, with these arguments."""
    _one_batch(arguments)
    rows, shown, seen = [], [], {}
    with on_device(oracle, device, out / "datasets") as replaced, contextlib.ExitStack() as stack:
        new = load_script(oracle, "train_eagle3_dataflow.py")
        strategy = importlib.import_module(
            "specforge.runtime.training.strategy"
        ).Eagle3TrainStrategy
        core = importlib.import_module("specforge.runtime.training.trainer").TrainerCore
        forward, step = strategy.forward_loss, core.train_step

        def forward_loss(self: Any, batch: Any) -> Any:
            seen["metrics"] = (result := forward(self, batch)).metrics
            return result

        def train_step(self: Any, batch: Any) -> Any:
            seen["optimizer"] = self.backend.optimizer
            rate, result, lists = (
                self.backend.optimizer.get_learning_rate(),
                step(self, batch),
                seen["metrics"],
            )
            values = lists["plosses"], lists["acces"], lists["acceptance_rates"]
            rows.append(row_of(len(rows) + 1, *values, result.grad_norm, rate))
            shown.append(result.metrics)
            return result

        stack.enter_context(patch.object(strategy, "forward_loss", forward_loss))
        stack.enter_context(patch.object(core, "train_step", train_step))
        _call(new.main, [*arguments, "--output-dir", str(out / "run")], out / "log.txt")
    return Recorded(rows, shown, [], state_of(seen["optimizer"]), replaced)


def _call(main: Any, arguments: list[str], log: Path) -> None:
    """Call `main` with these arguments in `sys.argv`; what it prints goes into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        patch.object(sys, "argv", ["main", *arguments]),
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        main()
