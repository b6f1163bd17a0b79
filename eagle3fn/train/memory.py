"""What a run needs, told before it starts: bytes a rank holds, bytes moved in a step, bytes on disk."""

import math
import os
from typing import Any, NamedTuple

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.model.table import EMBED, NORM
from eagle3fn.train.shard import specs

GIB = 2**30
_TOKEN = 2 * 8  # of a feature file's input_ids and loss_mask, int64
_FEATURE = 2  # of a feature's value, bf16


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


def plan_memory(config: Config, ranks: int = 1, tokens: int = 0, tied: bool = False) -> MemoryPlan:
    """Count from shapes alone; nothing is allocated.

    Args:
        config: shapes and compute dtype are read.
        ranks: processes that share the state; every leaf is cut along its rows.
        tokens: of all samples, for the size of their features.
        tied: the target's head and embedding are one tensor.
    """
    draft, state = config.draft, specs(config, ranks, 0)
    params, masters = _bytes(state.params), _bytes(state.masters)
    whole = sum(math.prod(leaf.shape) for leaf in state.params.values())
    narrow, wide = (leaves[NORM].dtype.itemsize for leaves in (state.params, state.masters))
    taken = (
        1 if tied or EMBED in state.params else 2
    )  # the head, and the embedding where the draft has none of its own
    maps = draft.vocab_size * torch.bool.itemsize + draft.draft_vocab_size * torch.int64.itemsize
    several = config.data.global_batch // config.data.micro_batch > ranks
    held = {
        "parameters": params,
        "masters": masters,
        "moments": _bytes(state.opt.mu) + _bytes(state.opt.nu),
        "gathered parameters": whole * narrow if ranks > 1 else 0,
        "gradients": whole * (2 * wide if several else narrow),
        "frozen tensors": taken * draft.vocab_size * draft.target_hidden_size * narrow + maps,
    }
    moved = {
        "gathering parameters": (ranks - 1) * params,
        "reducing gradients": (ranks - 1) * masters,
    }
    token = 4 * draft.target_hidden_size * _FEATURE + _TOKEN
    checkpoint = whole * (
        2 * narrow + 3 * wide
    )  # the state, and the parameters once more as safetensors
    disk = {"features of a token": token, "features": tokens * token, "a checkpoint": checkpoint}
    return MemoryPlan(ranks, whole, held, moved, disk)


def _bytes(leaves: Any) -> int:
    """What a rank holds of these leaves."""
    return sum(math.prod(leaf.local_shape) * leaf.dtype.itemsize for leaf in leaves.values())


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
        lines += [title, *(f"  {name:<30}{_readable(value):>12}" for name, value in values.items())]
    return "\n".join(lines)


def _readable(count: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def check_fits(config: Config, ranks: int, limit: float, where: str, tied: bool = False) -> None:
    """Refuse a run whose ranks need more than `limit` bytes each, before anything is loaded.

    Raises:
        UserError: names both sizes, the largest part, and the number of ranks that could do, if any.
    """
    plan = plan_memory(config, ranks, tied=tied)
    if plan.needed <= limit:
        return
    enough = [
        n
        for n in (2, 4, 8, 16, 32, 64)
        if n > ranks and plan_memory(config, n, tied=tied).needed <= limit
    ]
    most = max(plan.held, key=lambda name: plan.held[name])
    raise UserError(
        f"a rank of {ranks} holds at least {_readable(plan.needed)}, most of it {most} "
        f"({_readable(plan.held[most])}); {where} is {_readable(int(limit))}; "
        + (
            f"start {enough[0]} ranks"
            if enough
            else "more ranks won't do: take a smaller draft vocabulary or target"
        )
    )


def memory_of(device: str) -> float:
    """All memory that a rank can have on `device`, in bytes: the GPU's, or this machine's divided by its ranks."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_properties(kind).total_memory
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
