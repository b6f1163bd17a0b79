"""On a mesh of one rank step and state have the bits of those without a mesh."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves
from eagle3fn.base.types import TrainState
from eagle3fn.testing.builders import on
from eagle3fn.train.shard import is_sharded
from tests import devices
from tests.factories import make_batch, make_config, make_draft, make_frozen


@pytest.fixture(scope="module")
def mesh(device: str) -> Iterator[DeviceMesh]:
    """A process group of this process alone: gloo on the CPU, NCCL on a card."""
    if devices.STAND_IN:
        pytest.skip("a process group has no stand-in")
    backend = "gloo" if device == "cpu" else "nccl"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


def settings(numerics: str, dtype: str, reduce: str) -> e3.Config:
    """Heads of 8 features, which the flash kernel of a card takes."""
    draft = make_draft(head_dim=8)
    return make_config(dtype, 9, draft, train={"reduce": reduce}, numerics=numerics)


def train(
    config: e3.Config, mesh: DeviceMesh | None, device: str, donate: bool
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Three updates of two micro-batches: the gathered last state, and each update's metrics."""
    fns = e3.bind(config, on(device, make_frozen(config)), mesh)
    state = fns.init_state(on(device, fns.init(0)))
    counts = torch.full((config.objective.ttt_length,), 20.0, device=device)
    seen = []
    for step in range(3):
        micro = []
        for i in range(2):
            batch = on(device, make_batch(2 * step + i, (9, 6)))
            micro.append(batch._replace(row_counts=counts))
        state, metrics = fns.step(state, tuple(micro), donate=donate)
        seen.append({name: metrics[name] for name in ("loss", "grad_norm", "tokens", "aux")})
    return e3.gather(state), seen


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "tree"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_mesh_of_one_has_the_bits_of_no_mesh(
    mesh: DeviceMesh, device: str, numerics: str, dtype: str, reduce: str, donate: bool
) -> None:
    config = settings(numerics, dtype, reduce)
    state, metrics = train(config, None, device, donate)
    state_on_mesh, metrics_on_mesh = train(config, mesh, device, donate)
    assert equal(state_on_mesh, state)
    assert equal(metrics_on_mesh, metrics)


def test_state_is_placed_as_its_specs_say(mesh: DeviceMesh, device: str) -> None:
    config = settings("fast", "bfloat16", "sum")
    fns = e3.bind(config, on(device, make_frozen(config)), mesh)
    state = fns.init_state(on(device, fns.init(0)))
    specs: dict[str, Any] = named_leaves(e3.state_specs(config, mesh))
    for name, leaf in named_leaves(state).items():
        spec = specs[name]
        assert is_sharded(leaf) == (name != "step"), name
        assert (tuple(leaf.shape), leaf.dtype) == (spec.shape, spec.dtype), name
        assert leaf.device.type == ("cpu" if name == "step" else device), name
