"""What a run needs, counted before it starts: bytes a rank holds, bytes moved in a step, bytes on
disk.
"""

import math
import os
import resource
import sys
from typing import Any, NamedTuple

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.cores import local_ranks
from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import named_leaves
from eagle3fn.data.feature_size import bytes_per_token
from eagle3fn.data.storage import STORES
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.shard import LeafSpec, specs

GIB = 2**30


class MemoryPlan(NamedTuple):
    """Bytes by name. `held` leaves out activations, so it is the least that a rank needs."""

    ranks: int
    params: int  # trained values
    held: dict[str, int]  # by rank 0, which has the largest shards
    moved: dict[str, int]  # received by a rank in one step; leaves are padded to equal blocks
    disk: dict[str, int]

    @property
    def needed(self) -> int:
        """All that a rank holds, in bytes."""
        return sum(self.held.values())


def plan_memory(
    config: Config, ranks: int = 1, tokens: int = 0, tied: bool = False, recipe: Recipe = OURS
) -> MemoryPlan:
    """Count from shapes alone; nothing is allocated.

    Args:
        config: shapes and compute dtype are read.
        ranks: processes that share the state; every leaf is cut along its rows.
        tokens: of all samples, for the size of their features.
        tied: the target's head and embedding are one tensor.
        recipe: may have an optimizer of your own.
    """
    # The state: what rank 0 holds, and how many values there are in all.
    draft = config.draft
    state = specs(config, ranks, 0, recipe)
    params = _held_bytes(state.params)
    masters = _held_bytes(state.masters)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _leaves(state))
    values = sum(math.prod(leaf.shape) for leaf in state.params.values())
    dtype = getattr(torch, config.train.dtype)
    narrow = dtype.itemsize
    wide = at_least_fp32(dtype).itemsize

    # Gradients of several micro-batches are summed in fp32: the sum, and the one that is added.
    data = config.data
    several = data.global_batch // data.micro_batch > ranks
    if data.pack_tokens:
        # At their longest, an update's samples would fill more rows than there are ranks.
        several = data.global_batch * data.max_length > data.pack_tokens * ranks
    gradients = values * (2 * wide if several else narrow)

    # An update that may be dropped is computed next to the state before it.
    optimizer_state = _held_bytes(state.opt)
    kept = {}
    if config.train.on_nonfinite == "skip":
        kept["state before an update"] = params + masters + optimizer_state

    # Frozen: the target's head, its embedding where it is another tensor and as wide as the draft,
    # the map.
    tables = 1 if tied or draft.other_width else 2
    frozen = tables * draft.vocab_size * draft.target_hidden_size * narrow
    frozen += draft.vocab_size * torch.bool.itemsize
    frozen += draft.draft_vocab_size * torch.int64.itemsize

    # On disk a checkpoint has the state, and the parameters once more as safetensors.
    sizes = (draft.target_hidden_size, draft.taps, torch.bfloat16)
    token = bytes_per_token(*sizes)
    smaller = {f"features in {store}": tokens * bytes_per_token(*sizes, store) for store in STORES}
    return MemoryPlan(
        ranks=ranks,
        params=values,
        held={
            "parameters": params,
            "masters": masters,
            "optimizer state": optimizer_state,
            "gathered parameters": values * narrow if ranks > 1 else 0,
            "gradients": gradients,
            "frozen tensors": frozen,
        }
        | kept,
        moved={
            "gathering parameters": (ranks - 1) * params,
            "reducing gradients": (ranks - 1) * masters,
        },
        disk={
            "features of a token": token,
            "features": tokens * token,
            **smaller,
            "a checkpoint": whole + values * narrow,
        },
    )


def _held_bytes(tree: Any) -> int:
    """What a rank holds of these leaves."""
    return sum(math.prod(leaf.local_shape) * leaf.dtype.itemsize for leaf in _leaves(tree))


def _leaves(tree: Any) -> list[LeafSpec]:
    return list(named_leaves(tree).values())  # pyright: ignore[reportReturnType]


def describe(plan: MemoryPlan) -> str:
    """The plan as a table of lines, in GiB or smaller units."""
    sections = {
        f"a rank of {plan.ranks} holds at least": plan.held
        | {"sum, activations not counted": plan.needed},
        "a rank receives in a step": plan.moved | {"sum": sum(plan.moved.values())},
        "on disk": plan.disk,
    }
    lines = [f"{plan.params:,} trained values"]
    for title, values in sections.items():
        lines.append(title)
        lines += [f"  {name:<30}{readable_bytes(value):>12}" for name, value in values.items()]
    return "\n".join(lines)


def readable_bytes(count: int) -> str:
    """A number of bytes in GiB or a smaller unit.

    >>> readable_bytes(3 * 2**29), readable_bytes(1000)
    ('1.50 GiB', '1000 B')
    """
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def check_fits(
    config: Config, ranks: int, limit: float, where: str, tied: bool = False, recipe: Recipe = OURS
) -> None:
    """Refuse a run whose ranks need more than `limit` bytes each, before anything is loaded.

    Raises:
        UserError: names both sizes, the largest part, and the number of ranks that could do, if
            any.
    """
    plan = plan_memory(config, ranks, 0, tied, recipe)
    if plan.needed <= limit:
        return

    # The remedy: the smallest number of ranks that would do.
    remedy = "more ranks won't do: take a smaller draft vocabulary or target"
    for more in (2, 4, 8, 16, 32, 64):
        if more > ranks and plan_memory(config, more, 0, tied, recipe).needed <= limit:
            remedy = f"start {more} ranks"
            break

    largest = max(plan.held, key=lambda name: plan.held[name])
    raise UserError(
        f"a rank of {ranks} holds at least {readable_bytes(plan.needed)}, most of it {largest} "
        f"({readable_bytes(plan.held[largest])}); {where} is {readable_bytes(int(limit))}; {remedy}"
    )


def memory_of(device: str) -> float:
    """All memory that a rank can have on `device`, in bytes: the GPU's, or this machine's divided
    by its ranks.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_properties(kind).total_memory
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / local_ranks()


def peak_bytes(device: str) -> int:
    """The most memory so far: of a GPU what PyTorch allocated, else what this process had resident.

    The resident set is the whole process's, so the difference of two calls is what came between.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
