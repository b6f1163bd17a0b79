"""The floors of a step: counts against what PyTorch is asked for, sums, plain loops, memory."""

import json
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eagle3fn as e3
from bench import common, problem
from bench.floor_parts import INDEX_PUT, LOGSUMEXP, Size, chunks, fast_step
from eagle3fn.base.rows import both_rows
from eagle3fn.model import fast, fused
from eagle3fn.model.table import shapes

NO_KERNEL = {
    "view", "_unsafe_view", "expand", "slice", "select", "transpose", "permute", "unsqueeze", "squeeze", "t", "detach",
    "alias", "split", "unbind", "as_strided", "empty", "new_empty", "empty_like", "empty_strided", "promote_types",
    "_local_scalar_dense",
}  # fmt: skip


def numel(x: torch.Tensor) -> int:
    """Elements that lie apart: an expanded axis counts once."""
    return 0 if not x.numel() else torch.Size([a for a, b in zip(x.shape, x.stride(), strict=True) if b]).numel()


def bytes_of(xs: list[torch.Tensor]) -> int:
    """A tensor that is given twice counts once."""
    apart = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape): x for x in xs}
    return sum(numel(x) * x.itemsize for x in apart.values())


class Asked(TorchDispatchMode):
    """Kernels, FLOPs and bytes of all operations in here, by `floor_parts`' rules; no operation needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.flops = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: C901
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        given, made = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs or {}), out))
        read, written, kernels = bytes_of(given), bytes_of(made), 1
        if name in NO_KERNEL or not written:
            return out
        match name:
            case "mm" | "addmm" | "addmm_":
                a, b = given[-2:]
                self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
                if name == "addmm":
                    kernels, read, written = 2, read + bytes_of(given[:1]), 2 * written
            case "index" | "embedding" | "index_select" | "gather":
                read = written
            case "index_add_":
                read, written = 2 * bytes_of(given[2:]), bytes_of(given[2:])
            case "index_copy_":
                read = written = bytes_of(given[2:])
            case "index_add" | "index_put":  # a copy of the first, then the rows
                rows = bytes_of(given[-1:])
                read, written = bytes_of(given[:1]) + 2 * rows, written + rows
                kernels = 2 if name == "index_add" else 1 + INDEX_PUT
            case "slice_backward" | "constant_pad_nd":  # zeros, then a copy
                read, written, kernels = read, written + read, 2
            case "zeros_like" | "new_zeros" | "ones_like" | "full_like":
                read = 0
            case "copy_":
                read = bytes_of(given[1:])
            case "logsumexp":
                kernels = LOGSUMEXP
            case "_scaled_dot_product_flash_attention":
                self.flops += 2 * given[0].numel() * given[0].shape[2]
            case "_scaled_dot_product_flash_attention_backward":
                self.flops += 5 * given[0].numel() * given[0].shape[2]
                kernels = 3
        self.count, self.bytes = self.count + kernels, self.bytes + read + written
        return out


def problem_of(shape: str, seq: int, masked: float, k: int, batch: int = 1):
    """Draft, mask, rows and size of the bench's problem."""
    draft, source = problem.draft_of(shape, None, seq), torch.Generator().manual_seed(0)
    spoken = torch.stack([problem.turns(seq, masked, source) for _ in range(batch)])
    mask = torch.stack([problem.align_mask(row, "legacy") for row in spoken])
    rows = both_rows(mask, k)
    return draft, mask, rows, Size(draft, batch, seq, k, len(rows["rows"]), len(rows["labels"]))


def asked_of_a_step(draft: e3.DraftConfig, rows: dict, size: Size) -> Asked:
    """A fast step of the bench as CUDA runs it, on PyTorch's device without values, but for the scores' kernels."""
    b, s, ht = size.batch, size.seq, draft.target_hidden_size

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def score(logits, z, t2d, kept):
        k, p, _ = logits.shape
        kl, accept, known = (make(*n, dtype=torch.float32) for n in ((k, p), (k, p), (p,)))
        return kl, kl > 0, accept, known > 0

    ids = make(b, s, dtype=torch.int64)
    batch = e3.Batch(ids, ids, ids, make(b, s, 3 * ht), make(b, s, ht), **{n: x.to("meta") for n, x in rows.items()})
    v, d = draft.vocab_size, draft.draft_vocab_size
    frozen = e3.Frozen(make(v, draft.hidden_size), make(v, ht), make(v, dtype=torch.bool), make(d, dtype=torch.int64))
    fns = e3.bind(e3.Config(draft, e3.ObjectiveConfig(ttt_length=size.k), train=e3.TrainConfig(steps=9)), frozen)
    state = fns.init_state({name: make(*shape) for name, shape in shapes(draft).items()})
    by_flash = mock.patch.object(fast, "fits", lambda *_: True)
    with by_flash, mock.patch.object(fused, "score_on", lambda *_: score), Asked() as asked:
        fns.step(state, batch, donate=True)
    return asked


@pytest.mark.parametrize("case", [("qwen2.5-7b", 2048, 7), ("llama-3-8b", 2048, 7), ("qwen2.5-7b", 640, 3)])
def test_the_counts_are_what_pytorch_is_asked_for(case) -> None:
    shape, seq, k = case
    draft, _, rows, size = problem_of(shape, seq, 0.5, k)
    asked = asked_of_a_step(draft, rows, size)
    counted = [x for x in fast_step(size) if x.what not in ("maximum and sums", "scores")]
    assert sum(x.flops for x in counted) == asked.flops
    assert sum(x.read + x.written for x in counted) == pytest.approx(asked.bytes, rel=0.005)
    assert sum(x.count for x in counted) == pytest.approx(asked.count, rel=0.02)
