"""What is replaced on which device while SpecForge's launchers run."""

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh

from bench import replacements, updates
from bench.replacements import Replacement
from eagle3fn.base.errors import UserError
from eagle3fn.specforge.oracle import Oracle, OracleMissingError

ONLY_WITHOUT_CARD = (
    "Triton loss",
    "no card",
    "cuda does nothing",
    "gloo",
    "averages",
    "FullyShardedDataParallel",
)


class FakeCard:
    """Streams and events of a card that is none, for `FullyShardedDataParallel`."""

    class Stream:
        def __init__(self, **_: Any) -> None:
            self.wait_stream = self.wait_event = self.synchronize = lambda *_: None

    def __init__(self) -> None:
        self.Event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.current_stream = self.Stream
        self.stream = lambda _: contextlib.nullcontext()
        self.current_device = lambda: torch.device("cpu")
        self.is_available = lambda: True
        self.device_count = lambda: 1


@contextlib.contextmanager
def card_on_cpu(oracle: Oracle) -> Iterator[list[str]]:
    """What is done with a card, on the CPU: NCCL is gloo, mesh and FSDP's streams are the CPU's.

    Yields the backends of the process groups that are made.
    """
    module = importlib.import_module("torch.distributed.fsdp.fully_sharded_data_parallel")
    init = dist.init_process_group
    mesh = dist.device_mesh.init_device_mesh
    from_group = DeviceMesh.from_group
    backends: list[str] = []

    def handle(state: Any, *_: Any, **__: Any) -> Any:
        state._device_handle = FakeCard()
        return state

    def join(backend: str, **more: Any) -> None:
        backends.append(backend)
        init("gloo", **more)

    def change(of: Any, name: str, value: Any) -> Replacement:
        return Replacement(name, lambda: patch.object(of, name, value))

    left_out = ("gloo", "averages", "Fully")
    without = replacements._without_card(oracle)
    kept = [one for one in without if not any(word in one.about for word in left_out)]
    fakes = [
        change(dist, "init_process_group", join),
        change(dist.device_mesh, "init_device_mesh", lambda _, *a, **k: mesh("cpu", *a, **k)),
        change(DeviceMesh, "from_group", lambda group, device_type: from_group(group, "cpu")),
        change(torch.cuda, "device_count", lambda: 1),
        change(torch.cuda, "set_device", lambda _: None),
        change(module, "_init_device_handle", handle),
    ]
    found = [*kept, *fakes, *replacements._with_card()]
    with patch.object(replacements, "_without_card", lambda _: found):
        yield backends


def test_state_and_bits_are_equal_under_real_fsdp_and_process_group_of_one_rank(
    commit: Oracle, tmp_path: Path
) -> None:
    """SpecForge's own `init_distributed`, announced as by torchrun, and FSDP around its model."""
    wrapped = []
    real = fsdp.FullyShardedDataParallel.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        wrapped.append(type(self.module).__name__)
        return real(self, *args, **more)

    out = str(tmp_path / "r.json")
    options = updates.parse(["--device", "cpu", "--out", out, "--updates", "3", "--seconds", "600"])
    spied = patch.object(fsdp.FullyShardedDataParallel, "forward", forward)
    with card_on_cpu(commit) as backends, spied:
        result = updates.measure(commit, options)
    assert result["faults"] == [] and result["equal"]
    assert backends == ["nccl"] and wrapped == 3 * ["OnlineEagle3Model"]
    assert not dist.is_initialized()


def test_on_a_card_none_of_its_work_is_replaced(commit: Oracle) -> None:
    distributed = importlib.import_module("specforge.distributed")

    def now() -> list[Any]:
        return [
            torch.Tensor.cuda,
            torch.nn.Module.cuda,
            torch.cuda.is_available,
            dist.all_reduce,
            distributed.init_distributed,
            fsdp.FullyShardedDataParallel,
            vars(commit.eagle3)["LogSoftmaxLoss"],
        ]

    def same() -> list[bool]:
        return [a is b for a, b in zip(now(), before, strict=True)]

    before = now()
    announced = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    with replacements.on_device(commit, "cuda", None) as replaced:
        assert all(same()) and announced <= os.environ.keys()
        assert sys.modules["datasets"].Dataset is replacements.Unread
    assert not any(word in line for line in replaced for word in ONLY_WITHOUT_CARD)
    assert any("torchrun" in line for line in replaced) and "RANK" not in os.environ
    with replacements.on_device(commit, "cpu", None) as replaced:
        assert not any(same()) and "RANK" not in os.environ
    assert all(any(word in line for line in replaced) for word in ONLY_WITHOUT_CARD)
    assert all(same())


def test_stand_ins_for_packages_do_what_specforge_needs(
    commit: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("accelerate", "datasets.config", "pydantic"):
        monkeypatch.setitem(sys.modules, name, None)
    with replacements.on_device(commit, "cpu", None) as replaced:
        set_seed = importlib.import_module("accelerate.utils").set_seed
        drawn = []
        for _ in range(2):
            set_seed(7)
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        assert drawn[0] == drawn[1]
        assert drawn[0][2] == float(torch.rand((), generator=torch.manual_seed(7)))
        with pytest.raises(UserError, match="--cache-dir"):
            replacements.Unread.from_generator(generator=None).shuffle(seed=1).map(len)["input_ids"]
        template = type("Template", (sys.modules["pydantic"].BaseModel,), {"kind": "general"})
        assert template(kind="own").kind == "own" and template().kind == "general"
    for name in ("accelerate", "datasets", "pydantic"):
        assert any(name in line for line in replaced)
    with pytest.raises(OracleMissingError, match="pip install datasets"):
        replacements.replacements(commit, "cpu", Path("cache"))
