"""EAGLE's program around stand-ins for EAGLE's code: answers, counts, a target's folder."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.engines import process


@pytest.fixture
def program(monkeypatch):
    """The program's module."""
    monkeypatch.syspath_prepend(str(process.PROGRAMS))
    for name in ("answering", "eagle_decode"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import eagle_decode  # pyright: ignore[reportMissingImports]

    return eagle_decode


def test_counts_end_with_the_round_that_ends_the_answer(program):
    # The prefill gives 1 token, the rounds 3, 1, 4; EAGLE has run one more.
    found = program.counted([2, 0, 3, 1], tokens=list(range(8)), length=3)
    assert found["rounds"] == 3
    assert found["drafted"] == 9
    assert found["accepted"] == 5
    assert found["accepted_by_position"] == [2, 2, 1]


def test_an_answer_that_the_prefill_ends_has_no_rounds(program):
    assert program.counted([2, 2], tokens=[7], length=2)["rounds"] == 0


@pytest.mark.parametrize(("limit", "expected"), [(2, [5, 6]), (9, [5, 6, 1]), (3, [5, 6, 1])])
def test_an_answer_ends_at_the_limit_or_after_an_end_token(program, limit, expected):
    assert program.cut([5, 6, 1, 8, 1], limit, [1, 4]) == expected


def test_one_request_is_counted_from_its_own_rounds(program):
    rounds = [4, 4, 4]  # of the request before

    def generate(ids, **options):
        assert options["max_new_tokens"] == 5
        assert options["max_length"] > 100
        rounds.extend([1, 2])
        return torch.cat([ids, torch.tensor([[10, 11, 12, 13, 14, 15]])], dim=1)

    settings = {"draft": "d", "draft_length": 2, "end_tokens": [1], "positions": 100}
    request = {"prompt": [3, 4], "max_new": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    found = program.decode(generate, rounds, request, settings)
    assert found["tokens"] == [10, 11, 12, 13, 14, 15]
    assert found["counts"]["accepted"] == 3
    assert program.decode(generate, rounds, request, {**settings, "draft": None})["counts"] is None


def test_rounds_are_watched(program):
    module = SimpleNamespace(evaluate_posterior=lambda *args: ("best", torch.tensor(3), "p"))
    rounds = program.watched(module)
    assert module.evaluate_posterior(1, 2, 3)[0] == "best"
    assert rounds == [3]


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}, 5e4, None),
        ({"rope_theta": 7.0}, 7.0, None),
        ({}, 10_000.0, None),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "llama3", "factor": 2.0}},
            5.0,
            {"rope_theta": 5.0, "rope_type": "llama3", "factor": 2.0},
        ),
    ],
)
def test_a_target_of_transformers_5_is_readable_by_4(program, tmp_path, config, theta, scaling):
    target = tmp_path / "target"
    folder = tmp_path / "made"
    target.mkdir()
    folder.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, target / "model.safetensors")
    program.prepare(target, folder)

    made = json.loads((folder / "config.json").read_text())
    assert made["rope_theta"] == theta
    assert made.get("rope_scaling") == scaling
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model.safetensors", "b": "model.safetensors"}
    assert set(load_file(folder / "model.safetensors")) == {"a", "b"}
    assert json.loads((target / "config.json").read_text()) == config


def test_tensors_that_eagle_ignores_or_lacks_are_named(program, tmp_path):
    save_file({"fc.weight": torch.ones(1), "more": torch.ones(1)}, tmp_path / "model.safetensors")
    layer = SimpleNamespace(state_dict=lambda: {"fc.weight": 0, "embed_tokens.weight": 0})
    with pytest.raises(ValueError, match=r"ignores \['more'\] and lacks nothing"):
        program.check_names(layer, tmp_path)
    layer = SimpleNamespace(state_dict=lambda: {"fc.weight": 0, "more": 0, "norm": 0})
    with pytest.raises(ValueError, match=r"ignores nothing and lacks \['norm'\]"):
        program.check_names(layer, tmp_path)
    layer = SimpleNamespace(state_dict=lambda: {"fc.weight": 0, "more": 0})
    program.check_names(layer, tmp_path)


def test_the_version_is_the_checkouts_commit(program, tmp_path):
    assert program.commit(tmp_path) == "unknown"
    (tmp_path / ".git/refs").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/main\n")
    (tmp_path / ".git/refs/main").write_text("abc\n")
    assert program.commit(tmp_path) == "abc"
    (tmp_path / ".git/HEAD").write_text("def\n")
    assert program.commit(tmp_path) == "def"
    (tmp_path / "COMMIT").write_text("ghi\n")
    assert program.commit(tmp_path) == "ghi"


def test_logits_follow_the_given_tokens(program, tmp_path):
    """A layer whose state is a sum of what it read: each step reads the token that was drafted."""
    read = []

    class Layer:
        norm = staticmethod(lambda x: x)
        lm_head = staticmethod(lambda x: x * 2)

        def reset(self):
            read.append("reset")

        def __call__(self, hidden, input_ids, past_key_values=None, use_cache=True):
            read.append((hidden.shape[1], input_ids.tolist(), past_key_values))
            cache = (past_key_values or 0) + input_ids.shape[1]
            return hidden.sum(-1, keepdim=True) + input_ids[..., None].float(), cache

    rows = tmp_path / "rows"
    chain = {
        "aux": torch.ones(2, 3),
        "next_ids": torch.tensor([4, 5]),
        "drafted": torch.tensor([7, 8, 9]),
    }
    save_file(chain, rows)
    program.logits(Layer(), {"rows": str(rows), "out": str(tmp_path / "out")})
    assert read == ["reset", (2, [[4, 5]], None), (1, [[7]], 2), (1, [[8]], 3)]
    found = load_file(tmp_path / "out")
    assert found["logits"].tolist() == [[16.0], [30.0], [46.0]]
    assert set(found) == {*chain, "logits"}
