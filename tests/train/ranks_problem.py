"""Pieces for checks on several ranks: an uneven draft, a step's batches, a short training."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import eagle3fn as e3
from eagle3fn.base.tree import named_leaves, tree_map
from eagle3fn.base.types import Batch, TrainState
from eagle3fn.data.collate import global_row_counts
from eagle3fn.train.shard import is_sharded
from tests.factories import make_batch, make_config, make_draft, make_frozen

SAMPLES = 12
STEPS = 2
LENGTHS = tuple(4 + (5 * i) % 7 for i in range(SAMPLES))
BOUND = 5e-6
"""How far two orders of summation may differ, in fp32."""


def uneven_config(reduce: str = "sum", dtype: str = "float32", **objective: Any) -> e3.Config:
    """A draft whose leaves 3 and 4 ranks cannot share evenly.

    Keys and values have 2 rows each, fewer than there are ranks.
    """
    draft = make_draft(head_dim=2, num_key_value_heads=1, intermediate_size=10)
    return make_config(dtype, draft=draft, train={"reduce": reduce}, **objective)


def micro_batches(step: int, size: int, mesh: DeviceMesh | None) -> tuple[Batch, ...]:
    """This rank's part of the twelve samples of a step, in micro-batches of `size` samples."""
    whole = make_batch(step, LENGTHS)
    parts = []
    for i in range(0, SAMPLES, size):
        part = tree_map(lambda field, i=i: field[i : i + size], whole)
        parts.append(part)

    world = 1 if mesh is None else mesh.size()
    rank = 0 if mesh is None else mesh.get_local_rank()
    block = len(parts) // world
    counts = global_row_counts(parts)
    mine = parts[rank * block : (rank + 1) * block]
    return tuple(part._replace(row_counts=counts) for part in mine)


def train(
    config: e3.Config, mesh: DeviceMesh | None, size: int = 1, donate: bool = False
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Two steps: the gathered state, and each step's metrics as tensors."""
    fns = e3.bind(config, make_frozen(config), mesh)
    state = fns.init_state(fns.init(0))
    rows = []
    for step in range(STEPS):
        before = placements(state)
        state, metrics = fns.step(state, micro_batches(step, size, mesh), donate=donate)
        assert placements(state) == before
        leaves = len(named_leaves(state)) - 1  # all but `step`
        assert len(before) == (0 if mesh is None else leaves)
        rows.append(tensors(metrics))
    return e3.gather(state), rows


def placements(state: TrainState) -> dict[str, Any]:
    """Where the sharded leaves are, by name."""
    found = {}
    for name, leaf in named_leaves(state).items():
        if is_sharded(leaf):
            found[name] = leaf.placements  # pyright: ignore[reportAttributeAccessIssue]
    return found


@cache
def alone(config: e3.Config, size: int = 1) -> tuple[TrainState, list[dict[str, Any]]]:
    """`train` without a mesh."""
    return train(config, None, size)


def gap(left: Any, right: Any) -> float:
    """The largest difference between two trees."""
    pairs = zip(named_leaves(left).values(), named_leaves(right).values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def tensors(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as a tree of tensors: the numbers among them too."""
    found = {}
    for name, value in metrics.items():
        found[name] = value if isinstance(value, tuple) else torch.as_tensor(value)
    return found


def refused(call: Callable[[], Any], message: str) -> None:
    """Expect a UserError whose text contains `message`; ranks have no pytest."""
    try:
        call()
    except e3.UserError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {message}")
