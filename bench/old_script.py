"""The old tool's two launchers, `main()` and all, on the CPU in this process, with what they compute recorded.

`train_eagle3.py` and `train_eagle3_dataflow.py` of SpecForge's pull request 600 are loaded from `SPECFORGE_SRC` and run
as they stand: arguments, data set, vocabulary map, loader, model, head, optimizer, reports, checkpoints. What stands in
for a GPU and for packages that are not needed here is in `REPLACED`, and nothing else is touched.
"""

import os

os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")  # before torch is loaded

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import fsdp

from eagle3fn.base.errors import UserError
from eagle3fn.testing.oracle import Oracle, OracleMissingError, eager_loss

SCRIPTS = {  # sha256 at the commit
    "train_eagle3.py": "7f9089ea903af3ba4e299c8f691d15fd3fdc638355450c5da3f76d5593f2b718",
    "train_eagle3_dataflow.py": "cc310f522eb082d00f61590dc320515b0872b1f33abef8a26e0c9148c39259e6",
}
REPLACED = (
    "level 2: its Triton loss by the equal eager expression; dynamo off",
    "Tensor.cuda and Module.cuda do nothing; the process group is gloo, of one rank; averages over it are skipped",
    "FullyShardedDataParallel, which refuses a CPU, gives the module back: there is nothing to shard on one rank",
    "rope_theta is set again as an attribute of the draft's configuration, where transformers 5 hides it",
    "sglang, which only names choices of an option, is a stand-in",
)
GROUPS = ("TP", "DP", "DRAFT_DP", "DRAFT_SP", "SP_ULYSSES", "SP_RING")
DECAY = 0.8


class Recorded(NamedTuple):
    """A finished run. Rows are named as in `metrics.jsonl`."""

    rows: list[dict[str, Any]]  # one an update
    shown: list[dict[str, float]]  # what the progress bar shows after each micro-batch, or the logger of the new one
    logged: list[dict[str, Any]]  # what its tracker was given
    state: dict[str, tuple[torch.Tensor, ...]]  # weight, master and both moments by name


class Whole:
    """In the place of `FullyShardedDataParallel`."""

    def __new__(cls, module: torch.nn.Module, **_: Any) -> Any:
        """The module itself."""
        return module

    @staticmethod
    @contextlib.contextmanager
    def state_dict_type(*_: Any) -> Iterator[None]:
        """The state dict is whole anyway."""
        yield


def load_script(oracle: Oracle, name: str) -> ModuleType:
    """One of the launchers as a module.

    Raises:
        OracleMissingError: its file is not the commit's.
    """
    path = Path(str(oracle.optimizer.__file__)).parent.parent / "scripts" / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SCRIPTS[name]:
        raise OracleMissingError(f"{path}: not the commit's file; set SPECFORGE_SRC to a whole checkout")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def stand_in_for_sglang() -> Iterator[None]:
    """Modules that name the choices of one option."""
    absent = [name for name in ("sglang", "sglang.srt", "sglang.srt.server_args") if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name])["ATTENTION_BACKEND_CHOICES"] = ["flashinfer", "fa3", "triton"]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def on_cpu(oracle: Oracle, cache: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Both launchers, while their replacements stand; `cache` is for the data sets they build."""
    for package in ("datasets.config", "accelerate"):  # the checkout's folder datasets/ can be imported too
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise OracleMissingError(
                f"the old script cannot be loaded ({error}): pip install datasets accelerate"
            ) from None
    same = lambda self, *_, **__: self  # noqa: E731
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(stand_in_for_sglang())
        enter(patch.object(fsdp, "FullyShardedDataParallel", Whole))
        enter(patch.object(torch.Tensor, "cuda", same))
        enter(patch.object(torch.nn.Module, "cuda", same))
        enter(patch.object(dist, "all_reduce", _all_reduce))
        enter(patch("datasets.config.HF_DATASETS_CACHE", cache))
        enter(patch.object(importlib.import_module("specforge.distributed"), "init_distributed", _init_distributed))
        enter(eager_loss(oracle))
        old = load_script(oracle, "train_eagle3.py")
        enter(patch.object(old.AutoDraftModelConfig, "from_file", _with_theta(old.AutoDraftModelConfig.from_file)))
        yield old, load_script(oracle, "train_eagle3_dataflow.py")


_reduce = dist.all_reduce


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
    return None if op == dist.ReduceOp.AVG else _reduce(tensor, op, **rest)


def _init_distributed(**_: Any) -> None:
    distributed = importlib.import_module("specforge.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    for name in GROUPS:
        setattr(distributed, f"_{name}_GROUP", dist.group.WORLD)


def _with_theta(read: Any) -> Any:
    def from_file(path: str) -> Any:
        config = read(path)
        rope = getattr(config, "rope_parameters", None) or {}
        config.rope_theta = rope.get("rope_theta", 10_000.0)
        return config

    return from_file


def row_of(step: int, losses: list, accuracy: list, acceptance: list, norm: Any, rate: float) -> dict[str, Any]:
    """One update as a row of `metrics.jsonl`; the loss is summed as the launchers sum it."""
    loss = sum(DECAY**i * value.detach() for i, value in enumerate(losses))
    row = {"step": step, "loss": float(loss), "grad_norm": float(norm), "learning_rate": rate}
    lists = {"losses": losses, "accuracy": accuracy, "acceptance": acceptance}
    return row | {name: [float(value.detach()) for value in values] for name, values in lists.items()}


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
        raise UserError("--draft-accumulation-steps: its report holds the last micro-batch alone; leave it out here")


def run_old(oracle: Oracle, arguments: list[str], out: Path, stored: bool = False) -> Recorded:
    """`train_eagle3.py` with these arguments; `stored`: its loader does not shuffle, nothing else differs."""
    _one_batch(arguments)
    rows, shown, logged, seen = [], [], [], {}
    with on_cpu(oracle, out / "datasets") as (old, _), contextlib.ExitStack() as stack:
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
            return norm

        def get_progress_metrics(*args: Any) -> Any:
            result = progress(*args)
            shown.append({"loss": result[0], "acc": result[1]})
            return result

        tracker = SimpleNamespace(log=lambda values, step: logged.append(values | {"step": step}), close=lambda: None)
        changed = [run_forward, run_backward_and_update, get_progress_metrics]
        for function in changed:
            stack.enter_context(patch.object(old, function.__name__, function))
        stack.enter_context(patch.object(old, "build_tracker", lambda *_: tracker))
        if stored:
            unshuffled = lambda *a, **k: loaders(*a, **(k | {"shuffle": False}))  # noqa: E731
            stack.enter_context(patch.object(old, "prepare_dp_dataloaders", unshuffled))
        _call(old.main, [*arguments, "--output-dir", str(out / "run")], out / "log.txt")
    return Recorded(rows, shown, logged, state_of(seen["optimizer"]))


def run_dataflow(oracle: Oracle, arguments: list[str], out: Path) -> Recorded:
    """`train_eagle3_dataflow.py`, the new launcher of pull request 600, with these arguments."""
    _one_batch(arguments)
    rows, shown, seen = [], [], {}
    with on_cpu(oracle, out / "datasets") as (_, new), contextlib.ExitStack() as stack:
        strategy = importlib.import_module("specforge.runtime.training.strategy").Eagle3TrainStrategy
        core = importlib.import_module("specforge.runtime.training.trainer").TrainerCore
        forward, step = strategy.forward_loss, core.train_step

        def forward_loss(self: Any, batch: Any) -> Any:
            seen["metrics"] = (result := forward(self, batch)).metrics
            return result

        def train_step(self: Any, batch: Any) -> Any:
            seen["optimizer"] = self.backend.optimizer
            rate, result, lists = self.backend.optimizer.get_learning_rate(), step(self, batch), seen["metrics"]
            values = lists["plosses"], lists["acces"], lists["acceptance_rates"]
            rows.append(row_of(len(rows) + 1, *values, result.grad_norm, rate))
            shown.append(result.metrics)
            return result

        stack.enter_context(patch.object(strategy, "forward_loss", forward_loss))
        stack.enter_context(patch.object(core, "train_step", train_step))
        _call(new.main, [*arguments, "--output-dir", str(out / "run")], out / "log.txt")
    return Recorded(rows, shown, [], state_of(seen["optimizer"]))


def _call(main: Any, arguments: list[str], log: Path) -> None:
    """Call `main` with these arguments in `sys.argv`; what it prints goes into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, patch.object(sys, "argv", ["main", *arguments]), contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        main()
