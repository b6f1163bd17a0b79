"""Pieces for checks on several ranks: an awkward draft, a step's micro-batches, a short training, refusals."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import eagle3fn as e3
from eagle3fn.base.tree import named_leaves
from eagle3fn.data.collate import global_row_counts
from eagle3fn.train.shard import is_sharded
from tests import small
from tests.small import batch_of, frozen_of

SAMPLES, STEPS, BOUND = 12, 2, 5e-6


def config_of(reduce: str = "sum", dtype: str = "float32", **objective: Any) -> e3.Config:
    """A draft with uneven leaves on 3 and 4 ranks, and with fewer rows than ranks: two rows of keys and of values."""
    config = small.config_of(dtype, **objective)
    draft = replace(config.draft, head_dim=2, num_key_value_heads=1, intermediate_size=10)
    return replace(config, draft=draft, train=replace(config.train, reduce=reduce))


def micro_batches(step: int, size: int, mesh: DeviceMesh | None) -> tuple[e3.Batch, ...]:
    """This rank's part of the twelve samples of a step, in micro-batches of `size`."""
    whole = batch_of(step, lengths=tuple(4 + (5 * i) % 7 for i in range(SAMPLES)))
    parts = [e3.Batch(*(x[i : i + size] for x in whole[:5])) for i in range(0, SAMPLES, size)]  # pyright: ignore
    n = global_row_counts(parts, 4)
    world, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
    block = len(parts) // world
    return tuple(part._replace(row_counts=n) for part in parts[rank * block : (rank + 1) * block])


def train(
    config: e3.Config, mesh: DeviceMesh | None, size: int = 1, donate: bool = False
) -> tuple[Any, list]:
    """Two steps: the gathered state and each step's metrics."""
    fns = e3.bind(config, frozen_of(config), mesh)
    state, rows = fns.init_state(fns.init(0)), []
    for step in range(STEPS):
        places = {k: leaf.placements for k, leaf in named_leaves(state).items() if is_sharded(leaf)}  # pyright: ignore
        state, metrics = fns.step(state, micro_batches(step, size, mesh), donate=donate)
        after = {k: leaf.placements for k, leaf in named_leaves(state).items() if is_sharded(leaf)}  # pyright: ignore
        assert places == after
        assert len(places) == (0 if mesh is None else 52)
        rows.append(tensors(metrics))
    return e3.gather(state), rows


@cache
def alone(config: e3.Config, size: int = 1) -> tuple[Any, list]:
    """The same without a mesh."""
    return train(config, None, size)


def gap(left: Any, right: Any) -> float:
    pairs = zip(named_leaves(left).values(), named_leaves(right).values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def tensors(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, tuple) else torch.as_tensor(value)
        for name, value in metrics.items()
    }


def refused(call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except e3.UserError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {message}")
