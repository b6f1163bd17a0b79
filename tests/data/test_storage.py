"""Hidden states in half the bytes: error bounds, exact zeros and outliers, files, refusals."""

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.data.extract import extract
from eagle3fn.data.feature_size import bytes_per_token
from eagle3fn.data.features import check_shards, open_features, read_last_hidden, read_sample
from eagle3fn.data.sources import model_source
from eagle3fn.data.storage import OUTLIERS, STORES, decode, encode
from tests.factories import random_sample, tiny_model, tiny_template, write_folder, write_talks

TAPS = 3
SMALLEST_SCALE = 2.0**-100
LARGEST = {"fp8": 448.0, "int8": 127.0}
each_store = pytest.mark.parametrize("store", STORES)


@st.composite
def hidden_states(draw, least_width=1):
    """`(S, A, W)` bfloat16: parts and rows of any magnitude, some values and rows zero."""
    tokens = draw(st.integers(1, 4))
    parts = draw(st.integers(1, 3))
    width = draw(st.integers(least_width, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (tokens, parts, width)
    value = torch.randn(shape, generator=generator)
    spread = draw(st.sampled_from((0.0, 1.0, 8.0)))  # of magnitudes inside a row
    value *= torch.exp2(spread * torch.randn(shape, generator=generator))
    sizes = st.lists(st.integers(-90, 30), min_size=parts, max_size=parts)
    value *= torch.exp2(torch.tensor(draw(sizes))).float()[:, None]
    value *= torch.rand(shape, generator=generator) > draw(st.sampled_from((0.0, 0.3, 0.9)))
    return value.to(torch.bfloat16)


def through(store, value):
    """`(S, A, W)` through a store and back."""
    stored = encode(store, value.flatten(1), value.shape[-1])
    return decode(store, stored).unflatten(-1, value.shape[1:])


def outliers_of(value):
    """`(A, W)` bool: the columns that int8 keeps."""
    largest = value.abs().amax(0)
    chosen = largest.sort(descending=True, stable=True).indices[:, :OUTLIERS]
    return torch.zeros_like(largest, dtype=torch.bool).scatter(-1, chosen, True)


# Laws


@given(hidden_states())
@settings(max_examples=80, deadline=None)
def test_fp8_is_within_its_rounding_of_each_value(value):
    """Half a step of e4m3, 1/16 of the value or 2^-10 scales, and one rounding to bfloat16."""
    exact = value.double()
    scale = (exact.abs().amax(-1, keepdim=True) / 448).clamp(min=SMALLEST_SCALE)
    bound = exact.abs() * (2**-4 + 2**-8) + scale * 2**-10 * 1.01
    assert ((through("fp8", value).double() - exact).abs() <= bound).all()


@given(hidden_states())
@settings(max_examples=80, deadline=None)
def test_int8_is_within_half_a_step_and_keeps_its_outliers(value):
    """The step is 1/127 of the largest value of the token's part, outliers left out."""
    exact = value.double()
    kept = outliers_of(value)
    stored = through("int8", value).double()
    assert torch.equal(stored[:, kept], exact[:, kept])

    rest = exact.masked_fill(kept, 0.0)
    step = (rest.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)
    assert ((stored - exact).abs() <= step / 2 * 1.01 + exact.abs() * 2**-8).all()


@each_store
@given(hidden_states())
@settings(max_examples=60, deadline=None)
def test_what_was_stored_once_is_stored_again_exactly(store, value):
    once = through(store, value)
    assume(store != "int8" or torch.equal(outliers_of(once), outliers_of(value)))  # but for ties
    assert torch.equal(through(store, once), once)


@each_store
@given(hidden_states(), st.data())
@settings(max_examples=40, deadline=None)
def test_zeros_stay_and_a_part_does_not_move_another(store, value, data):
    row = data.draw(st.integers(0, len(value) - 1))
    value[row] = 0
    stored = through(store, value)
    assert not stored[row].any()
    assert not stored[value == 0].any()

    # Another part, of any magnitude, and in fp8 another token: the same bits.
    other = torch.cat([value, value[:, :1] * 4096], 1)
    assert torch.equal(through(store, other)[:, :-1], stored)
    if store == "fp8":
        assert torch.equal(through(store, value[row:]), stored[row:])


@each_store
def test_magnitudes_at_the_ends_of_training_survive(store):
    """From the least bfloat16 to the largest: the small become zero, nothing is infinite."""
    value = torch.tensor([[[1e12, -1e12, 1e-30, 3.0]], [[1e-38, 0.0, -1e-38, 0.0]]])
    value = torch.cat([value, torch.full((2, 1, OUTLIERS), 1e12)], -1).to(torch.bfloat16)
    stored = through(store, value)
    assert stored.isfinite().all()
    assert torch.equal(stored[0, 0, :2], value[0, 0, :2])
    largest = torch.tensor([[3.3e38, 1.0]]).to(torch.bfloat16)
    assert through("fp8", largest[:, None])[0, 0, 0] == largest[0, 0]


@each_store
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_without_a_number_are_refused(store, bad):
    value = torch.zeros(5, 12)
    value[3, 7] = bad
    with pytest.raises(UserError, match=rf"NaN or infinity.*token 3: {store}"):
        encode(store, value, 4)


# The format, as another program would read it


def test_fp8_values_and_scales():
    value = torch.tensor([[448.0, 1.0, -3.3, 0.0, 2.0, -4.0, 0.5, 0.25]])  # two parts
    stored = encode("fp8", value, 4)
    assert set(stored) == {"", "scale"}
    assert stored[""].dtype == torch.float8_e4m3fn and stored["scale"].dtype == torch.float32
    assert stored["scale"].tolist() == [[1.0, pytest.approx(4 / 448)]]
    assert stored[""].float().tolist() == [[448.0, 1.0, -3.25, 0.0, 224.0, -448.0, 56.0, 28.0]]
    expected = [[448.0, 1.0, -3.25, 0.0, 2.0, -4.0, 0.5, 0.25]]
    assert decode("fp8", stored).tolist() == expected


def test_int8_values_scales_and_outlier_columns():
    value = torch.ones(2, OUTLIERS + 3)
    value[0, :OUTLIERS] = 300.0  # every column but the last three
    value[1, -3:] = torch.tensor([127.0, -64.4, 0.0])
    stored = encode("int8", value, OUTLIERS + 3)
    assert stored["columns"].tolist() == [list(range(OUTLIERS))]
    assert stored["outliers"].tolist() == [[300.0] * OUTLIERS, [1.0] * OUTLIERS]
    assert stored[""][:, :OUTLIERS].tolist() == [[0] * OUTLIERS] * 2
    assert stored[""][:, OUTLIERS:].tolist() == [[127, 127, 127], [127, -64, 0]]
    assert stored["scale"].tolist() == [[pytest.approx(1 / 127)], [1.0]]


@each_store
def test_bytes_of_a_token_are_those_of_its_tensors(store):
    """But the outliers' columns, which a sample has once."""
    stored = encode(store, torch.randn(10, TAPS * 64), 64)
    stored.pop("columns", None)
    of_taps = sum(tensor.nbytes for tensor in stored.values()) // 10
    assert bytes_per_token(64, TAPS, torch.bfloat16, store) == of_taps // TAPS * (TAPS + 1) + 16
    assert bytes_per_token(64, TAPS, torch.bfloat16) == 8 * 64 + 16


@each_store
@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.update({"": stored[""].float()}),
        lambda stored: stored.update({"": stored[""][:, :-1]}),
        lambda stored: stored.update({"": stored[""][0]}),
        lambda stored: stored.update(scale=stored["scale"][:-1]),
        lambda stored: stored.update(scale=stored["scale"][:, :0]),
        lambda stored: stored.update(scale=stored["scale"].double()),
    ],
)
def test_tensors_that_do_not_fit_are_refused(store, damage):
    stored = encode(store, torch.randn(6, TAPS * 12), 12)
    damage(stored)
    with pytest.raises(UserError, match=store):
        decode(store, stored)


@pytest.mark.parametrize(
    "changed",
    [
        {"columns": torch.full((TAPS, OUTLIERS), 12, dtype=torch.int32)},
        {"columns": torch.full((TAPS, OUTLIERS), -1, dtype=torch.int32)},
        {"columns": torch.zeros(TAPS, 2, dtype=torch.int32)},
        {"outliers": torch.zeros(6, 3, dtype=torch.bfloat16)},
    ],
)
def test_outliers_that_do_not_fit_are_refused(changed):
    stored = encode("int8", torch.randn(6, TAPS * 12), 12)
    with pytest.raises(UserError, match=r"columns"):
        decode("int8", stored | changed)


# Folders


def run(folder, out, **options):
    source = model_source(tiny_model(), (1, 2, 4))
    options = {"max_length": 90, "samples_per_shard": 3, "stored": torch.bfloat16, **options}
    return extract(source, tiny_template(), write_talks(folder / "c.jsonl", 4), out, **options)


@each_store
def test_extraction_stores_what_the_store_makes_of_the_features(tmp_path, store):
    run(tmp_path, tmp_path / "plain")
    index = run(tmp_path, tmp_path / "small", store=store)
    plain = open_features(tmp_path / "plain")
    small = open_features(tmp_path / "small")
    assert (index["store"], index["dtype"]) == (store, "bfloat16")
    assert "store" not in plain.index

    check_shards(small)
    for number in range(4):
        exact = read_sample(plain, number)
        sample = read_sample(small, number)
        width = exact.last_hidden.shape[1]
        assert torch.equal(sample.input_ids, exact.input_ids)
        for name in ("aux_hidden", "last_hidden"):
            expected = decode(store, encode(store, getattr(exact, name), width))
            assert torch.equal(getattr(sample, name), expected)
        assert torch.equal(read_last_hidden(small, number)[2], sample.last_hidden)

    stored = load_file(tmp_path / "small" / "shard-00000.safetensors")
    ends = {name.removeprefix("0.aux_hidden") for name in stored if name.startswith("0.aux_hidden")}
    assert ends == {f".{end}" if end else "" for end in STORES[store].dtypes}


def test_folders_of_two_stores_are_not_mixed(tmp_path):
    run(tmp_path, tmp_path / "out", store="fp8")
    run(tmp_path, tmp_path / "out", store="fp8")  # goes on
    for other in (None, "int8"):
        with pytest.raises(
            UserError, match=rf"with store fp8, not {other or 'none'}; remove the folder"
        ):
            run(tmp_path, tmp_path / "out", store=other)


def test_unknown_store_and_another_dtype_are_refused_before_the_target_runs(tmp_path):
    with pytest.raises(UserError, match=r"store 'fp4': must be one of fp8, int8"):
        run(tmp_path, tmp_path / "out", store="fp4")
    with pytest.raises(UserError, match=r"store 'fp8': is read as bfloat16, not float32"):
        run(tmp_path, tmp_path / "out", store="fp8", stored=torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("store", ["fp4", 8, ["fp8"], None])
def test_index_of_a_store_that_there_is_none_of_is_refused(tmp_path, store):
    path = write_folder(tmp_path, [random_sample(6, 0)]) / "index.json"
    index = json.loads(path.read_text()) | {"store": store}
    index["sha256"] = json_sha256({k: v for k, v in index.items() if k != "sha256"})
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: store is .* reads fp8, int8"):
        open_features(tmp_path)


def test_a_shard_without_its_scales_is_refused_by_name(tmp_path):
    run(tmp_path, tmp_path / "out", store="fp8")
    opened = open_features(tmp_path / "out")
    shard = tmp_path / "out" / "shard-00000.safetensors"
    stored = load_file(shard)
    save_file({name: value for name, value in stored.items() if "scale" not in name}, shard)
    with pytest.raises(UserError, match=r"shard-00000.safetensors: missing or damaged at sample"):
        read_sample(opened, 1)
    stored["1.aux_hidden.scale"] = stored["1.aux_hidden.scale"][:2]
    save_file(stored, shard)
    with pytest.raises(UserError, match=r"shard-00000.*aux_hidden: .*scale.*do not fit.*again"):
        read_sample(opened, 1)
