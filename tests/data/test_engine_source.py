"""An engine as a source of features: equal to the model's, and what cannot be right is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.data import engine_source as module
from eagle3fn.data.decoder import final_norm
from eagle3fn.data.engine_source import check_room, default_check, engine_source
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, read_sample, tensors_of
from eagle3fn.data.generate import Sampling
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import model_source
from eagle3fn.data.target_files import target_digests
from eagle3fn.data.target_tensors import read_stored_target, read_target_tensors
from eagle3fn.engines.hidden_states import Score
from tests.engines.made_rows import CUT, LAYERS, make_target, row_of
from tests.factories import tiny_model, tiny_template

TEMPLATE = tiny_template()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("made"))


class InProcess:
    """An engine that gives `change(row)` of each right row."""

    title = "toy 1.0"
    remedy = "take another"
    normed = False
    dtype = torch.float32

    def __init__(self, made, change=lambda row: row, shift=0, version="1.0"):
        self.made, self.change, self.shift = made, change, shift
        self.record = {"name": "toy", "version": version}
        self.asked = []

    def rows(self, rows, scores):
        self.asked.append(len(rows))
        for row in rows:
            yield self.change(row_of(self.made, torch.tensor(row), self.shift))


def source_of(engine, target, **options):
    return engine_source(engine, target, LAYERS, **options)


def run(made, engine, out, **options):
    source = source_of(engine, made.target, **options)
    return extract(source, TEMPLATE, made.talks, out, max_length=CUT, samples_per_shard=3)


@pytest.mark.parametrize("check", ["hf", "logits"])
def test_features_and_target_are_those_of_the_model_itself(made, tmp_path, check):
    said = []
    engine = InProcess(made)
    index = run(made, engine, tmp_path / "engine", batch_tokens=100, check=check, say=said.append)
    itself = model_source(made.model, LAYERS, name=str(made.target))
    extract(itself, TEMPLATE, made.talks, tmp_path / "model", max_length=CUT, samples_per_shard=3)

    theirs = open_features(tmp_path / "engine")
    ours = open_features(tmp_path / "model")
    assert (
        theirs.index["target"]
        == ours.index["target"]
        | {
            "config_hash": theirs.index["target"]["config_hash"],
        }
        | target_digests(made.target)._asdict()
    )
    assert index["engine"] == {"name": "toy", "version": "1.0"}
    assert engine.asked == [1, 2, 1, 2, 1, 2]
    for number in range(8):
        found, expected = read_sample(theirs, number), read_sample(ours, number)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.token_mask, expected.token_mask)
        torch.testing.assert_close(found.aux_hidden, expected.aux_hidden, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.last_hidden, expected.last_hidden, atol=2e-5, rtol=1e-4)
    (line,) = said
    wanted = "states are those of transformers" if check == "hf" else "taps were not compared"
    assert wanted in line

    # Training finds the target's tensors by the record.
    read_target_tensors(made.target, torch.float32, tensors_of(theirs))


def cut_states(row):
    return row._replace(aux=row.aux[:-2], last=row.last[:-2])


def other_ids(row):
    ids = row.token_ids.clone()
    ids[3] += 1
    return row._replace(token_ids=ids)


def zero_end(row):
    """States of a row of which the end was never written."""
    aux, last = row.aux.clone(), row.last.clone()
    aux[-4:] = 0
    last[-4:] = 0
    return row._replace(aux=aux, last=last)


def not_a_number(row):
    last = row.last.clone()
    last[2, 1] = torch.nan
    return row._replace(last=last)


WRONG = {
    "zeros": (lambda row: row._replace(aux=row.aux * 0), "tapped states are all zero at"),
    "end of zeros": (zero_end, "all zero at 4 of"),
    "too few": (cut_states, r"tapped states have shape \(\d+, 3, 16\), not"),
    "another row's": (other_ids, "its token 3 is"),
    "shorter": (lambda row: row._replace(token_ids=row.token_ids[:-1]), "states are of"),
    "NaN": (not_a_number, "last states are not finite"),
    "dtype": (lambda row: row._replace(last=row.last.half()), "last states are float16, not"),
    "no score": (lambda row: row._replace(scores=[]), "without the engine's next token"),
    "last of another place": (
        lambda row: row._replace(last=torch.cat([row.last[:2], row.last[2:].roll(1, 0)])),
        "other log-probabilities, by",
    ),
}


@pytest.mark.parametrize(("change", "named"), WRONG.values(), ids=WRONG)
def test_row_that_cannot_be_right_is_refused_before_a_shard(made, tmp_path, change, named):
    with pytest.raises(UserError, match=rf"^toy 1.0: row 'row0': .*{named}.*; take another$"):
        run(made, InProcess(made, change), tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard*"))


def test_wrong_row_later_keeps_the_finished_shards(made, tmp_path):
    numbers = []

    def late(row):
        numbers.append(1)
        return zero_end(row) if len(numbers) == 6 else row

    with pytest.raises(UserError, match=r"row 'row5': .*all zero"):
        run(made, InProcess(made, late), tmp_path / "out", batch_tokens=100)
    assert (tmp_path / "out" / "shard-00000.json").is_file()

    # The next call makes the rest.
    engine = InProcess(made)
    run(made, engine, tmp_path / "out")
    assert engine.asked == [1, 3, 2]


@pytest.mark.parametrize("shift", [-1, 1])
def test_states_of_the_layers_next_to_the_tapped_ones_are_refused(made, tmp_path, shift):
    """As of an engine that counts its ids from another layer."""

    def right_end(row):
        return row._replace(last=row_of(made, row.token_ids).last)

    engine = InProcess(made, right_end, shift)
    with pytest.raises(UserError, match=r"its state after layer . is not that of transformers"):
        run(made, engine, tmp_path / "out", check="hf")
    if shift < 0:
        # The logits tell it too, where the last state is moved as well.
        with pytest.raises(UserError, match=r"other log-probabilities"):
            run(made, InProcess(made, shift=shift), tmp_path / "out", check="logits")


class Writes(InProcess):
    """It writes what follows a prompt in the conversations."""

    def write(self, prompts, writing):
        for prompt in prompts:
            rows = [row.input_ids for row in self.made.rows]
            ids = next(ids for ids in rows if ids[: len(prompt)].tolist() == prompt)
            yield self.change(row_of(self.made, ids))


def longer(row):
    return row._replace(token_ids=torch.cat([row.token_ids, row.token_ids[-1:]]))


def token(place, value):
    """Puts a token at a place of the row."""

    def change(row):
        ids = row.token_ids.clone()
        ids[place] = value
        return row._replace(token_ids=ids)

    return change


WRITTEN = {
    "another prompt": (token(3, 299), {}, "its token 3 is 299, not"),
    "no prompt": (lambda row: row._replace(token_ids=row.token_ids[:7]), {}, "of 7 tokens, not of"),
    "too long": (lambda row: row, {"max_new": 7}, "8 tokens were written, not at most 7"),
    "no token": (token(-1, 300), {}, r"token 300 was written, which is not in \[0, 300\)"),
    "goes on": (token(-3, 298), {}, "it goes on after a stop token"),
    "more tokens than states": (longer, {}, r"tapped states have shape \(\d+, 3, 16\), not"),
    "zeros": (zero_end, {}, "all zero at 4 of"),
    "NaN": (not_a_number, {}, "last states are not finite"),
}


@pytest.mark.parametrize(("change", "sampling", "named"), WRITTEN.values(), ids=WRITTEN)
def test_written_row_that_cannot_be_right_is_refused(made, change, sampling, named):
    engine = Writes(made, change)
    engine.rows = InProcess(made).rows  # which are right
    source = source_of(engine, made.target, stops=(298, 299))
    row = made.rows[0]
    prompt = Encoded("it", row.input_ids[:20], torch.zeros(20, dtype=torch.int64))
    assert source.write
    with pytest.raises(UserError, match=rf"^toy 1.0: row 'it': .*{named}.*; take another$"):
        source.write([prompt], Sampling(1.0, 1.0, CUT)._replace(**sampling), 0, torch.float32)


def test_source_writes_where_it_knows_the_end_and_the_engine_can(made):
    assert source_of(Writes(made), made.target, stops=(1,)).write
    assert source_of(Writes(made), made.target).write is None
    assert source_of(InProcess(made), made.target, stops=(1,)).write is None
    assert model_source(made.model, LAYERS).write is None


def test_next_token_alone_is_compared_where_there_is_no_more(made, tmp_path):
    def last_token(row):
        return row._replace(scores=[row.scores[-1]._replace(log_prob=None)])

    said = []
    run(made, InProcess(made, last_token), tmp_path / "out", say=said.append)
    assert "median of 1 tokens" in said[0]

    def another(row):
        place, token, _ = row.scores[-1]
        return row._replace(scores=[Score(place, token + 1, None)])

    with pytest.raises(UserError, match=r"other log-probabilities"):
        run(made, InProcess(made, another), tmp_path / "other")


def test_another_version_of_the_engine_does_not_go_on(made, tmp_path):
    run(made, InProcess(made), tmp_path / "out")
    with pytest.raises(UserError, match=r"made with engine .*, not .*1\.1.*; remove"):
        run(made, InProcess(made, version="1.1"), tmp_path / "out")


def test_other_weights_do_not_go_on(made, tmp_path):
    run(made, InProcess(made), tmp_path / "out")
    shutil.copytree(made.target, tmp_path / "target")
    path = tmp_path / "target" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.3.mlp.up_proj.weight"
    save_file({**tensors, key: tensors[key] + 1}, path, metadata={"format": "pt"})
    other = made._replace(target=tmp_path / "target")
    with pytest.raises(UserError, match=r"made from other"):
        run(other, InProcess(other), tmp_path / "out")


# The target's files


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma3Text", "Qwen3", "Olmo2"])
def test_final_norm_is_the_models_own(tmp_path, family):
    """It multiplies by its weight, or by one more."""
    try:
        model = tiny_model(family)
    except StrictDataclassError:  # 5.4's Olmo2 refuses the types of its own defaults
        pytest.skip(f"this release of transformers cannot configure {family}")
    final_norm(model)[1].weight.normal_()
    model.save_pretrained(tmp_path)
    stored = read_stored_target(tmp_path, torch.float32)
    states = torch.randn(7, 16)
    assert torch.equal(stored.norm(states), final_norm(model)[1](states))


def test_final_norm_with_a_bias_is_refused_by_name(tmp_path):
    tiny_model("Phi").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"LayerNorm, has bias next to its weight|biased head"):
        read_stored_target(tmp_path, torch.float32)


def quantised(folder, made):
    """The same target, as a checkpoint of int8 layers says that it is."""
    shutil.copytree(made.target, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key in list(tensors):
        if key.endswith("proj.weight"):
            tensors[key] = tensors[key].mul(100).to(torch.int8)
            tensors[f"{key}_scale"] = torch.tensor(0.01)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_quantised_target_gives_head_and_norm(made, tmp_path):
    path = quantised(tmp_path / "q", made)
    stored = read_stored_target(path.parent, torch.float32)
    assert torch.equal(stored.head, made.model.lm_head.weight)
    assert default_check(path.parent, {}) == "logits"

    engine = InProcess(made._replace(target=path.parent))
    index = run(made._replace(target=path.parent), engine, tmp_path / "out")
    found = read_target_tensors(path.parent, torch.float32, index["target"]["tensors"])
    assert torch.equal(found.embed_tokens, made.model.model.embed_tokens.weight)


def test_quantised_head_is_refused(made, tmp_path):
    path = quantised(tmp_path / "q", made)
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight is torch.int8; take a target whose"):
        read_stored_target(path.parent, torch.float32)


def test_small_targets_are_compared_with_transformers(made, monkeypatch):
    assert default_check(made.target, {}) == "hf"
    assert default_check(made.target, {"quantization": "fp8"}) == "logits"
    monkeypatch.setattr(module, "_LARGEST_MODEL", 1000)
    assert default_check(made.target, {}) == "logits"


def test_samples_as_long_as_the_targets_limit_are_refused(made):
    check_room(made.model.config, 255, "vllm")
    with pytest.raises(
        UserError, match=r"max_length = 256: vllm .* set --max-length to at most 255"
    ):
        check_room(made.model.config, 256, "vllm")
