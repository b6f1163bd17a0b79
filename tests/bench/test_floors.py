"""Floors of a step: counts against the operations of a real step, sums, plain loops, memory."""

import json
import math
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eagle3fn as e3
from bench import common, floors, problem
from bench.floor_dense import dense_step
from bench.floor_parts import INDEX_PUT, LOGSUMEXP, Kernels, chunks, fast_step, unmasked
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import tree_map
from eagle3fn.model import fast, head_loss
from eagle3fn.model.table import shapes

NO_KERNEL = set(
    "view _unsafe_view expand slice select transpose permute unsqueeze squeeze t detach alias "
    "split unbind as_strided empty new_empty empty_like empty_strided promote_types "
    "_local_scalar_dense".split()
)
LAUNCHES = {"logsumexp": LOGSUMEXP, "_scaled_dot_product_flash_attention_backward": 3}


def numel(x: torch.Tensor) -> int:
    """Elements in memory: an expanded axis counts once."""
    if not x.numel():
        return 0
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def bytes_of(xs: list[torch.Tensor]) -> int:
    """Bytes of these tensors; one that comes twice counts once."""
    different = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape): x for x in xs}
    return sum(numel(x) * x.itemsize for x in different.values())


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
        case "index_put_":  # no row twice
            return 1, bytes_of(given[-1:]), bytes_of(given[-1:])
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


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Counter(TorchDispatchMode):
    """Counts all operations while it is open: launches, FLOPs, bytes, the most new bytes alive.

    No operation needs values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.flops = self.bytes = self.now = self.most = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        given = tensors_of((args, read))
        made = tensors_of(out)
        self._watch(given, made)
        if name.startswith("_foreach_") and not made:
            made = given[:1]  # in place: the first list is what it writes
        if name not in NO_KERNEL and bytes_of(made):
            launches, read, written = kernels_of(name, given, made)
            self.count += launches
            self.bytes += read + written
            self.flops += flops_of(name, given)
        return out

    def _watch(self, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        before = {x.untyped_storage()._cdata for x in given}
        for x in made:
            storage = x.untyped_storage()
            if storage._cdata not in self.live | before:
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def counted_of(
    shape: str, seq: int, masked: float, k: int, survival: float = 1.0, batch: int = 1
) -> floors.Counted:
    """The bench's problem, counted."""
    draft = problem.draft_of(shape, None, seq)
    return floors.size_of(draft, batch, seq, masked, k, survival)


def operations_of_a_step(counted: floors.Counted, counter: type[Counter] = Counter) -> Counter:
    """A fast step as CUDA runs it, on PyTorch's device without values.

    The scores' kernels, which are not PyTorch's, are left out.
    """
    size = counted.size
    draft = size.draft
    b = size.batch
    s = size.seq
    ht = draft.target_hidden_size
    v = draft.vocab_size
    d = draft.draft_vocab_size

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def score(logits, z, label, first, t2d, kept):
        kl, accept = make(2, len(logits), dtype=torch.float32)
        correct, known = make(2, len(logits), dtype=torch.bool)
        return head_loss.PairScores(kl, correct, accept, known)

    def without_values(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

    batch = e3.Batch(
        next_ids=make(b, s + size.k - 1, dtype=torch.int64),
        attention_mask=make(b, s, dtype=torch.int64),
        row_mask=counted.row_mask.to("meta"),
        aux_hidden=make(b, s, 3 * ht),
        label_hidden=make(b, s, ht),
        survives=without_values(counted.survives),
        plan=tree_map(without_values, counted.plan),
    )
    frozen = e3.Frozen(
        embed_tokens=make(v, draft.hidden_size),
        target_head=make(v, ht),
        t2d=make(v, dtype=torch.bool),
        d2t=make(d, dtype=torch.int64),
    )
    objective = e3.ObjectiveConfig(ttt_length=size.k)
    config = e3.Config(draft, objective, train=e3.TrainConfig(steps=9))

    # `step` itself: `bind` reads the vocabulary map's values.
    params = {name: make(*shape) for name, shape in shapes(draft).items()}
    state = e3.init_state(params, config=config)
    by_flash = mock.patch.object(fast, "has_flash_kernel", lambda *_: True)
    by_score = mock.patch.object(head_loss, "score_on", lambda *_: score)
    with by_flash, by_score, counter() as seen:
        e3.step(state, batch, config=config, frozen=frozen, donate=True)
    return seen


@pytest.mark.parametrize(
    ("shape", "seq", "k", "survival", "batch"),
    [
        ("qwen2.5-7b", 2048, 7, 1.0, 1),
        ("qwen2.5-7b", 2048, 7, 0.7, 1),
        ("llama-3-8b", 1024, 5, 0.5, 2),
        ("qwen2.5-7b", 640, 3, 1.0, 1),
    ],
)
def test_counts_equal_the_operations_of_a_step(
    shape: str, seq: int, k: int, survival: float, batch: int
) -> None:
    """But for the scores' kernels, which are not PyTorch's."""
    counted = counted_of(shape, seq, 0.5, k, survival, batch)
    size = counted.size
    seen = operations_of_a_step(counted)
    kernels = [one for one in fast_step(size) if one.what not in ("maximum and sums", "scores")]
    assert sum(one.flops for one in kernels) == seen.flops
    assert sum(one.read + one.written for one in kernels) == pytest.approx(seen.bytes, rel=0.001)
    assert sum(one.count for one in kernels) == pytest.approx(seen.count, rel=0.005)
    assert seen.most < floors.new_bytes(size, "fast") < 1.35 * seen.most


@pytest.mark.parametrize("batch", [1, 2])
def test_flops_equal_those_of_the_dense_count(batch: int) -> None:
    """Where all rows are needed, the parts that both count have the same FLOPs."""
    counted = counted_of("qwen2.5-7b", 512, 0.0, 7, batch=batch)
    size = unmasked(counted.size.draft, batch, 512, 7)
    want = common.flops(size.draft, counted.scored, dense=True)
    names = {
        "projection": want.projection,
        "MLP": want.mlp,
        "head and loss": want.head,
        "teacher": want.teacher,
    }
    got: dict[str, dict[str, int]] = {}
    for side, steps in (("fast", fast_step(size)), ("SpecForge", dense_step(size))):
        got[side] = {}
        for kernels in steps:
            got[side][kernels.part] = got[side].get(kernels.part, 0) + kernels.flops
        for name, flops in names.items():
            assert got[side][name] == flops, (side, name)
    dense = got["SpecForge"]["queries, keys, values, output"]
    assert dense == want.keys_values + want.queries_output


@pytest.mark.parametrize("survival", [1.0, 0.6])
def test_flops_equal_those_of_the_needed_rows(survival: float) -> None:
    """A fast step makes the products that are needed, and no more but for attention's."""
    counted = counted_of("qwen2.5-7b", 512, 0.5, 7, survival, batch=2)
    want = common.flops(counted.size.draft, counted.scored)
    got: dict[str, int] = {}
    for kernels in fast_step(counted.size):
        got[kernels.part] = got.get(kernels.part, 0) + kernels.flops
    assert got["projection"] == want.projection
    assert got["MLP"] == want.mlp
    assert got["head and loss"] == want.head
    assert got["teacher"] == want.teacher


@pytest.mark.parametrize("survival", [1.0, 0.6])
def test_counts_of_a_tiny_head_equal_plain_loops(survival: float) -> None:
    """What the logits, their gradients and the teacher's logits read and write, chunk by chunk."""
    k = 3
    size = counted_of("tiny", 96, 0.5, k, survival).size
    h = size.draft.hidden_size
    d = size.draft.draft_vocab_size
    v = size.draft.vocab_size
    with mock.patch.object(head_loss, "_CUDA_CHUNK_BYTES", 20 * 2 * (k * d + v)):
        steps = fast_step(size)
        parts = chunks(size)
    assert sum(part.labels for part in parts) == size.labels == 47
    assert sum(part.pairs for part in parts) == size.pairs
    assert len(parts) == (3 if survival == 1 else 2)

    read = written = flops = taught = 0
    for labels, pairs in parts:
        for rows, inner, columns in ((pairs, h, d), (pairs, d, h), (d, pairs, h)):
            read += 2 * (rows * inner + inner * columns)
            written += 2 * rows * columns
            flops += 2 * rows * inner * columns
        taught += 2 * (labels * h + h * v + labels * v)
    products = [one for one in steps if one.part == "head and loss" and one.flops]
    assert sum(one.read for one in products) == read
    assert sum(one.written for one in products) == written
    assert sum(one.flops for one in products) == flops
    teacher = [one for one in steps if one.part == "teacher" and one.flops]
    assert sum(one.read + one.written for one in teacher) == taught

    total = sum(math.prod(shape) for shape in shapes(size.draft).values())
    (adam,) = [one for one in steps if one.what == "seven passes"]
    assert (adam.read, adam.written) == (11 * 4 * total, 7 * 4 * total)


def test_floor_is_the_larger_of_two_times_and_total_the_sum() -> None:
    card = floors.Card(products=100.0, memory=10.0)
    assert floors.floor(Kernels("", "", 1, 500, 20, 10), card) == 5.0
    assert floors.floor(Kernels("", "", 1, 200, 20, 10), card) == 3.0

    size = counted_of("llama-3-8b", 1024, 0.5, 7).size
    for side, step in floors.SIDES.items():
        slow = floors.parts(side, size, "h100")
        quick = floors.parts(side, size, "h200")
        for name, value in slow["total"].items():
            each = [row[name] for part, row in slow.items() if part != "total"]
            assert value == pytest.approx(sum(each))
        each = [floors.floor(kernels, floors.CARDS["h100"]) for kernels in step(size)]
        assert slow["total"]["floor"] == pytest.approx(sum(each))
        assert quick["total"]["floor"] < slow["total"]["floor"] < slow["total"]["expected"]


def test_bytes_needed_hold_all_sides_and_grow_with_the_problem() -> None:
    draft = problem.draft_of("qwen2.5-7b", None, 2048)
    size = counted_of("qwen2.5-7b", 2048, 0.5, 7).size
    whole = floors.bytes_needed(draft, 1, 2048, 7)
    assert isinstance(whole, int)
    states = 3 * 14 * size.weights
    assert states + floors.new_bytes(size, "plain") < whole < 48 << 30
    assert floors.bytes_needed(draft, 2, 2048, 7) > whole > floors.bytes_needed(draft, 1, 1024, 7)
    assert whole > floors.bytes_needed(draft, 1, 2048, 3)
    smaller = problem.draft_of("smollm2", None, 1024)
    assert floors.bytes_needed(smaller, 1, 1024, 7) < 8 << 30


def test_command_prints_a_table_or_json(capsys, monkeypatch) -> None:
    call = ["floors", "--shape", "llama-3-8b", "--seq", "512", "--masked", "0.5", "--card", "h200"]
    monkeypatch.setattr("sys.argv", [*call, "--json"])
    floors.main()
    found = json.loads(capsys.readouterr().out)
    assert found["cards"].keys() == {"h200"}
    assert found["cards"]["h200"].keys() == {"fast", "SpecForge"}
    draft = problem.draft_of("llama-3-8b", None, 512)
    assert found["bytes_needed"] == floors.bytes_needed(draft, 1, 512, 7)

    monkeypatch.setattr("sys.argv", call)
    floors.main()
    out = capsys.readouterr().out
    assert "h200, SpecForge" in out and "h100" not in out and "tokens/s" in out

    # Of rows that survive by chance a step computes fewer.
    monkeypatch.setattr("sys.argv", [*call, "--json", "--survival", "0.6"])
    floors.main()
    fewer = json.loads(capsys.readouterr().out)
    assert fewer["pairs"] < 0.5 * found["pairs"] and fewer["labels"] == found["labels"]
    times = [each["cards"]["h200"]["fast"]["total"]["floor"] for each in (fewer, found)]
    assert times[0] < 0.9 * times[1]
    for wrong in (["--masked", "1"], ["--seq", "0"], ["--survival", "0"]):
        monkeypatch.setattr("sys.argv", [*call, *wrong])
        with pytest.raises(UserError, match=wrong[0]):
            floors.main()
