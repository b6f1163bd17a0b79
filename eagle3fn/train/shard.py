"""The sharded state: leaves as DTensors, each rank holding a block of rows.

The only file that uses DTensor.

Rows are cut as `torch.chunk` cuts them: `ceil(rows / ranks)` a rank, so the last ranks may hold
fewer, or none.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.config import Config
from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import named_leaves, tree_map
from eagle3fn.base.types import TrainState
from eagle3fn.model.table import shapes
from eagle3fn.train.optimizer import Moments

# The name before torch 2.13 is `all_gather_into_tensor`.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of a state: global shape, dtype, placement, and the shape that one rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: str  # "Shard(0)", or "Replicate()"
    local_shape: tuple[int, ...]


def state_specs(config: Config, mesh: DeviceMesh | None = None) -> TrainState:
    """What every leaf of the state will be on this rank, in the state's structure.

    Nothing is allocated.
    """
    if mesh is None:
        return specs(config, world=1, rank=0)
    return specs(config, mesh.size(), mesh.get_local_rank())


def specs(config: Config, world: int, rank: int) -> TrainState:
    """The same for any number of ranks, without a mesh: a `TrainState` of `LeafSpec`."""

    def table(dtype: torch.dtype) -> dict[str, Any]:
        leaves = {}
        for name, shape in shapes(config.draft).items():
            rows = rows_of(shape[0], world, rank)
            leaves[name] = LeafSpec(shape, dtype, "Shard(0)", (len(rows), *shape[1:]))
        return leaves

    narrow = getattr(torch, config.train.dtype)
    wide = at_least_fp32(narrow)
    step: Any = LeafSpec((), torch.int64, "Replicate()", ())
    return TrainState(table(narrow), table(wide), Moments(table(wide), table(wide)), step)


def empty_state(config: Config, device: str, mesh: DeviceMesh | None = None) -> TrainState:
    """A state of uninitialized leaves, placed as `init_state` places them: to read a checkpoint
    into.
    """

    def leaf(spec: LeafSpec) -> Tensor:
        where = device if spec.shape else "cpu"  # the step is read on the host
        part = torch.empty(spec.local_shape, dtype=spec.dtype, device=where)
        if mesh is None or not spec.shape:
            return part
        shape = torch.Size(spec.shape)
        return _placed(part, shape, torch.empty(shape, device="meta").stride(), mesh)

    return tree_map(leaf, state_specs(config, mesh))


def rows_of(rows: int, world: int, rank: int) -> range:
    """The rows that `rank` of `world` holds of a leaf with `rows` rows."""
    block = -(-rows // world)
    return range(min(rank * block, rows), min((rank + 1) * block, rows))


def is_sharded(leaf: Any) -> bool:
    """True for a DTensor."""
    return hasattr(leaf, "placements")


def shard(tree: Any, mesh: DeviceMesh | None) -> Any:
    """This rank's rows of every leaf of a plain tree that all ranks hold alike, as DTensors.

    0-d leaves stay plain. Without a mesh the tree itself. No communication.
    """
    if mesh is None:
        return tree

    def cut(leaf: Tensor) -> Tensor:
        rows = rows_of(len(leaf), mesh.size(), mesh.get_local_rank())
        own = leaf[rows.start : rows.stop].clone()
        return _placed(own, leaf.shape, leaf.contiguous().stride(), mesh)

    return tree_map(lambda leaf: cut(leaf) if leaf.ndim else leaf, tree)


def _placed(local: Tensor, shape: torch.Size, stride: tuple[int, ...], mesh: DeviceMesh) -> Tensor:
    """A DTensor of a given global shape; by default it would be the local rows times the ranks."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def local(tree: Any) -> Any:
    """This rank's part of every leaf, as plain tensors that share its memory."""
    return tree_map(lambda leaf: leaf.to_local() if is_sharded(leaf) else leaf, tree)


def placed_like(tree: Any, like: Any) -> Any:
    """Local parts as leaves of `like`'s shapes, mesh and placement; the reverse of `local`."""

    def wrap(part: Tensor, old: Any) -> Tensor:
        return _placed(part, old.shape, old.stride(), old.device_mesh) if is_sharded(old) else part

    return tree_map(wrap, tree, like)


def gather(tree: Any) -> Any:
    """A state, or any tree, with full plain tensors in place of sharded leaves, on every rank.

    All ranks must call.
    """
    return tree_map(lambda leaf: _full(leaf, copy=True) if is_sharded(leaf) else leaf, tree)


def full_params(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as plain tensors in their own dtype; on one rank they share the leaves' memory."""
    return {
        name: _full(leaf, copy=False) if is_sharded(leaf) else leaf for name, leaf in params.items()
    }


def _full(leaf: Any, copy: bool) -> Tensor:
    part, mesh = leaf.to_local(), leaf.device_mesh
    if mesh.size() == 1:
        return part.clone() if copy else part
    return gather_rows(part, len(leaf), mesh.get_group(), mesh.size())


def gather_rows(part: Tensor, rows: int, group: dist.ProcessGroup, world: int) -> Tensor:
    """All `rows` rows from each rank's block of them."""
    every = part.new_empty(world * -(-rows // world), *part.shape[1:])
    _all_gather(every, padded(part, len(every) // world), group)
    return every[:rows]


def padded(part: Tensor, rows: int) -> Tensor:
    """`part` followed by zero rows, `rows` in all: collectives want blocks of one size."""
    if len(part) == rows:
        return part.contiguous()
    return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])


def check_placed(state: TrainState, mesh: DeviceMesh | None) -> None:
    """Refuse a state that is not placed as `mesh` says.

    Raises:
        UserError: a mesh of several dimensions, a sharded state without its mesh, a plain one with
            a mesh, a state of another mesh, a leaf that is not cut along its rows, or a state that
            was donated.
    """
    if mesh is not None and mesh.ndim != 1:
        raise UserError(
            f"mesh has {mesh.ndim} dimensions; the state is sharded over one: give a "
            "one-dimensional mesh"
        )
    for name, leaf in named_leaves(state._replace(step=())).items():
        if is_sharded(leaf) and (mesh is None or leaf.device_mesh != mesh):  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(
                f"state.{name} is sharded over another mesh than step was given; give both the "
                "same mesh"
            )
        if isinstance(leaf, Donated):
            raise UserError(_DONATED)

        placements = getattr(leaf, "placements", None)
        if placements and not placements[0].is_shard(0):
            raise UserError(
                f"state.{name} is placed as {placements[0]}; it must be Shard(0), as init_state "
                "makes it"
            )
        if mesh is not None and not is_sharded(leaf):
            raise UserError(
                f"state.{name} is a plain tensor, step was given a mesh; use init_state(…, "
                "mesh=mesh)"
            )


_DONATED = (
    "this state was given to step(…, donate=True), which reuses its buffers; go on with the state "
    "that step returned, "
    "or leave donate out"
)


class Donated(Tensor):
    """What a leaf becomes when its buffer was donated: every operation on it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every operation."""
        raise UserError(_DONATED)


class _DonatedShard(Tensor):
    """What a donated DTensor then holds, where torch 2.11 looks under torch.func."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every operation."""
        raise UserError(_DONATED)


@lru_cache(maxsize=1)
def _donated_dtensor() -> type:
    from torch.distributed.tensor import DTensor

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError(_DONATED)

    body = {
        "__slots__": (),
        "placements": property(refuse),
        "__torch_function__": Donated.__torch_function__,
        "__torch_dispatch__": classmethod(refuse),  # torch.func calls no __torch_function__
        "to_local": refuse,
        "full_tensor": refuse,
        "redistribute": refuse,
        "__repr__": refuse,
    }
    return type("DonatedDTensor", (DTensor,), body)


def take(state: TrainState) -> TrainState:
    """The same buffers under new leaves.

    Every leaf of the given state raises a `UserError` from now on.
    """
    taken = placed_like(tree_map(Tensor.detach, local(state)), state)

    # Each leaf once: parameters in fp32 may be their masters.
    leaves = {id(leaf): leaf for leaf in named_leaves(state).values()}
    for leaf in leaves.values():
        # torch.func reads the leaf's storage, not its class: leave nothing there, or what refuses.
        if is_sharded(leaf):
            sharded: Any = leaf
            sharded._local_tensor = Tensor._make_subclass(_DonatedShard, torch.empty(0))
            leaf.__class__ = _donated_dtensor()
        else:
            leaf.data = leaf.new_empty(0)
            leaf.__class__ = Donated
    return taken
