"""The online roll-out is extraction without the files: the same samples, batches and updates."""

import copy
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.data.collate import align_mask, collate
from eagle3fn.data.encode import encode_all
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.online import features_of, roll_out
from eagle3fn.data.pipeline import batches
from eagle3fn.data.samples import Encoded, SampleMaker
from eagle3fn.data.sources import model_source
from eagle3fn.data.stages import prefetch
from eagle3fn.data.vocab import build_map
from eagle3fn.testing.builders import on
from tests.factories import tiny_model, tiny_template, write_talks

LAYERS = (1, 2, 4)
CUT = 40  # cuts the longer conversations inside an answer, so that their last mask entry is 1
TEMPLATE = tiny_template()
MODELS = {
    dtype: tiny_model(initializer_range=0.3).to(getattr(torch, dtype))
    for dtype in ("float32", "bfloat16")
}


@cache
def model_on(device: str, dtype: str):
    """The tiny target on a device; samples come back to the CPU."""
    return MODELS[dtype] if device == "cpu" else copy.deepcopy(MODELS[dtype]).to(device)


@contextmanager
def counted_rows(model):
    """The number of rows in each run of the target."""
    counts = []

    def count(_module: Any, _inputs: Any, options: dict[str, Any]) -> None:
        counts.append(len(options["input_ids"]))

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def stored(model, tmp_path, **changes):
    """Features of eight conversations in a folder, and the rows they were made of."""
    talks = write_talks(tmp_path / "c.jsonl", 8)
    source = model_source(model, LAYERS, batch_tokens=changes.pop("batch_tokens", 16_384))
    extract(source, TEMPLATE, talks, tmp_path / "out", max_length=CUT, **changes)
    rows = encode_all(SampleMaker(TEMPLATE, CUT), talks, model.config.vocab_size)
    return open_features(tmp_path / "out"), rows


def online_batches(model, rows, config, start, stop, batch_tokens=1, **options):
    """The batches of a list of steps, from features that are computed as they are asked for."""
    with features_of(model_source(model, LAYERS, batch_tokens=batch_tokens), rows) as features:
        return list(batches(features, range(len(rows)), config, start, stop, **options))


def pair(name: str, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Encoded:
    return Encoded(name, ids, torch.ones_like(ids) if mask is None else mask)


def all_but_last(token_mask: torch.Tensor) -> torch.Tensor:
    """A row mask `(S,)` that is the token mask with its last entry zeroed."""
    return torch.cat([token_mask[:-1], torch.zeros_like(token_mask[-1:])])


def same(left, right):
    """True if two lists of samples are equal, bit for bit and in dtype."""
    assert [len(sample.input_ids) for sample in left] == [len(s.input_ids) for s in right]
    return equal(left, right)


# Samples


@pytest.mark.parametrize("dtype", MODELS)
@pytest.mark.parametrize(("batch_tokens", "group"), [(1, 3), (80, 3), (120, 8)])
def test_samples_have_the_bits_that_extraction_stores(tmp_path, dtype, batch_tokens, group, device):
    model = model_on(device, dtype)
    features, rows = stored(model, tmp_path, batch_tokens=batch_tokens, samples_per_shard=group)
    online = list(roll_out(model, iter(rows), LAYERS, batch_tokens, group))
    assert len(online) == 8
    assert len({len(row.input_ids) for row in rows}) > 3
    assert same(online, [read_sample(features, number) for number in range(8)])


def test_bits_do_not_depend_on_other_rows_with_batch_one(device):
    model = model_on(device, "float32")
    source = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (24,), generator=source).tolist()
    rows = [
        pair(str(number), torch.randint(300, (length,), generator=source))
        for number, length in enumerate(lengths)
    ]
    alone = list(roll_out(model, rows, LAYERS, batch_tokens=1))
    assert same(alone, list(roll_out(model, rows, LAYERS, batch_tokens=1, group=5)))
    assert same(alone[::-1], list(roll_out(model, rows[::-1], LAYERS, batch_tokens=1)))

    # In larger batches padding and the other rows move the last bits: equal to rounding.
    for one, other in zip(alone, roll_out(model, rows, LAYERS), strict=True):
        torch.testing.assert_close(one.aux_hidden, other.aux_hidden, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(one.last_hidden, other.last_hidden, atol=2e-5, rtol=1e-4)


def test_target_runs_when_the_first_sample_of_a_group_is_asked_for():
    model = MODELS["float32"]
    source = iter([pair(str(number), torch.arange(5) + number) for number in range(7)])
    with counted_rows(model) as counts:
        samples = roll_out(model, source, LAYERS, batch_tokens=10, group=3)
        assert counts == []
        firsts = [int(sample.input_ids[0]) for sample in islice(samples, 4)]
        assert firsts == [0, 1, 2, 3]
        assert counts == [2, 1, 2, 1]
        firsts = [int(sample.input_ids[0]) for sample in samples]
        assert firsts == [4, 5, 6]
        assert counts == [2, 1, 2, 1, 1]


# Updates


class Problem(NamedTuple):
    config: e3.Config
    fns: Any


def problem(model, rows, dtype, **objective) -> Problem:
    """A configuration of a draft for `model`, and its functions."""
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
        embed_tokens=model.model.embed_tokens.weight,
        target_head=model.lm_head.weight,
        t2d=vocab.t2d,
        d2t=vocab.d2t,
        target_norm=model.model.norm.weight,
    )
    return Problem(config, e3.bind(config, frozen))


class Update(NamedTuple):
    losses: list[Any]  # of each micro-batch: loss, metrics
    gradients: list[dict[str, torch.Tensor]]
    state: e3.TrainState
    metrics: dict[str, torch.Tensor]


def run(fns, state, steps, device) -> list[Update]:
    """One update for each global batch of `steps`, on a device."""
    updates = []
    for batches_of_a_step in steps:
        micro = tuple(on(device, batch) for batch in batches_of_a_step)
        loss_and_gradient = e3.value_and_grad(fns.forward_loss, has_aux=True)
        found = [loss_and_gradient(state.params, batch) for batch in micro]
        state, metrics = fns.step(state, micro)
        tensors = {k: v for k, v in metrics.items() if isinstance(v, torch.Tensor)}
        losses = [loss for loss, _ in found]
        gradients = [gradient for _, gradient in found]
        updates.append(Update(losses, gradients, state, tensors))
    return updates


@pytest.mark.parametrize("align", [align_mask, all_but_last])
@pytest.mark.parametrize(
    ("dtype", "numerics"), [("float32", "fast"), ("float32", "plain"), ("bfloat16", "plain")]
)
def test_five_updates_equal_those_of_stored_features(tmp_path, dtype, numerics, align, device):
    """Batches, losses, gradients and every leaf of the state, over more than two epochs."""
    model = model_on(device, dtype)
    features, rows = stored(model, tmp_path, batch_tokens=1)
    config, fns = problem(model, rows, dtype, numerics=numerics)

    offline = list(batches(features, range(8), config, 0, 5, align_mask=align))
    online = online_batches(model, rows, config, 0, 5, align_mask=align)
    assert len(online) == 5
    assert online[0][0].row_counts is not None
    assert equal(offline, online)

    start = fns.init_state(on(device, fns.init(0)))
    left = run(fns, start, offline, device)
    right = run(fns, start, online, device)
    assert equal(left, right)
    for name, gradient in left[0].gradients[0].items():
        assert gradient.any(), f"the gradient of {name} is zero"


def test_last_entry_of_a_cut_mask_is_zeroed_online_as_in_files(tmp_path):
    """With the entry left at 1, rows and loss are others."""
    model = MODELS["float32"]
    features, rows = stored(model, tmp_path, batch_tokens=1)
    ending = [number for number, row in enumerate(rows) if row.token_mask[-1]]
    assert len(ending) > 2
    config, fns = problem(model, rows, "float32")
    params = fns.init(0)

    samples = list(roll_out(model, [rows[number] for number in ending], LAYERS, batch_tokens=1))
    online = collate(samples, config, all_but_last)
    files = [read_sample(features, number) for number in ending]
    offline = collate(files, config, all_but_last)
    assert equal(fns.forward_loss(params, online), fns.forward_loss(params, offline))

    kept = collate(samples, config, lambda token_mask: token_mask)
    loss, aux = fns.forward_loss(params, online)
    other_loss, other_aux = fns.forward_loss(params, kept)
    assert int(other_aux.rows[0]) == int(aux.rows[0]) + len(ending)
    assert not torch.equal(loss, other_loss)


def test_each_step_runs_the_target_once_on_its_own_rows(tmp_path):
    model = MODELS["float32"]
    _, rows = stored(model, tmp_path)
    config, _ = problem(model, rows, "float32")
    with counted_rows(model) as counts:
        online_batches(model, rows, config, 0, 3, batch_tokens=2**20)
    assert counts == [4, 4, 4]


def test_given_order_is_followed(tmp_path):
    model = MODELS["float32"]
    features, rows = stored(model, tmp_path, batch_tokens=1)
    config, _ = problem(model, rows, "float32")

    def backwards(n, config, place):
        return n - 1 - place % n

    offline = list(batches(features, range(8), config, 0, 3, order=backwards))
    online = online_batches(model, rows, config, 0, 3, order=backwards)
    assert equal(offline, online)
    assert not equal(online, online_batches(model, rows, config, 0, 3))


def test_prefetched_batches_are_the_same(tmp_path):
    model = MODELS["float32"]
    _, rows = stored(model, tmp_path)
    config, _ = problem(model, rows, "float32")
    expected = online_batches(model, rows, config, 1, 4)
    ahead = list(prefetch(online_batches(model, rows, config, 1, 4), 2))
    assert equal(ahead, expected)


# Refusals

IDS = torch.arange(5)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (
            pair("r", IDS[:4], torch.ones(3)),
            r"row 'r': input_ids \(4,\) and token_mask \(3,\).*mend",
        ),
        (pair("r", torch.tensor([3, 300])), r"row 'r': token id 300: must be in \[0, 300\); mend"),
        (pair("r", IDS[:2], torch.tensor([0, 2])), r"row 'r': token_mask holds values"),
        (
            pair("r", torch.zeros(257, dtype=torch.int64)),
            r"row 'r': 257 tokens, beyond .* = 256; mend, cut",
        ),
    ],
)
def test_bad_row_is_refused_before_the_target_runs(row, named):
    model = MODELS["float32"]
    with counted_rows(model) as counts, pytest.raises(UserError, match=named):
        list(roll_out(model, [pair("good", IDS), row], LAYERS))
    assert counts == []


def test_layers_outside_the_target_are_refused():
    with pytest.raises(UserError, match=r"layers \[0, 1, 5\].*\[0, 5\)"):
        list(roll_out(MODELS["float32"], [pair("good", IDS)], (0, 1, 5)))


def test_no_rows_to_train_on_are_refused():
    model = MODELS["float32"]
    config, _ = problem(model, [pair("good", IDS)], "float32")
    with pytest.raises(UserError, match="no rows to train on; give"):
        online_batches(model, [], config, 0, 1)


def test_features_that_are_not_finite_are_refused():
    model = tiny_model()
    model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    refusal = "row 'r0': aux_hidden holds NaN or infinity at token 0; look at"
    with pytest.raises(UserError, match=refusal):
        list(roll_out(model, [pair("r0", IDS)], LAYERS))
