"""The floors of a step: counts against what PyTorch is asked for, sums, plain loops, memory."""

import json
import math
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eagle3fn as e3
from bench import common, floors, problem
from bench.floor_dense import dense_step
from bench.floor_parts import INDEX_PUT, LOGSUMEXP, Kernels, Size, chunks, fast_step
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import both_rows
from eagle3fn.model import fast
from eagle3fn.model import head_loss as fused
from eagle3fn.model.table import shapes

NO_KERNEL = {
    "view", "_unsafe_view", "expand", "slice", "select", "transpose", "permute", "unsqueeze", "squeeze", "t", "detach",
    "alias", "split", "unbind", "as_strided", "empty", "new_empty", "empty_like", "empty_strided", "promote_types",
    "_local_scalar_dense",
}  # fmt: skip


LAUNCHES = {"logsumexp": LOGSUMEXP, "_scaled_dot_product_flash_attention_backward": 3}


def numel(x: torch.Tensor) -> int:
    """Elements that lie apart: an expanded axis counts once."""
    return (
        0
        if not x.numel()
        else torch.Size([a for a, b in zip(x.shape, x.stride(), strict=True) if b]).numel()
    )


def bytes_of(xs: list[torch.Tensor]) -> int:
    """A tensor that is given twice counts once."""
    apart = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape): x for x in xs}
    return sum(numel(x) * x.itemsize for x in apart.values())


def kernels_of(
    name: str, given: list[torch.Tensor], made: list[torch.Tensor]
) -> tuple[int, int, int]:
    """Launches, bytes read and bytes written of an operation by `floor_parts`' rules."""
    read, written = bytes_of(given), bytes_of(made)
    match name:
        case "addmm":  # a copy of the addend, then a product that adds
            return 2, read + bytes_of(given[:1]), 2 * written
        case "index" | "embedding" | "index_select" | "gather":
            return 1, written, written
        case "index_add_":
            return 1, 2 * bytes_of(given[2:]), bytes_of(given[2:])
        case "index_copy_":
            return 1, bytes_of(given[2:]), bytes_of(given[2:])
        case "index_add" | "index_put":  # a copy, then the rows
            rows = bytes_of(given[-1:])
            launches = 2 if name == "index_add" else 1 + INDEX_PUT
            return launches, bytes_of(given[:1]) + 2 * rows, written + rows
        case "slice_backward" | "constant_pad_nd":  # zeros, then a copy
            return 2, read, written + read
        case "zeros_like" | "new_zeros" | "ones_like" | "full_like":
            return 1, 0, written
        case "copy_":
            return 1, bytes_of(given[1:]), written
    return LAUNCHES.get(name, 1), read, written


def flops_of(name: str, given: list[torch.Tensor]) -> int:
    """FLOPs of a product, or of attention over half a square."""
    if name in ("mm", "addmm", "addmm_"):
        a, b = given[-2:]
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if name.startswith("_scaled_dot_product_flash_attention"):
        return (5 if name.endswith("backward") else 2) * given[0].numel() * given[0].shape[2]
    return 0


class Asked(TorchDispatchMode):
    """Launches, FLOPs, bytes and the most new bytes alive of all operations in here; none needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.flops = self.bytes = self.now = self.most = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        given, made = (
            [x for x in tree_leaves(y) if isinstance(x, torch.Tensor)]
            for y in ((args, kwargs or {}), out)
        )
        self._watch(given, made)
        if name.startswith("_foreach_") and not made:  # in place: the first list is what it writes
            made = given[:1]
        if name not in NO_KERNEL and bytes_of(made):
            launches, read, written = kernels_of(name, given, made)
            self.count += launches
            self.bytes += read + written
            self.flops += flops_of(name, given)
        return out

    def _watch(self, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        old = {x.untyped_storage()._cdata for x in given}
        for storage in (x.untyped_storage() for x in made):
            if storage._cdata not in self.live | old:
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def problem_of(shape: str, seq: int, masked: float, k: int, batch: int = 1):
    """Draft, mask and size of the bench's problem."""
    draft = problem.draft_of(shape, None, seq)
    size, mask = floors.size_of(draft, batch, seq, masked, k)
    return draft, mask, size


def asked_of_a_step(draft: e3.DraftConfig, mask: torch.Tensor, size: Size) -> Asked:
    """A fast step of the bench as CUDA runs it, on PyTorch's device without values, but for the scores' kernels."""
    b, s, ht = size.batch, size.seq, draft.target_hidden_size

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def score(logits, z, t2d, kept):
        k, p, _ = logits.shape
        kl, accept, known = (make(*n, dtype=torch.float32) for n in ((k, p), (k, p), (p,)))
        return fused.PairScores(kl, kl > 0, accept, known > 0)

    ids, rows = make(b, s, dtype=torch.int64), both_rows(mask, size.k)
    batch = e3.Batch(
        ids,
        ids,
        ids,
        make(b, s, 3 * ht),
        make(b, s, ht),
        **{n: x.to("meta") for n, x in rows.items()},
    )
    v, d = draft.vocab_size, draft.draft_vocab_size
    frozen = e3.Frozen(
        make(v, draft.hidden_size),
        make(v, ht),
        make(v, dtype=torch.bool),
        make(d, dtype=torch.int64),
    )
    fns = e3.bind(
        e3.Config(draft, e3.ObjectiveConfig(ttt_length=size.k), train=e3.TrainConfig(steps=9)),
        frozen,
    )
    state = fns.init_state({name: make(*shape) for name, shape in shapes(draft).items()})
    by_flash = mock.patch.object(fast, "has_flash_kernel", lambda *_: True)
    with by_flash, mock.patch.object(fused, "score_on", lambda *_: score), Asked() as asked:
        fns.step(state, batch, donate=True)
    return asked


@pytest.mark.parametrize(
    "case", [("qwen2.5-7b", 2048, 7), ("llama-3-8b", 2048, 7), ("qwen2.5-7b", 640, 3)]
)
def test_the_counts_are_what_pytorch_is_asked_for(case) -> None:
    """But for the scores' kernels, which are not PyTorch's."""
    shape, seq, k = case
    draft, mask, size = problem_of(shape, seq, 0.5, k)
    asked = asked_of_a_step(draft, mask, size)
    counted = [x for x in fast_step(size) if x.what not in ("maximum and sums", "scores")]
    assert sum(x.flops for x in counted) == asked.flops
    assert sum(x.read + x.written for x in counted) == pytest.approx(asked.bytes, rel=0.005)
    assert sum(x.count for x in counted) == pytest.approx(asked.count, rel=0.02)
    assert asked.most < floors.new_bytes(size, "fast") < 1.35 * asked.most


@pytest.mark.parametrize("batch", [1, 2])
def test_flops_are_the_benchs_where_both_count_the_same(batch) -> None:
    draft, mask, _ = problem_of("qwen2.5-7b", 512, 0.0, 7, batch)
    size = Size(draft, batch, 512, 7, mask.numel(), mask.numel())  # every row at every step
    want = common.flops(draft, mask, 7, dense=True)
    for side, steps in (("fast", fast_step(size)), ("SpecForge", dense_step(size))):
        got: dict[str, int] = {}
        for kernels in steps:
            got[kernels.part] = got.get(kernels.part, 0) + kernels.flops
        for ours, theirs in (
            ("projection",) * 2,
            ("MLP", "mlp"),
            ("head and loss", "head"),
            ("teacher",) * 2,
        ):
            assert got[ours] == getattr(want, theirs), (side, ours)
    assert got["queries, keys, values, output"] == want.keys_values + want.queries_output


def test_a_tiny_head_by_plain_loops() -> None:
    """Half of the labels: what the logits, their gradients and the teacher's logits read and write, chunk by chunk."""
    draft, _, size = problem_of("tiny", 96, 0.5, 3)
    h, d, v, k = draft.hidden_size, draft.draft_vocab_size, draft.vocab_size, 3
    read = written = flops = taught = 0
    with mock.patch.object(fused, "_CUDA_CHUNK_BYTES", 20 * 2 * (k * d + v)):
        steps, parts = fast_step(size), chunks(size)
    assert sum(parts) == size.labels and max(parts) <= 20 and max(parts) - min(parts) <= len(parts)
    for labels in parts:
        for rows, inner, columns in ((k * labels, h, d), (k * labels, d, h), (d, k * labels, h)):
            read += 2 * (rows * inner + inner * columns)
            written += 2 * rows * columns
            flops += 2 * rows * inner * columns
        taught += 2 * (labels * h + h * v + labels * v)
    products = [x for x in steps if x.part == "head and loss" and x.flops]
    assert sum(x.read for x in products) == read
    assert sum(x.written for x in products) == written
    assert sum(x.flops for x in products) == flops
    teacher = [x for x in steps if x.part == "teacher" and x.flops]
    assert sum(x.read + x.written for x in teacher) == taught
    total = sum(math.prod(shape) for shape in shapes(draft).values())
    (adam,) = [x for x in steps if x.what == "seven passes"]
    assert (adam.read, adam.written) == (11 * 4 * total, 7 * 4 * total)


def test_a_floor_is_the_larger_of_two_and_a_total_the_sum() -> None:
    card = floors.Card(products=100.0, memory=10.0)
    assert floors.floor(Kernels("", "", 1, 500, 20, 10), card) == 5.0
    assert floors.floor(Kernels("", "", 1, 200, 20, 10), card) == 3.0
    _, _, size = problem_of("llama-3-8b", 1024, 0.5, 7)
    for side in floors.SIDES:
        slow, quick = (floors.parts(side, size, card) for card in ("h100", "h200"))
        for name, value in slow["total"].items():
            assert value == pytest.approx(
                sum(row[name] for part, row in slow.items() if part != "total")
            )
        each = floors.SIDES[side](size)
        assert slow["total"]["floor"] == pytest.approx(
            sum(floors.floor(x, floors.CARDS["h100"]) for x in each)
        )
        assert quick["total"]["floor"] < slow["total"]["floor"] < slow["total"]["expected"]


def test_the_bytes_of_all_sides_together() -> None:
    draft = problem.draft_of("qwen2.5-7b", None, 2048)
    _, _, size = problem_of("qwen2.5-7b", 2048, 0.5, 7)
    whole = floors.bytes_needed(draft, 1, 2048, 7)
    assert isinstance(whole, int)
    assert 3 * 14 * size.weights + floors.new_bytes(size, "plain") < whole < 48 << 30
    assert floors.bytes_needed(draft, 2, 2048, 7) > whole > floors.bytes_needed(draft, 1, 1024, 7)
    assert whole > floors.bytes_needed(draft, 1, 2048, 3)
    smaller = problem.draft_of("smollm2", None, 1024)
    assert floors.bytes_needed(smaller, 1, 1024, 7) < 8 << 30


def test_the_command(capsys, monkeypatch) -> None:
    call = ["floors", "--shape", "llama-3-8b", "--seq", "512", "--masked", "0.5", "--card", "h200"]
    monkeypatch.setattr("sys.argv", [*call, "--json"])
    floors.main()
    found = json.loads(capsys.readouterr().out)
    assert found["cards"].keys() == {"h200"} and found["cards"]["h200"].keys() == {
        "fast",
        "SpecForge",
    }
    assert found["bytes_needed"] == floors.bytes_needed(
        problem.draft_of("llama-3-8b", None, 512), 1, 512, 7
    )
    monkeypatch.setattr("sys.argv", call)
    floors.main()
    out = capsys.readouterr().out
    assert "h200, SpecForge" in out and "h100" not in out and "tokens/s" in out
    for wrong in (["--masked", "1"], ["--seq", "0"]):
        monkeypatch.setattr("sys.argv", [*call, *wrong])
        with pytest.raises(UserError, match=wrong[0]):
            floors.main()
