"""A draft in serving engines against the same draft here: logits, tokens, counts.

Logits are compared on the same rows: the features on which an engine's draft ran are taken from it,
and compared with ours for themselves. Counts are compared on the prompts where the engine's tokens
are ours; elsewhere the target's own arithmetic has chosen another token, or the draft has changed
the answer, which it must not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.engines import decoding, logits
from eagle3fn.engines.decoding import DecoderSettings, EngineAnswer, open_decoder
from eagle3fn.engines.environments import Place
from eagle3fn.engines.llamacpp import gguf_files
from eagle3fn.engines.logits import Chain, LogitSettings, open_logits
from eagle3fn.engines.process import scratch
from eagle3fn.use.decode import Decoded
from eagle3fn.use.engine_evaluate import first_difference, token_at
from eagle3fn.use.engine_limits import ENGINES as LIMITS
from eagle3fn.use.engine_pair import CheckSettings, Ours, Pair, chain_logits
from eagle3fn.use.export import Draft, export_for

ENGINES = ("vllm", "llamacpp", "speculators", "eagle")
LOGIT_BOUND = 1e-3  # largest difference of a logit, fp32
FEATURE_BOUND = 1e-3  # largest difference of a feature, of the largest of all


# One engine


def check_engine(
    engine: str, place: Place, pair: Pair, ours: Ours, settings: CheckSettings, work: str | Path
) -> dict[str, Any]:
    """What an engine does with the draft, and whether it agrees.

    Args:
        engine: one of `ENGINES`.
        place: where it is.
        pair: target and prompts.
        ours: what the draft does here.
        settings: how much is compared.
        work: folder for logs and converted files.

    Returns:
        `version`, `loads`, `agrees`, `error` if it failed; of logits `max_logit_diff`,
        `max_feature_diff`; of decoding the counts of `compare_answers`. None where an engine has
        none of these.
    """
    work = Path(work)
    result: dict[str, Any] = {
        "version": None,
        "loads": False,
        "max_logit_diff": None,
        "max_feature_diff": None,
        "tokens_equal": None,
    }
    try:
        if engine in logits.ENGINES:
            result |= check_logits(engine, place, pair, ours, settings, work)
        if engine in decoding.ENGINES:
            result |= check_decoding(engine, place, pair, ours, settings, work)
    except UserError as error:
        result["error"] = str(error)
    result["agrees"] = agrees(result)
    return result


def agrees(result: Mapping[str, Any]) -> bool:
    """Whether an engine's result has nothing against the draft, and something for it."""
    if "error" in result:
        return False
    compared = False
    if result["max_logit_diff"] is not None:
        compared = True
        if not result["max_logit_diff"] <= LOGIT_BOUND:  # nor NaN
            return False
        if not (result["max_feature_diff"] or 0.0) <= FEATURE_BOUND:
            return False
    if result["tokens_equal"] is not None:
        compared = compared or result["tokens_equal"] > 0
        if result["counts_equal"] < result["tokens_equal"]:
            return False
        if any(one["by"] == "draft" for one in result["differing"]):
            return False
    return compared


_SHARE = 0.4  # of the machine's memory that vLLM wants free on a CPU, where we run beside it
_THREADS = ("cpuparams", "cpuparams_batch")


def _arguments(engine: str, place: Place) -> dict[str, Any]:
    """Arguments of an engine's own."""
    if engine == "eagle":
        return {"source": str(place.source)}
    if engine == "llamacpp":  # its threads wait for one another in loops
        names = [f"{part}.n_threads" for part in _THREADS]
        names += [f"speculative.draft.{name}" for name in names]
        return dict.fromkeys(names, torch.get_num_threads())
    if engine == "vllm" and not torch.cuda.is_available():
        return {"gpu_memory_utilization": _SHARE}
    return {}


def check_logits(
    engine: str, place: Place, pair: Pair, ours: Ours, settings: CheckSettings, work: Path
) -> dict[str, Any]:
    """Largest differences over the first prompts and all steps.

    `max_feature_diff` is of the largest feature, None for an engine that is given the features.
    """
    longest = max(prompt.shape[1] for prompt in pair.prompts)
    start = LogitSettings(
        positions=longest + 2 * settings.draft_length + 2,
        draft_length=settings.draft_length,
        taps=ours.taps,
        threads=torch.get_num_threads(),
        arguments=_arguments(engine, place),
    )
    embed = pair.model.get_input_embeddings().weight
    worst = 0.0
    features = 0.0
    log = work / f"{engine}-logits.log"
    with (
        _in_layout(engine, pair, ours) as folder,
        open_logits(engine, place.python, pair.folder, folder, start, log) as held,
    ):
        for prompt, chain in zip(pair.prompts, ours.chains, strict=False):
            its, found = held.logits(prompt[0].tolist(), chain)
            worst = _larger(worst, logit_difference(ours.draft, embed, its, found))
            features = _larger(features, feature_difference(its.aux, chain.aux))
        version = held.version
        given = held.given
    return {
        "version": version,
        "loads": True,
        "max_logit_diff": worst,
        "max_feature_diff": None if given else features,
    }


@contextmanager
def _in_layout(engine: str, pair: Pair, ours: Ours) -> Iterator[Path]:
    """The draft's folder as an engine reads it: speculators has a layout of its own, which alone
    says the switches.
    """
    if engine != "speculators":
        yield ours.folder
        return
    layers = pair.model.config.get_text_config().num_hidden_layers
    names = tuple(pair.model.config.architectures or ())
    with scratch("layout") as made:
        folder = made / "draft"
        row = LIMITS[engine]
        export_for(ours.draft, row, folder, layers, torch.float32, str(pair.folder), names)
        yield folder


def _larger(left: float, right: float) -> float:
    """The larger of two, NaN if one is."""
    return left if math.isnan(left) or left > right else right


def logit_difference(draft: Draft, embed_tokens: Tensor, chain: Chain, found: Tensor) -> float:
    """Largest difference of an engine's logits `(K, D)` or `(K, V)` from ours on its chain."""
    expected = chain_logits(draft, embed_tokens, chain)
    if found.shape[1] != expected.shape[1]:
        draft_ids = torch.arange(draft.config.draft_vocab_size)
        found = found[:, draft.vocab.d2t + draft_ids]
    return (found.float() - expected).abs().max().item()


def feature_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest feature; infinite where the rows are others."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def check_decoding(
    engine: str, place: Place, pair: Pair, ours: Ours, settings: CheckSettings, work: Path
) -> dict[str, Any]:
    """Counts and tokens of all prompts, by `compare_answers`.

    The engine decodes without the draft only the prompts where its tokens are not ours.
    """
    longest = max(prompt.shape[1] for prompt in pair.prompts)
    start = DecoderSettings(
        max_length=longest + settings.max_new,
        end_tokens=pair.end_tokens,
        draft_length=settings.draft_length,
        arguments=_arguments(engine, place),
    )

    def decode(
        stage: str, target: Path, draft: Path | None, numbers: Sequence[int]
    ) -> tuple[str, list[EngineAnswer]]:
        log = work / f"{engine}-{stage}.log"
        with open_decoder(engine, place.python, target, draft, start, log) as decoder:
            answers = []
            for number in numbers:
                prompt = pair.prompts[number][0].tolist()
                answers.append(decoder.decode(prompt, settings.max_new))
            return decoder.version, answers

    with _served(engine, place, pair, ours, work) as (target, draft):
        version, answers = decode("draft", target, draft, range(len(pair.prompts)))

        # Whose are the tokens that differ: the engine's target's own, or the draft's doing?
        others = []
        for number, (answer, expected) in enumerate(zip(answers, ours.decoded, strict=True)):
            if answer.tokens != expected.tokens:
                others.append(number)
        plain: dict[int, list[int]] = {}
        if others:
            _, found = decode("plain", target, None, others)
            plain = {number: one.tokens for number, one in zip(others, found, strict=True)}

    compared = compare_answers(answers, ours.decoded, plain, settings.max_new)
    return {"version": version, "loads": True, **compared}


@contextmanager
def _served(
    engine: str, place: Place, pair: Pair, ours: Ours, work: Path
) -> Iterator[tuple[Path, Path]]:
    """Target and draft as an engine loads them."""
    if engine != "llamacpp":
        yield pair.folder, ours.folder
        return
    files = gguf_files(pair.folder, ours.folder, place.source, None, work, place.python)
    with files as (target, draft):
        yield target, draft


def compare_answers(
    answers: Sequence[EngineAnswer],
    decoded: Sequence[Decoded],
    plain: Mapping[int, Sequence[int]],
    max_new: int,
) -> dict[str, Any]:
    """Counts of an engine next to ours.

    Args:
        answers: the engine's, with the draft.
        decoded: ours to the same prompts.
        plain: the engine's tokens without the draft, for each prompt whose `answers` differ.
        max_new: the limit of both.

    Returns:
        `prompts`, `tokens_equal`, `counts_equal`: numbers of prompts. `rounds`, `drafted`,
        `accepted`, and the same under `ours`: sums over the prompts with equal tokens; a round is a
        run of the target after its prefill, and an accepted token one that is part of the answer.
        An engine drafts whole rounds, ours fewer tokens near the limit. `differing`: the prompts
        with other tokens, counted from 0, with the first that differs, and `by` whom: the engine's
        "target", whose plain tokens part from ours, or the "draft".
    """
    result: dict[str, Any] = {"prompts": len(answers), "tokens_equal": 0, "counts_equal": 0}
    its = {"rounds": 0, "drafted": 0, "accepted": 0}
    own = dict(its)
    differing = []
    for number, (answer, expected) in enumerate(zip(answers, decoded, strict=True)):
        if answer.tokens != expected.tokens:
            differing.append(_first_difference(number, answer, expected, plain[number]))
            continue
        result["tokens_equal"] += 1
        one = _counts_of(answer, max_new)
        other = {
            "rounds": expected.verifications,
            "drafted": sum(expected.drafted_by_position),
            "accepted": sum(expected.accepted_by_position),
        }
        same = all(one[name] == other[name] for name in ("rounds", "accepted"))
        result["counts_equal"] += same
        for name in its:
            its[name] += one[name] or 0
            own[name] += other[name]
    return {**result, **its, "ours": own, "differing": differing}


def _counts_of(answer: EngineAnswer, max_new: int) -> dict[str, int | None]:
    return {
        "rounds": decoding.verifications(answer),
        "drafted": None if answer.counts is None else answer.counts.drafted,
        "accepted": decoding.kept_accepted(answer, max_new),
    }


def _first_difference(
    number: int, answer: EngineAnswer, expected: Decoded, plain: Sequence[int]
) -> dict[str, Any]:
    """Where an answer parts from ours, and whether the engine's plain one does so as well."""
    place = first_difference(answer.tokens, expected.tokens)
    same = list(plain[: place + 1]) == answer.tokens[: place + 1]
    return {
        "prompt": number,
        "token": place,
        "engine": token_at(answer.tokens, place),
        "ours": token_at(expected.tokens, place),
        "by": "target" if same else "draft",
    }
