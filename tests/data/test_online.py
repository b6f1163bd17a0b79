"""The online roll-out is extraction without the files: the same samples, batches, losses, gradients and updates."""

import copy
from functools import cache
from itertools import islice

import pytest
import torch

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.draft_config import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Batch
from eagle3fn.data import extract as room
from eagle3fn.data.collate import align_mask, collate
from eagle3fn.data.extract import Encoded, encode_all, extract, run_target, supervised
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.online import online_batches, roll_out
from eagle3fn.data.pipeline import batches, prefetch
from eagle3fn.data.vocab import build_map
from eagle3fn.testing.builders import on
from tests.data_tools import tiny_model, tiny_tokenizer, write_talks

LAYERS = (1, 2, 4)
TOKENIZER = tiny_tokenizer()
MODELS = {
    dtype: tiny_model(initializer_range=0.3).to(getattr(torch, dtype))
    for dtype in ("float32", "bfloat16")
}


@cache
def model_on(device: str, dtype: str):
    """The tiny target on a device; samples come back to the CPU."""
    return MODELS[dtype] if device == "cpu" else copy.deepcopy(MODELS[dtype]).to(device)


CUT = 40  # cuts the longer conversations inside an answer, so that their last mask entry is 1


def stored(model, tmp_path, **changes):
    """Features of eight conversations in a folder, and the rows they were made of."""
    talks = write_talks(tmp_path / "c.jsonl", 8)
    extract(model, TOKENIZER, talks, tmp_path / "out", LAYERS, max_length=CUT, **changes)
    rows = supervised(encode_all(TOKENIZER, talks, CUT, model.config.vocab_size))
    return open_features(tmp_path / "out"), rows


def same(left, right):
    assert [len(x.input_ids) for x in left] == [len(x.input_ids) for x in right]
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x, y, strict=False)
    )


@pytest.mark.parametrize("dtype", MODELS)
@pytest.mark.parametrize(("batch", "group"), [(1, 3), (2, 3), (3, 8)])
def test_samples_are_those_that_extraction_stores(tmp_path, dtype, batch, group, device):
    model = model_on(device, dtype)
    opened, rows = stored(model, tmp_path, batch=batch, samples_per_shard=group)
    online = list(roll_out(model, iter(rows), LAYERS, batch, group))
    assert len(online) == 8 and len({len(row.input_ids) for row in rows}) > 3
    assert same(online, [read_sample(opened, number) for number in range(8)])


def test_alone_in_its_run_a_sample_has_the_same_bits_in_any_company(device):
    """Otherwise padding and neighbours move the last bits in fp32: equal to rounding."""
    model, source = model_on(device, "float32"), torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 30, (24,), generator=source).tolist()
    rows = [
        pair(str(n), torch.randint(300, (size,), generator=source)) for n, size in enumerate(sizes)
    ]
    alone = list(roll_out(model, rows, LAYERS, batch=1))
    assert same(alone, list(roll_out(model, rows, LAYERS, batch=1, group=5)))
    assert same(alone[::-1], list(roll_out(model, rows[::-1], LAYERS, batch=1)))
    for one, other in zip(alone, roll_out(model, rows, LAYERS, batch=8), strict=True):
        torch.testing.assert_close(one.aux_hidden, other.aux_hidden, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(one.last_hidden, other.last_hidden, atol=2e-5, rtol=1e-4)


def pair(name: str, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Encoded:
    return Encoded(name, ids, torch.ones_like(ids) if mask is None else mask)


def problem(model, rows, dtype, **objective):
    """A configuration, its functions, and frozen tensors of the target."""
    counts = torch.stack([torch.bincount(row.input_ids, minlength=300) for row in rows]).sum(0)
    draft = draft_config_from_target(model.config.to_dict(), "tiny", 40)
    config = e3.Config(
        draft,
        e3.ObjectiveConfig(ttt_length=4, **objective),
        e3.OptimizerConfig(learning_rate=1e-2),
        e3.DataConfig(global_batch=4, micro_batch=2),
        e3.TrainConfig(steps=5, dtype=dtype),
    )
    vocab = on(str(model.device), build_map(counts, 40))
    frozen = e3.Frozen(
        model.model.embed_tokens.weight, model.lm_head.weight, *vocab, model.model.norm.weight
    )
    return config, e3.bind(config, frozen)


def run(fns, start, source, device):
    """Losses, gradients and states over the batches of `source`, on a device."""
    state, seen = start, []
    for batches_of_a_step in source:
        micro = tuple(on(device, batch) for batch in batches_of_a_step)
        gradients = [
            e3.value_and_grad(fns.forward_loss, has_aux=True)(state.params, batch)
            for batch in micro
        ]
        state, metrics = fns.step(state, micro)
        seen.append(
            (gradients, state, {k: v for k, v in metrics.items() if isinstance(v, torch.Tensor)})
        )
    return seen


@pytest.mark.parametrize("align", [specforge.align_mask, align_mask])
@pytest.mark.parametrize(
    ("dtype", "numerics"), [("float32", "fast"), ("float32", "plain"), ("bfloat16", "plain")]
)
def test_five_updates_equal_those_of_stored_features(tmp_path, dtype, numerics, align, device):
    """Batches, losses, gradients of each micro-batch and every leaf of the state, more than two epochs long."""
    model = model_on(device, dtype)
    opened, rows = stored(model, tmp_path, batch=1)
    config, fns = problem(model, rows, dtype, numerics=numerics)
    offline, online = (
        list(source)
        for source in (
            batches(opened, range(8), config, 0, 5, align_mask=align),
            online_batches(model, rows, LAYERS, config, 0, 5, align_mask=align),
        )
    )
    assert equal(offline, online) and len(online) == 5 and online[0][0].row_counts is not None
    start = fns.init_state(on(device, fns.init(0)))
    left, right = run(fns, start, offline, device), run(fns, start, online, device)
    assert equal(left, right)
    assert all(bool(value.any()) for value in left[0][0][0][1].values()), "a gradient leaf is zero"


def test_the_last_kept_entry_of_an_online_mask_is_zeroed(tmp_path):
    """Legacy alignment: with the entry left at 1, as the old tool has it online, rows and loss are others."""
    model = MODELS["float32"]
    opened, rows = stored(model, tmp_path, batch=1)
    ending = [number for number, row in enumerate(rows) if row.token_mask[-1]]
    assert len(ending) > 2
    _, fns = problem(model, rows, "float32")
    params = fns.init(0)
    samples = list(roll_out(model, [rows[number] for number in ending], LAYERS, batch=1))
    online, offline = (
        collate(s, CUT, specforge.align_mask)
        for s in (samples, [read_sample(opened, n) for n in ending])
    )
    assert equal(fns.forward_loss(params, online), fns.forward_loss(params, offline))
    raw = torch.nn.utils.rnn.pad_sequence(
        [sample.token_mask for sample in samples], batch_first=True
    )
    kept: Batch = online._replace(row_mask=raw)
    (loss, aux), (other, more) = fns.forward_loss(params, online), fns.forward_loss(params, kept)
    assert int(more.rows[0]) == int(aux.rows[0]) + len(ending)
    assert not torch.equal(loss, other)


def test_the_target_runs_when_a_group_is_asked_for(monkeypatch):
    ran = []
    monkeypatch.setattr(
        "eagle3fn.data.online.run_target",
        lambda *args: ran.append(len(args[1])) or run_target(*args),
    )
    source = iter([pair(str(n), torch.arange(5) + n) for n in range(7)])
    samples = roll_out(MODELS["float32"], source, LAYERS, batch=2, group=3)
    assert ran == []
    assert [int(sample.input_ids[0]) for sample in islice(samples, 4)] == [0, 1, 2, 3] and ran == [
        3,
        3,
    ]
    assert [int(sample.input_ids[0]) for sample in samples] == [4, 5, 6] and ran == [3, 3, 1]


def test_batches_are_read_ahead_and_a_step_runs_the_target_once(tmp_path, monkeypatch):
    model = MODELS["float32"]
    _, rows = stored(model, tmp_path)
    config, _ = problem(model, rows, "float32")
    ran = []
    monkeypatch.setattr(
        "eagle3fn.data.online.run_target",
        lambda *args: ran.append(len(args[1])) or run_target(*args),
    )
    list(online_batches(model, rows, LAYERS, config, 0, 3, batch=4))
    assert ran == [4, 4, 4]
    assert equal(
        list(prefetch(online_batches(model, rows, LAYERS, config, 1, 4), 2)),
        list(online_batches(model, rows, LAYERS, config, 1, 4)),
    )


def refused(named: str, *rows: Encoded, layers=LAYERS, model=None) -> None:
    with pytest.raises(UserError, match=named):
        list(roll_out(model or MODELS["float32"], rows, layers))


def test_bad_rows_are_refused_before_the_target_runs(monkeypatch):
    good = pair("r0", torch.arange(5))
    monkeypatch.setattr(room, "features", lambda *_: pytest.fail("the target ran"))
    refused(
        r"row 'r1': input_ids \(4,\) and token_mask \(3,\).*mend",
        good,
        pair("r1", torch.arange(4), torch.ones(3)),
    )
    refused(
        r"row 'r2': token id 300: must be in \[0, 300\); mend",
        good,
        pair("r2", torch.tensor([3, 300])),
    )
    refused(r"row 'r3': token_mask holds values", pair("r3", torch.arange(2), torch.tensor([0, 2])))
    refused(
        r"row 'r4': 257 tokens, beyond .* = 256; mend, cut",
        pair("r4", torch.zeros(257, dtype=torch.int64)),
    )
    refused(r"layers \[0, 1, 5\].*\[0, 5\)", good, layers=(0, 1, 5))
    config, _ = problem(MODELS["float32"], [good], "float32")
    with pytest.raises(UserError, match="no rows to train on; give"):
        next(online_batches(MODELS["float32"], [], LAYERS, config, 0, 1))


def test_features_that_are_not_finite_are_refused():
    model = tiny_model()
    model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    refused(
        "row 'r0': aux_hidden holds NaN or infinity at token 0; look at",
        pair("r0", torch.arange(5)),
        model=model,
    )
