"""Step and state on a mesh of one rank: the same bits as without a mesh, on the CPU and on a card."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves
from eagle3fn.testing.builders import on
from eagle3fn.train.shard import is_sharded
from tests import devices
from tests.small import batch_of, config_of, frozen_of


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
    config = config_of(dtype, head_dim=8, numerics=numerics)
    train = e3.TrainConfig(steps=9, dtype=dtype, reduce=reduce)  # pyright: ignore[reportArgumentType]
    return e3.Config(config.draft, config.objective, config.optimizer, train=train)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "tree"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_a_mesh_of_one_has_the_bits_of_none(
    mesh: DeviceMesh, device: str, numerics: str, dtype: str, reduce: str, donate: bool
) -> None:
    """Three updates of two micro-batches: metrics of each, and the last state."""
    config, ends = settings(numerics, dtype, reduce), []
    frozen = on(device, frozen_of(config))
    for used in (None, mesh):
        fns = e3.bind(config, frozen, used)
        state, seen = fns.init_state(on(device, fns.init(0))), []
        for step in range(3):
            micro = tuple(on(device, batch_of(2 * step + i, (9, 6))) for i in range(2))
            n = torch.full((config.objective.ttt_length,), 20.0, device=device)
            state, metrics = fns.step(
                state, tuple(b._replace(row_counts=n) for b in micro), donate=donate
            )
            seen.append({name: metrics[name] for name in ("loss", "grad_norm", "tokens", "aux")})
        ends.append((e3.gather(state), seen))
    assert equal(*(state for state, _ in ends))
    assert equal(*(seen for _, seen in ends))


def test_the_state_is_placed_as_its_specs_say(mesh: DeviceMesh, device: str) -> None:
    config = settings("fast", "bfloat16", "sum")
    fns = e3.bind(config, on(device, frozen_of(config)), mesh)
    state = fns.init_state(on(device, fns.init(0)))
    specs = named_leaves(e3.state_specs(config, mesh))
    for name, leaf in named_leaves(state).items():
        assert is_sharded(leaf) == (name != "step"), name
        assert (tuple(leaf.shape), leaf.dtype) == (specs[name].shape, specs[name].dtype), name  # pyright: ignore
        assert leaf.device.type == ("cpu" if name == "step" else device), name
