"""Whether answers are distinguished from those of others by the target's probabilities."""

import pytest
import torch

from eagle3fn.data.features import open_features
from eagle3fn.data.own import Agreement, foreign_note, measure_agreement
from tests.factories import normal, random_sample, write_folder

VOCAB = 50
HIDDEN = 4
HEAD = 3 * normal(torch.Generator().manual_seed(5), VOCAB, HIDDEN)


def folder(tmp_path, draw, count=20, length=40, masked=0):
    """Features whose token after row `t` is `draw(logits of row t)`."""
    samples = []
    for seed in range(count):
        sample = random_sample(length, seed, VOCAB, HIDDEN)
        ids = draw(sample.last_hidden.float() @ HEAD.T)
        mask = torch.ones(length, dtype=torch.int64)
        mask[:masked] = 0
        samples.append(sample._replace(input_ids=torch.cat([ids[:1], ids[:-1]]), token_mask=mask))
    return open_features(write_folder(tmp_path, samples, VOCAB, HIDDEN))


def drawn(logits):
    torch.manual_seed(1)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def greedy(logits):
    return logits.argmax(-1)


def any_token(logits):
    torch.manual_seed(2)
    return torch.randint(VOCAB, (len(logits),))


def test_means_are_those_of_the_whole_softmax(tmp_path):
    features = folder(tmp_path, drawn, count=3, length=9)
    found = measure_agreement(features, HEAD)

    nats, entropies, firsts = [], [], []
    for number in range(3):
        sample = random_sample(9, number, VOCAB, HIDDEN)
        logits = sample.last_hidden.float() @ HEAD.T
        logs = logits.log_softmax(-1)[:-1]  # the last row's token is beyond the end
        ids = drawn(logits)[:-1]
        nats.append(-logs.gather(-1, ids[:, None])[:, 0])
        entropies.append(-(logs.exp() * logs).sum(-1))
        firsts.append((logs.argmax(-1) == ids).float())
    assert found.tokens == 24
    assert found.surprise == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)
    assert found.entropy == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)
    assert found.first_choice == pytest.approx(float(torch.cat(firsts).mean()))


def test_blocks_of_the_head_give_the_same(tmp_path, monkeypatch):
    features = folder(tmp_path, drawn)
    whole = measure_agreement(features, HEAD)
    monkeypatch.setattr("eagle3fn.data.own._COLUMNS", 7)
    assert measure_agreement(features, HEAD) == pytest.approx(whole, rel=1e-4)


def test_own_answers_are_distinguished_from_others(tmp_path):
    own = measure_agreement(folder(tmp_path / "own", drawn), HEAD)
    best = measure_agreement(folder(tmp_path / "best", greedy), HEAD)
    others = measure_agreement(folder(tmp_path / "others", any_token), HEAD)
    assert abs(own.excess) < 0.15
    assert best.first_choice == 1 and best.excess < 0
    assert others.excess > 0.5
    for found in (own, best):
        assert foreign_note(found, "t", "c.jsonl") is None
    note = foreign_note(others, "my target", "c.jsonl")
    assert note
    assert (
        "eagle3fn regenerate --target 'my target' --conversations c.jsonl --out OWN.jsonl" in note
    )
    assert f"{others.surprise:.2f} nats" in note
    assert len(note.splitlines()) == 3


def test_only_supervised_tokens_of_few_samples_are_read(tmp_path, monkeypatch):
    features = folder(tmp_path, drawn, count=40, masked=30)
    read = []
    real = measure_agreement.__globals__["read_last_hidden"]
    monkeypatch.setattr(
        "eagle3fn.data.own.read_last_hidden",
        lambda features, number: read.append(number) or real(features, number),
    )
    found = measure_agreement(features, HEAD)
    assert found.tokens == 16 * 10
    assert len(read) == 16
    assert read[0] < 3 and read[-1] > 36


def test_nothing_is_said_without_tokens_or_where_features_are_no_numbers(tmp_path):
    features = folder(tmp_path, drawn, masked=40)
    assert measure_agreement(features, HEAD) == Agreement(0, 0, 0, 0)
    for value in (0.0, float("nan")):
        assert foreign_note(Agreement(9, 0, value, value), "t", "c") is None
