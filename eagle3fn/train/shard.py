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
from eagle3fn.base.types import Params, TrainState
from eagle3fn.model.table import roles, shapes
from eagle3fn.train.optimizer import Leaf, Optimizer, named_optimizer

# The name before torch 2.13 is `all_gather_into_tensor`.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of a state: global shape, dtype, placement, and the shape that one rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: str  # "Shard(0)", or "Replicate()"
    local_shape: tuple[int, ...]


def state_specs(
    config: Config, mesh: DeviceMesh | None = None, optimizer: Optimizer | None = None
) -> TrainState:
    """What every leaf of the state will be on this rank, in the state's structure.

    Nothing is allocated. `optimizer` is a user's own, as for `bind`.
    """
    return specs(config, *_ranks_of(mesh), optimizer)


def specs(config: Config, world: int, rank: int, optimizer: Optimizer | None = None) -> TrainState:
    """The same for any number of ranks, without a mesh: a `TrainState` of `LeafSpec`."""

    def spec(whole: Tensor, own: Tensor) -> LeafSpec:
        placement = "Shard(0)" if whole.ndim else "Replicate()"
        return LeafSpec(tuple(whole.shape), whole.dtype, placement, tuple(own.shape))

    whole = state_of(_empty_params(config, "meta"), config, optimizer)
    own = state_of(_empty_params(config, "meta", world, rank), config, optimizer)
    return tree_map(spec, whole, own)


def state_of(params: Params, config: Config, optimizer: Optimizer | None = None) -> TrainState:
    """The first state of a rank that holds these rows of the parameters, as plain tensors."""
    optimizer = optimizer or named_optimizer(config.optimizer)
    masters = {}
    for name, part in params.items():
        masters[name] = part.to(at_least_fp32(part.dtype), copy=True)
    opt = optimizer.init(masters, roles(config.draft))
    return TrainState(params, masters, opt, torch.zeros((), dtype=torch.int64, device="cpu"))


def _empty_params(config: Config, device: str, world: int = 1, rank: int = 0) -> Params:
    """Uninitialized rows of a rank; on the device "meta" shapes and dtypes alone."""
    dtype = getattr(torch, config.train.dtype)
    params = {}
    for name, shape in shapes(config.draft).items():
        own = (len(rows_of(shape[0], world, rank)), *shape[1:])
        params[name] = torch.empty(own, dtype=dtype, device=device)
    return params


def empty_state(
    config: Config, device: str, mesh: DeviceMesh | None = None, optimizer: Optimizer | None = None
) -> TrainState:
    """A state of uninitialized leaves, placed as `init_state` places them: to read a checkpoint
    into.
    """
    own = _empty_params(config, device, *_ranks_of(mesh))
    whole = state_of(_empty_params(config, "meta"), config, optimizer)
    return place(state_of(own, config, optimizer), whole, mesh)


def _ranks_of(mesh: DeviceMesh | None) -> tuple[int, int]:
    """The number of ranks, and this one."""
    return (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())


def rows_of(rows: int, world: int, rank: int) -> range:
    """The rows that `rank` of `world` holds of a leaf with `rows` rows."""
    block = -(-rows // world)
    return range(min(rank * block, rows), min((rank + 1) * block, rows))


def is_sharded(leaf: Any) -> bool:
    """True for a DTensor."""
    return hasattr(leaf, "placements")


def own_rows(params: Params, mesh: DeviceMesh | None) -> Params:
    """Copies of this rank's rows of parameters that all ranks hold alike. No communication."""
    own = {}
    for name, leaf in params.items():
        rows = rows_of(len(leaf), *_ranks_of(mesh))
        own[name] = leaf[rows.start : rows.stop].clone()
    return own


def place(tree: Any, like: Any, mesh: DeviceMesh | None) -> Any:
    """A rank's plain leaves as DTensors of the whole shapes in `like`; the reverse of `local`.

    0-d leaves stay plain, and without a mesh all do.

    Raises:
        UserError: a leaf has not this rank's rows of the whole one.
    """
    if mesh is None:
        return tree
    from torch.distributed.tensor import DTensor, Shard

    def placed(part: Tensor, whole: Tensor) -> Tensor:
        if not part.ndim:
            return part
        if len(part) != len(rows_of(len(whole), *_ranks_of(mesh))):
            raise UserError(
                f"optimizer: a tensor of its state has shape {tuple(part.shape)} on this rank, "
                f"{tuple(whole.shape)} on one: it must have a parameter's rows, or be 0-d"
            )
        # Without the shape it would be the local rows times the ranks.
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    return tree_map(placed, tree, like)


def local(tree: Any) -> Any:
    """This rank's part of every leaf, as plain tensors that share its memory."""
    return tree_map(lambda leaf: leaf.to_local() if is_sharded(leaf) else leaf, tree)


def _same(x: Tensor) -> Tensor:
    return x


def leaves_of(config: Config, lengths: dict[str, int], mesh: DeviceMesh | None) -> dict[str, Leaf]:
    """For an optimizer's update: every leaf's role, and how its rows on all ranks are gathered.

    `lengths` are the leaves' global rows.
    """
    if mesh is None or mesh.size() == 1:
        return {name: Leaf(role, _same, _same) for name, role in roles(config.draft).items()}
    group, world = mesh.get_group(), mesh.size()

    def leaf(role: str, length: int) -> Leaf:
        rows = rows_of(length, *_ranks_of(mesh))
        return Leaf(
            role,
            whole=lambda x: gather_rows(x, length, group, world),
            own=lambda x: x[rows.start : rows.stop],
        )

    return {name: leaf(role, lengths[name]) for name, role in roles(config.draft).items()}


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
        if mesh is not None and leaf.ndim and not is_sharded(leaf):
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


def take(state: TrainState, mesh: DeviceMesh | None) -> TrainState:
    """The same buffers under new leaves.

    Every leaf of the given state raises a `UserError` from now on.
    """
    taken = place(tree_map(Tensor.detach, local(state)), state, mesh)

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
