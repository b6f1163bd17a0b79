"""A draft in stand-in engines: what agrees, what does not, and whose the difference is."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eagle3fn.engines import process
from eagle3fn.engines.decoding import Counts, EngineAnswer
from eagle3fn.engines.environments import Place
from eagle3fn.use.decode import Decoded
from eagle3fn.use.engine_check import agrees, check_engine, compare_answers
from eagle3fn.use.engine_pair import CheckSettings, Ours, Pair, chain_logits, load_pair, run_ours
from tests.use.tiny_target import VOCAB, write_pair

SETTINGS = CheckSettings(tasks=3, max_new=12, draft_length=3, logit_tasks=2)
PROMPTS = ["one", "two", "three", "not read"]

# It replays `stand_in.json` of the target's folder, by prompt, and `logits-N`, in order.
DECODES = """
import json, sys
from pathlib import Path
sys.path.insert(0, {programs!r})
from answering import serve

def start(settings):
    if not settings["target"]:
        raise RuntimeError("no target")
    known = json.loads((Path(settings["target"]) / "stand_in.json").read_text())
    if known.get("refuses"):
        raise RuntimeError(known["refuses"])
    answers = known["plain" if settings["draft"] is None else "draft"]
    return {{"version": "2030.1"}}, lambda request: answers[str(request["prompt"])]

if __name__ == "__main__":
    serve(start)
"""
GIVES_LOGITS = """
import shutil, sys
from pathlib import Path
sys.path.insert(0, {programs!r})
from answering import serve

def start(settings):
    count = iter(range(100))
    def answer(request):
        shutil.copy(Path(settings["target"]) / f"logits-{{next(count)}}", request["out"])
    return {{"version": "2030.1"}}, answer

if __name__ == "__main__":
    serve(start)
"""


@pytest.fixture(scope="module")
def pair_and_ours(tmp_path_factory) -> tuple[Pair, Ours]:
    target, draft = write_pair(tmp_path_factory.mktemp("pair"))
    pair = load_pair(target, PROMPTS, SETTINGS)
    return pair, run_ours(pair, draft, SETTINGS)


class StandIn:
    """Engines that do what this package does, unless a test changes it."""

    def __init__(self, pair: Pair, ours: Ours, work: Path) -> None:
        self.pair = pair
        self.ours = ours
        self.work = work
        embed = pair.model.get_input_embeddings().weight
        self.logits = []
        for chain in ours.chains:
            logits = torch.tensor(chain_logits(ours.draft, embed, chain).tolist())
            self.logits.append({**chain._asdict(), "logits": logits})
        self.answers: dict[str, Any] = {"draft": {}, "plain": {}}
        for prompt, decoded in zip(pair.prompts, ours.decoded, strict=True):
            rounds = decoded.verifications
            counts = {
                "rounds": rounds,
                "drafted": sum(decoded.drafted_by_position),
                "accepted": sum(decoded.accepted_by_position),
            }
            answer = {"tokens": decoded.tokens, "seconds": 1.0}
            key = str(prompt[0].tolist())
            self.answers["draft"][key] = {**answer, "counts": counts}
            self.answers["plain"][key] = {**answer, "counts": None}

    def key(self, number: int) -> str:
        return str(self.pair.prompts[number][0].tolist())

    def check(self, engine: str = "vllm") -> dict[str, Any]:
        (self.pair.folder / "stand_in.json").write_text(json.dumps(self.answers))
        for number, tensors in enumerate(self.logits):
            whole = {name: value.contiguous() for name, value in tensors.items()}
            save_file(whole, self.pair.folder / f"logits-{number}")
        place = Place(Path(sys.executable))
        return check_engine(engine, place, self.pair, self.ours, SETTINGS, self.work)


@pytest.fixture
def stand_in(pair_and_ours, tmp_path, monkeypatch) -> StandIn:
    programs = str(process.PROGRAMS)
    for name in ("vllm_decode.py", "eagle_decode.py"):
        (tmp_path / name).write_text(DECODES.format(programs=programs))
    for name in ("vllm_logits.py", "speculators_logits.py"):
        (tmp_path / name).write_text(GIVES_LOGITS.format(programs=programs))
    monkeypatch.setattr(process, "PROGRAMS", tmp_path)
    pair, ours = pair_and_ours
    return StandIn(pair, ours, tmp_path)


def test_the_first_prompts_are_taken(pair_and_ours):
    pair, ours = pair_and_ours
    assert len(pair.prompts) == len(ours.decoded) == 3
    assert len(ours.chains) == 2


def test_a_chain_is_what_decoding_drafts(pair_and_ours):
    pair, ours = pair_and_ours
    embed = pair.model.get_input_embeddings().weight
    ids = torch.arange(ours.draft.config.draft_vocab_size) + ours.draft.vocab.d2t
    for prompt, chain, decoded in zip(pair.prompts, ours.chains, ours.decoded, strict=False):
        assert len(chain.aux) == len(chain.next_ids) == prompt.shape[1]
        assert chain.next_ids[-1] == decoded.tokens[0]
        logits = chain_logits(ours.draft, embed, chain)
        assert torch.equal(ids[logits.argmax(-1)], chain.drafted)


def test_an_engine_that_does_the_same_agrees(stand_in):
    result = stand_in.check()
    assert result["agrees"] is True
    assert result["loads"] is True
    assert result["version"] == "2030.1"
    assert result["max_logit_diff"] < 1e-5
    assert result["max_feature_diff"] == 0
    assert result["tokens_equal"] == result["counts_equal"] == result["prompts"] == 3
    assert result["differing"] == []
    assert {name: result[name] for name in result["ours"]} == result["ours"]
    assert result["rounds"] == sum(one.verifications for one in stand_in.ours.decoded) > 0


def test_a_trainer_has_logits_alone(stand_in):
    result = stand_in.check("speculators")
    assert result["agrees"] is True
    assert result["max_feature_diff"] is None
    assert result["tokens_equal"] is None
    assert "rounds" not in result


def test_logits_over_the_targets_vocabulary_are_read_at_the_drafts_tokens(stand_in):
    draft = stand_in.ours.draft
    ids = torch.arange(draft.config.draft_vocab_size) + draft.vocab.d2t
    for tensors in stand_in.logits:
        wide = torch.full((SETTINGS.draft_length, VOCAB), -math.inf)
        wide[:, ids] = tensors["logits"]
        tensors["logits"] = wide
    assert stand_in.check()["max_logit_diff"] < 1e-5


@pytest.mark.parametrize(
    ("number", "step", "change", "agreed"),
    [
        (0, 0, math.nan, False),
        (0, 2, 2e-3, False),
        (1, 1, 2e-3, False),
        (1, 2, math.nan, False),
        (1, 2, 5e-4, True),
    ],
)
def test_every_step_of_every_prompt_has_its_logits_compared(stand_in, number, step, change, agreed):
    stand_in.logits[number]["logits"][step, 4] += change
    result = stand_in.check()
    assert result["agrees"] is agreed
    if agreed:
        assert result["max_logit_diff"] == pytest.approx(change, rel=0.1)


def test_features_of_other_taps_disagree_though_logits_on_them_agree(stand_in):
    chain = stand_in.ours.chains[0]
    low, middle, high = chain.aux.chunk(3, dim=1)
    turned = chain._replace(aux=torch.cat([middle, low, high], dim=1))
    embed = stand_in.pair.model.get_input_embeddings().weight
    logits = chain_logits(stand_in.ours.draft, embed, turned)
    stand_in.logits[0] = {**turned._asdict(), "logits": logits}
    result = stand_in.check()
    assert result["max_logit_diff"] < 1e-5
    assert result["max_feature_diff"] > 1e-3
    assert result["agrees"] is False


@pytest.mark.parametrize("name", ["rounds", "accepted"])
def test_other_counts_disagree(stand_in, name):
    stand_in.answers["draft"][stand_in.key(2)]["counts"][name] += 2
    result = stand_in.check()
    assert (result["tokens_equal"], result["counts_equal"]) == (3, 2)
    assert result["agrees"] is False


def other_token(stand_in: StandIn, ways: tuple[str, ...]) -> list[int]:
    tokens = list(stand_in.ours.decoded[1].tokens)
    tokens[4] = 99
    for way in ways:
        stand_in.answers[way][stand_in.key(1)]["tokens"] = tokens
    return tokens


def test_tokens_that_the_engines_target_chooses_are_listed(stand_in):
    ours = stand_in.ours.decoded[1].tokens
    other_token(stand_in, ("draft", "plain"))
    result = stand_in.check()
    first = {"prompt": 1, "token": 4, "engine": 99, "ours": ours[4], "by": "target"}
    assert result["differing"] == [first]
    assert (result["tokens_equal"], result["counts_equal"]) == (2, 2)
    left = [one.verifications for one in stand_in.ours.decoded]
    assert result["rounds"] == result["ours"]["rounds"] == left[0] + left[2]
    assert result["agrees"] is True


def test_an_answer_that_the_draft_changed_disagrees(stand_in):
    other_token(stand_in, ("draft",))
    result = stand_in.check()
    assert result["differing"][0]["by"] == "draft"
    assert result["agrees"] is False


def test_an_engine_that_refuses_the_draft_says_why(stand_in):
    stand_in.answers["refuses"] = "size mismatch for fc.weight"
    result = stand_in.check("vllm")
    assert "size mismatch for fc.weight" in result["error"]
    assert result["agrees"] is False
    assert result["loads"] is True  # for its logits


# Comparison by hand


def answer(tokens: list[int], rounds: int, drafted: int, accepted: int) -> EngineAnswer:
    return EngineAnswer(tokens, Counts(rounds, drafted, accepted), 1.0)


def decoded(tokens: list[int], rounds: int, drafted: int, accepted: int) -> Decoded:
    return Decoded(tokens, rounds, [accepted], [rounds], [drafted], 1.0, 0.1)


def test_accepted_tokens_beyond_the_limit_do_not_count():
    # 2 rounds of 3: 1 + (1 + 1) + (3 + 1) = 7 tokens, of which the limit leaves 5.
    tokens = [4, 5, 6, 7, 8]
    its = answer(tokens, rounds=2, drafted=6, accepted=4)
    own = decoded(tokens, rounds=2, drafted=4, accepted=2)
    found = compare_answers([its], [own], {}, max_new=5)
    assert found["counts_equal"] == 1
    assert (found["drafted"], found["ours"]["drafted"]) == (6, 4)
    assert found["accepted"] == found["ours"]["accepted"] == 2


def test_an_answer_cut_short_differs_behind_its_end():
    its = answer([4, 5], rounds=1, drafted=3, accepted=0)
    own = decoded([4, 5, 6], rounds=2, drafted=3, accepted=0)
    found = compare_answers([its], [own], {0: [4, 5]}, max_new=5)
    assert found["differing"] == [
        {"prompt": 0, "token": 2, "engine": None, "ours": 6, "by": "target"}
    ]


LOGITS_ONLY = {"max_logit_diff": 1e-5, "max_feature_diff": None, "tokens_equal": None}
COUNTS_ONLY = {
    "max_logit_diff": None,
    "max_feature_diff": None,
    "tokens_equal": 2,
    "counts_equal": 2,
    "differing": [],
}


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (LOGITS_ONLY, True),
        (COUNTS_ONLY, True),
        (LOGITS_ONLY | {"error": "died"}, False),
        (LOGITS_ONLY | {"max_logit_diff": 1.1e-3}, False),
        (LOGITS_ONLY | {"max_logit_diff": math.nan}, False),
        (LOGITS_ONLY | {"max_feature_diff": math.inf}, False),
        (COUNTS_ONLY | {"counts_equal": 1}, False),
        (COUNTS_ONLY | {"differing": [{"by": "draft"}]}, False),
        (COUNTS_ONLY | {"differing": [{"by": "target"}]}, True),
        (COUNTS_ONLY | {"tokens_equal": 0, "counts_equal": 0}, False),  # nothing was compared
    ],
)
def test_agreement(result, expected):
    assert agrees(result) is expected
