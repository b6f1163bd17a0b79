"""What is replaced while a launcher of SpecForge runs in this process.

`replacements` chooses, by the device; `on_device` puts the replacements in their places and names
them. On the CPU they are for what needs a card; everywhere for packages that are not installed and
not needed.
"""

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import fsdp

from eagle3fn.base.errors import UserError
from eagle3fn.specforge.oracle import Oracle, OracleMissingError, eager_loss

SGLANG = ("sglang", "sglang.srt", "sglang.srt.server_args")
# The names that SpecForge's arguments import from sglang.
SGLANG_NAMES = {"ATTENTION_BACKEND_CHOICES": ["flashinfer", "fa3", "triton"]}
# SpecForge's process groups; of one rank all are the world.
GROUPS = ("TP", "DP", "DRAFT_DP", "DRAFT_SP", "SP_ULYSSES", "SP_RING")


class Replacement(NamedTuple):
    """Something that takes the place of something else."""

    about: str  # what replaces what, for a result
    enter: Callable[[], AbstractContextManager[Any]]  # it does so while this is open


def replacements(oracle: Oracle, device: str, cache: Path | None) -> list[Replacement]:
    """All replacements on that device.

    Args:
        oracle: SpecForge.
        device: "cpu" or "cuda".
        cache: for the data sets that it makes of conversations; None: they are not read, and
            the vocabulary map must be where it looks for one.

    Raises:
        OracleMissingError: conversations are to be read, and `datasets` is not installed.
    """
    chosen = [
        Replacement(
            "sglang, which only names choices of an option, is a stand-in",
            lambda: stand_in({name: SGLANG_NAMES for name in SGLANG if name not in sys.modules}),
        ),
        Replacement(
            "rope_theta is an attribute of the draft's configuration also under transformers 5",
            _rope_theta_set,
        ),
    ]
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        chosen.append(Replacement("dynamo is off", contextlib.nullcontext))
    for package in PACKAGES:
        if not _is_there(package.name):
            about = f"{package.name}, which only {package.use}, is a stand-in"
            chosen.append(Replacement(about, partial(stand_in, package.modules)))
    chosen.append(_conversations(cache))
    chosen += _without_card(oracle) if device == "cpu" else _with_card()
    return chosen


def _conversations(cache: Path | None) -> Replacement:
    if cache is None:
        return Replacement(
            "datasets is a stand-in and conversations are not read: the vocabulary map, all that "
            "would come of them, is there already",
            lambda: stand_in({"datasets": {"Dataset": Unread}}),
        )
    if not _is_there("datasets.config"):  # the checkout's folder datasets/ can be imported too
        raise OracleMissingError(
            "SpecForge reads conversations with datasets: pip install datasets"
        )
    return Replacement(
        "data sets are cached in the run's folder",
        lambda: patch("datasets.config.HF_DATASETS_CACHE", cache),
    )


def _with_card() -> list[Replacement]:
    """With a card nothing of its work is replaced: transfers, loss kernel, NCCL of one rank, FSDP.

    On one rank FSDP shards nothing, but makes every parameter a view of one flat tensor. With
    `use_orig_params=True`, as the script has it, they keep their names and their places in the
    optimizer, and nothing is rounded on the way: the gradients are consecutive parts of a flat one.
    So state and bits can be compared.
    """
    return [Replacement("torchrun, of which one rank's environment is set here", _announced)]


def _without_card(oracle: Oracle) -> list[Replacement]:
    distributed = importlib.import_module("specforge.distributed")

    def put(about: str, of: Any, name: str, value: Any) -> Replacement:
        return Replacement(about, lambda: patch.object(of, name, value))

    loss = "level 2: its Triton loss by the equal eager expression"
    gloo = "the process group is gloo, of one rank"
    whole = (
        "FullyShardedDataParallel, which refuses a CPU, gives the module back: "
        "there is nothing to shard on one rank"
    )
    return [
        Replacement(loss, lambda: eager_loss(oracle)),
        put("no card is seen", torch.cuda, "is_available", lambda: False),
        put("Tensor.cuda does nothing", torch.Tensor, "cuda", _itself),
        put("Module.cuda does nothing", torch.nn.Module, "cuda", _itself),
        put(gloo, distributed, "init_distributed", _init_distributed),
        put("averages over the process group are skipped", dist, "all_reduce", _all_reduce),
        put(whole, fsdp, "FullyShardedDataParallel", Whole),
    ]


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


@contextlib.contextmanager
def on_device(oracle: Oracle, device: str, cache: Path | None) -> Iterator[tuple[str, ...]]:
    """Replace while this is open, and name what is replaced. The launchers must be loaded inside.

    The process group of a launcher that failed is destroyed.
    """
    chosen = replacements(oracle, device, cache)
    own_group = dist.is_initialized()
    with contextlib.ExitStack() as stack:
        for replacement in chosen:
            stack.enter_context(replacement.enter())
        try:
            yield tuple(replacement.about for replacement in chosen)
        finally:
            if dist.is_initialized() and not own_group:
                dist.destroy_process_group()


@contextlib.contextmanager
def stand_in(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Modules with nothing but these names, in the place of those that are there."""
    kept = {name: sys.modules.get(name) for name in modules}
    for name, values in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(values, __spec__=ModuleSpec(name, None), __path__=[])
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


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


class Unread:
    """In the place of `datasets.Dataset` where its samples are not needed."""

    column_names = ("conversations",)

    @classmethod
    def from_generator(cls, **_: Any) -> "Unread":
        """The generator is not called."""
        return cls()

    def shuffle(self, **_: Any) -> "Unread":
        """Itself."""
        return self

    def map(self, *_: Any, **__: Any) -> "Unread":
        """Itself; the function is not called."""
        return self

    def set_format(self, **_: Any) -> None:
        """Nothing."""

    def __getitem__(self, name: str) -> Any:
        raise UserError(f"{name}: conversations are not read; put the map into --cache-dir")


class Fields:
    """In the place of `pydantic.BaseModel`: what is given, unchecked."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def _set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of all devices


class Package(NamedTuple):
    """A package that SpecForge imports and this run hardly needs."""

    name: str
    use: str  # all that it does here
    modules: dict[str, dict[str, Any]]  # its stand-ins, by module


PACKAGES = (
    Package(
        "accelerate",
        "seeds random, numpy and torch",
        {"accelerate": {}, "accelerate.utils": {"set_seed": _set_seed}},
    ),
    Package("pydantic", "holds the fields of chat templates", {"pydantic": {"BaseModel": Fields}}),
)


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _announced() -> AbstractContextManager[Any]:
    """The variables that torchrun sets for one rank."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    return patch.dict(os.environ, ranks | place)


_reduce = dist.all_reduce


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
    """As torch's; gloo has no averages, which of one rank change nothing."""
    if op == dist.ReduceOp.AVG:
        return None
    return _reduce(tensor, op, **rest)


def _init_distributed(**_: Any) -> None:
    """SpecForge's groups, all of this process alone."""
    distributed = importlib.import_module("specforge.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    for name in GROUPS:
        setattr(distributed, f"_{name}_GROUP", dist.group.WORLD)


def _rope_theta_set() -> AbstractContextManager[Any]:
    """Transformers 5 reads `rope_theta` into `rope_parameters`, where SpecForge does not look."""
    configs = importlib.import_module("specforge.modeling.auto").AutoDraftModelConfig
    read = configs.from_file

    def from_file(path: str) -> Any:
        config = read(path)
        rope = getattr(config, "rope_parameters", None) or {}
        config.rope_theta = rope.get("rope_theta", 10_000.0)
        return config

    return patch.object(configs, "from_file", from_file)
