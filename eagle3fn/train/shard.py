"""The sharded state: leaves as DTensors, each rank holding a block of rows.

The only file that uses DTensor.

Rows are cut as `torch.chunk` cuts them: `ceil(rows / ranks)` a rank, so the last ranks may hold
fewer, or none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
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
from eagle3fn.train.optimizer import Leaf
from eagle3fn.train.recipe import OURS, Recipe, optimizer_of

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
    config: Config, mesh: DeviceMesh | None = None, recipe: Recipe = OURS
) -> TrainState:
    """What every leaf of the state will be on this rank, in the state's structure.

    Nothing is allocated. `recipe` may have an optimizer of your own.
    """
    return specs(config, *ranks_of(mesh), recipe)


def specs(config: Config, world: int, rank: int, recipe: Recipe = OURS) -> TrainState:
    """The same for any number of ranks, without a mesh: a `TrainState` of `LeafSpec`."""

    def spec(whole: Tensor, own: Tensor) -> LeafSpec:
        placement = "Shard(0)" if whole.ndim else "Replicate()"
        return LeafSpec(tuple(whole.shape), whole.dtype, placement, tuple(own.shape))

    whole = _meta_params(config)
    own = own_rows(whole, world, rank)
    return tree_map(spec, state_of(whole, config, recipe), state_of(own, config, recipe))


def state_of(params: Params, config: Config, recipe: Recipe = OURS) -> TrainState:
    """The first state of a rank that holds these rows of the parameters, as plain tensors."""
    masters = {}
    for name, part in params.items():
        masters[name] = part.to(at_least_fp32(part.dtype), copy=True)
    opt = optimizer_of(config, recipe).init(masters, roles(config.draft))
    return TrainState(params, masters, opt, torch.zeros((), dtype=torch.int64, device="cpu"))


def empty_state(
    config: Config, device: str, mesh: DeviceMesh | None = None, recipe: Recipe = OURS
) -> TrainState:
    """A state of uninitialized leaves, placed as `init_state` places them: to read a checkpoint
    into.
    """
    whole = _meta_params(config)
    own = {}
    for name, part in own_rows(whole, *ranks_of(mesh)).items():
        own[name] = torch.empty_like(part, device=device)
    return place(state_of(own, config, recipe), state_of(whole, config, recipe), mesh)


def _meta_params(config: Config) -> Params:
    """The parameters' shapes and dtype alone."""
    dtype = getattr(torch, config.train.dtype)
    table = shapes(config.draft).items()
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in table}


def ranks_of(mesh: DeviceMesh | None) -> tuple[int, int]:
    """The number of ranks, and this one."""
    return (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())


def rows_of(rows: int, world: int, rank: int) -> range:
    """The rows that `rank` of `world` holds of a leaf with `rows` rows."""
    block = -(-rows // world)
    return range(min(rank * block, rows), min((rank + 1) * block, rows))


def is_sharded(leaf: Any) -> bool:
    """True for a DTensor."""
    return hasattr(leaf, "placements")


def own_rows(params: Params, world: int, rank: int) -> Params:
    """Copies of a rank's rows of parameters that all ranks hold alike."""
    own = {}
    for name, leaf in params.items():
        rows = rows_of(len(leaf), world, rank)
        own[name] = leaf.detach()[rows.start : rows.stop].clone()
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
        if len(part) != len(rows_of(len(whole), *ranks_of(mesh))):
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


def leaves_of(config: Config) -> dict[str, Leaf]:
    """For an optimizer's update: every leaf's role, and its shape on all ranks together."""
    draft_roles = roles(config.draft)
    return {name: Leaf(draft_roles[name], shape) for name, shape in shapes(config.draft).items()}


def on_whole(
    function: Callable[[Tensor], Tensor],
    parts: Params,
    leaves: dict[str, Leaf],
    mesh: DeviceMesh | None,
) -> Params:
    """This rank's rows of `function` of whole leaves, each computed by one rank: its bits.

    All ranks must call, with rows of the same leaves.

    Args:
        function: a whole leaf to a tensor of its shape and dtype.
        parts: this rank's rows of some of the leaves.
        leaves: all leaves, for their shapes.
        mesh: of the ranks.
    """
    world, rank = ranks_of(mesh)
    owners = owners_of({name: leaves[name].shape for name in parts}, world)

    # Gather all, and keep what this rank computes. To compute one before the next is gathered would
    # let the other ranks wait.
    own = {}
    for name, part in parts.items():
        whole = gather_rows(part, leaves[name].shape[0], mesh)
        if owners[name] == rank:
            own[name] = whole

    results = {name: function(whole) for name, whole in own.items()}

    # Give every rank its rows.
    rows = {}
    for name, part in parts.items():
        rows[name] = _scatter_rows(
            results.pop(name, None), part, leaves[name].shape[0], owners[name], mesh
        )
    return rows


def owners_of(shapes: dict[str, tuple[int, ...]], world: int) -> dict[str, int]:
    """The rank that computes each leaf: the largest first, each by the rank that has least.

    A matrix `(A, B)` counts `A · B · min(A, B)`, as its products do.
    """
    costs = {name: math.prod(shape) * min(shape) for name, shape in shapes.items()}
    loads = [0] * world
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def _scatter_rows(
    whole: Tensor | None, part: Tensor, rows: int, owner: int, mesh: DeviceMesh | None
) -> Tensor:
    """This rank's rows of all `rows`, which `owner` alone has; the reverse of `gather_rows`.

    `part` has their shape and dtype.
    """
    if mesh is None or mesh.size() == 1:
        assert whole is not None
        return whole

    block = -(-rows // mesh.size())
    blocks = None
    if whole is not None:
        blocks = list(padded(whole, mesh.size() * block).split(block))
    received = part.new_empty(block, *part.shape[1:])
    dist.scatter(received, blocks, group=mesh.get_group(), group_src=owner)
    return received[: len(part)]


def gather(tree: Any) -> Any:
    """A state, or any tree, with full plain tensors in place of sharded leaves, on every rank.

    All ranks must call.
    """
    return tree_map(partial(_full, copy=True), tree)


def full_params(params: Params) -> Params:
    """Parameters as plain tensors in their own dtype; on one rank they share the leaves' memory."""
    return tree_map(partial(_full, copy=False), params)


def _full(leaf: Any, copy: bool) -> Tensor:
    if not is_sharded(leaf):
        return leaf
    part = leaf.to_local()
    whole = gather_rows(part, len(leaf), leaf.device_mesh)
    return whole.clone() if copy and whole is part else whole


def gather_rows(part: Tensor, rows: int, mesh: DeviceMesh | None) -> Tensor:
    """All `rows` rows from each rank's block of them; on one rank `part` itself."""
    if mesh is None or mesh.size() == 1:
        return part
    block = -(-rows // mesh.size())
    every = part.new_empty(mesh.size() * block, *part.shape[1:])
    _all_gather(every, padded(part, block), mesh.get_group())
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
        wrong = _misplaced(leaf, mesh)
        if wrong:
            raise UserError(f"state.{name} {wrong}")


def _misplaced(leaf: Any, mesh: DeviceMesh | None) -> str:
    """What is wrong about a leaf's place, and the remedy; "" if nothing is."""
    if is_sharded(leaf) and leaf.device_mesh != mesh:
        return "is sharded over another mesh than step was given; give both the same mesh"
    if isinstance(leaf, Donated):
        raise UserError(_DONATED)
    if is_sharded(leaf) and not leaf.placements[0].is_shard(0):
        return f"is placed as {leaf.placements[0]}; it must be Shard(0), as init_state makes it"
    if mesh is not None and leaf.ndim and not is_sharded(leaf):
        return "is a plain tensor, step was given a mesh; use init_state(…, mesh=mesh)"
    return ""


_DONATED = (
    "this state was given to step(…, donate=True), which reuses its buffers; go on with the state "
    "that step returned, or leave donate out"
)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise UserError(_DONATED)


class Donated(Tensor):
    """What a leaf becomes when its buffer was donated: every operation on it raises."""

    __torch_function__ = classmethod(_refuse)  # pyright: ignore[reportAssignmentType]


class _DonatedShard(Tensor):
    """What a donated DTensor then holds, where torch 2.11 looks under torch.func."""

    __torch_dispatch__ = classmethod(_refuse)


@lru_cache(maxsize=1)
def _donated_dtensor() -> type:
    from torch.distributed.tensor import DTensor

    refused = ("to_local", "full_tensor", "redistribute", "__repr__")
    body = dict.fromkeys(refused, _refuse) | {
        "__slots__": (),
        "placements": property(_refuse),
        "__torch_function__": classmethod(_refuse),
        "__torch_dispatch__": classmethod(_refuse),  # torch.func calls no __torch_function__
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
