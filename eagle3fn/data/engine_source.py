"""A serving engine as a source of features; what it gives is compared with the target's files.

The engine computes the layers. Head, final norm and digests come from the target's files, so that
training reads what it reads of features made by the model itself.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.stamps import Stamps
from eagle3fn.base.types import Sample
from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.generate import Sampling
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import FeatureSource, answered, target_record, token_batches
from eagle3fn.data.target import load_target
from eagle3fn.data.target_source import config_hash, loaded_config, weights_folder
from eagle3fn.data.target_tensors import StoredTarget, read_stored_target
from eagle3fn.data.weights import files_digest, weight_files
from eagle3fn.engines.hidden_states import (
    HiddenStates,
    Row,
    Score,
    Writer,
    Writing,
    row_fault,
    written_fault,
)

ENGINE_BATCH_TOKENS = 32_768
"""Tokens that an engine is asked for at once, where nobody says how many."""
CHECKS = ("hf", "logits")
_LARGEST_MODEL = 4 * 2**30  # bytes of weights that are loaded to check a row
_COMPARED = 128  # tokens of a row
_DISTANCE = {torch.float32: 1e-3}  # of states, relative, median over tokens
_HALF_DISTANCE = 0.05
_LOG_PROB = {torch.float32: 0.01}  # nats, median over tokens
_HALF_LOG_PROB = 0.15


def check_room(config: Any, max_length: int, engine: str) -> None:
    """Refuse samples as long as the target's limit: an engine writes one token more.

    Raises:
        UserError: they are.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length + 1 > limit:
        raise UserError(
            f"max_length = {max_length}: {engine} needs room for one token more, and the target's "
            f"max_position_embeddings is {limit}; set --max-length to at most {limit - 1}"
        )


def default_check(target: str | Path, arguments: dict[str, Any]) -> str:
    """ "hf" for a target of at most 4 GiB that is not quantised, else "logits"."""
    folder = weights_folder(target)
    size = sum((folder / name).stat().st_size for name in set(weight_files(folder).values()))
    quantised = getattr(loaded_config(target), "quantization_config", None) is not None
    quantised = quantised or arguments.get("quantization") is not None
    return "logits" if quantised or size > _LARGEST_MODEL else "hf"


def engine_source(
    engine: HiddenStates,
    target: str | Path,
    layers: Sequence[int],
    *,
    batch_tokens: int = ENGINE_BATCH_TOKENS,
    check: str = "logits",
    say: Callable[[str], None] = lambda line: None,
    stamps: Stamps | None = None,
    stops: Sequence[int] = (),
) -> FeatureSource:
    """An engine that has a target, or loads it, as a source of features.

    Every row is checked by itself; the first one is compared before its samples are returned.
    Several threads may ask it, if they may ask the engine.

    Args:
        engine: where the states come from.
        target: the same target's folder or id.
        layers: the tapped decoder layers, ascending and counted from 0.
        batch_tokens: tokens that the engine is asked for at once, as `data.sources.token_batches`
            counts them.
        check: what the first row is compared with: "hf", the states of the target loaded here by
            transformers, or "logits", the engine's own log-probabilities with
            `log_softmax(last_hidden @ head.T)`.
        say: called with one line on how the first row compares.
        stamps: of the target's files, as in `data.sources.model_source`.
        stops: tokens that end an answer, as there. It writes if there are some, and the engine is a
            `Writer`.

    Raises:
        UserError: as `data.target_tensors.read_stored_target`.
    """
    config = loaded_config(target)
    stored = read_stored_target(target, engine.dtype)
    record = target_record(
        config,
        layers,
        name=str(target),
        config_hash=config_hash(target),
        tensors=stored.record,
    )
    weights = files_digest(weights_folder(target))
    rows = _CheckedRows(
        engine, target, layers, config.hidden_size, stored, batch_tokens, check, say, stops
    )
    return FeatureSource(
        config=config,
        layers=tuple(layers),
        dtype=engine.dtype,
        head=stored.head,
        target=record,
        identity={"config": record["config_hash"], "weights": weights, "engine": engine.record},
        features=rows.features,
        write=rows.write if stops and isinstance(engine, Writer) else None,
        index={"engine": engine.record},
        files=str(target),
        stamps=stamps,
    )


class _CheckedRows:
    """Samples out of an engine's rows."""

    def __init__(
        self,
        engine: HiddenStates,
        target: str | Path,
        layers: Sequence[int],
        hidden_size: int,
        stored: StoredTarget,
        batch_tokens: int,
        check: str,
        say: Callable[[str], None],
        stops: Sequence[int],
    ) -> None:
        self.engine = engine
        self.target = target
        self.layers = layers
        self.hidden_size = hidden_size
        self.stored = stored
        self.batch_tokens = batch_tokens
        self.check = check
        self.say = say
        self.stops = stops
        self.compared = False
        self.comparing = threading.Lock()

    def features(self, group: Sequence[Encoded], dtype: torch.dtype) -> list[Sample]:
        """Samples of a group, stored in `dtype`."""
        self._compare_once(group[0])
        samples: dict[int, Sample] = {}
        for chosen in token_batches([len(row.input_ids) for row in group], self.batch_tokens):
            ids = [group[number].input_ids.tolist() for number in chosen]
            for number, row in zip(chosen, self.engine.rows(ids, False), strict=True):
                samples[number] = self._sample(group[number], row, dtype)
        return [samples[number] for number in range(len(group))]

    def write(
        self, prompts: Sequence[Encoded], sampling: Sampling, seed: int, dtype: torch.dtype
    ) -> list[Sample]:
        """Samples of prompts and of what the engine writes after them, stored in `dtype`."""
        assert isinstance(self.engine, Writer)
        self._compare_once(prompts[0])
        writing = Writing(
            stops=list(self.stops),
            max_new=sampling.max_new,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            batch_tokens=self.batch_tokens,
        )
        samples = []
        rows = self.engine.write([prompt.input_ids.tolist() for prompt in prompts], writing)
        for prompt, row in zip(prompts, rows, strict=True):
            written = row.token_ids[len(prompt.input_ids) :].tolist()
            what = written_fault(written, writing, len(self.stored.head))
            if what:
                raise self._refusal(prompt, what)
            samples.append(self._sample(answered(prompt, written), row, dtype))
        return samples

    def _sample(self, encoded: Encoded, row: Row, dtype: torch.dtype) -> Sample:
        """The sample of a row that is checked by itself."""
        aux, last = self._states(encoded, row)
        return Sample(
            input_ids=encoded.input_ids.clone(),
            token_mask=encoded.token_mask.clone(),
            aux_hidden=aux.to(dtype),
            last_hidden=last.to(dtype),
        )

    @torch.no_grad()
    def _states(self, encoded: Encoded, row: Row) -> tuple[Tensor, Tensor]:
        """Taps `(S, A·Ht)` and normed last state `(S, Ht)` of a row that is checked by itself."""
        ids = encoded.input_ids
        zeros = int(self.stored.zero_embedding[ids].cumprod(0).sum())  # at the beginning
        what = row_fault(row, ids, self.hidden_size, self.engine.dtype, zeros)
        if what:
            raise self._refusal(encoded, what)
        last = row.last if self.engine.normed else self.stored.norm(row.last)
        return row.aux.flatten(1), last

    def _refusal(self, encoded: Encoded, what: str) -> UserError:
        return UserError(f"{self.engine.title}: row {encoded.id!r}: {what}; {self.engine.remedy}")

    # The first row

    def _compare_once(self, encoded: Encoded) -> None:
        """Compare a row, if none was found right yet; other threads wait."""
        with self.comparing:
            if not self.compared:
                self._compare(encoded)
                self.compared = True

    def _compare(self, encoded: Encoded) -> None:
        """Compare a row's states with what the target's files say."""
        (row,) = self.engine.rows([encoded.input_ids.tolist()], True)
        aux, last = self._states(encoded, row)
        said = self._compare_scores(encoded, row, last)
        if self.check == "hf":
            said = self._compare_model(encoded, aux, last)
        self.say(f"{self.engine.title}: {said}")

    def _compare_scores(self, encoded: Encoded, row: Row, last: Tensor) -> str:
        """Compare the engine's most probable tokens with `last_hidden @ head.T`."""
        if not row.scores:
            raise self._refusal(encoded, "it came without the engine's next token")
        if not scores_fit(row.scores, len(last), len(self.stored.head)):
            raise self._refusal(encoded, "its most probable tokens are of other places or ids")
        scores = [score for score in row.scores if score.place < _COMPARED] or row.scores[-1:]
        places = torch.tensor([score.place for score in scores])
        logits = (last[places].float() @ self.stored.head.float().T).log_softmax(-1)  # (R, V)

        # Each token must be our first choice, but for ties that rounding decides.
        tokens = torch.tensor([score.token for score in scores])
        ours = logits.gather(-1, tokens[:, None])[:, 0]  # (R,)
        bound = _LOG_PROB.get(self.engine.dtype, _HALF_LOG_PROB)
        distances = logits.max(-1).values - ours
        if scores[0].log_prob is not None:
            theirs = torch.tensor([score.log_prob for score in scores])
            distances = distances.maximum((theirs - ours).abs())
        found = float(distances.median())
        if not found <= bound:
            raise self._refusal(
                encoded,
                f"last_hidden @ head.T gives its most probable tokens other log-probabilities, by "
                f"{found:.2g} nats (median of {len(scores)} tokens, at most {bound})",
            )
        return (
            f"its log-probabilities are those of last_hidden @ head.T to {found:.1g} nats (median "
            f"of {len(scores)} tokens of the first row); its taps were not compared"
        )

    def _compare_model(self, encoded: Encoded, aux: Tensor, last: Tensor) -> str:
        """Compare a row's states with those of the target loaded here."""
        ids = encoded.input_ids[None, :_COMPARED]  # (1, R): no state depends on later tokens
        model, _ = load_target(self.target, self.engine.dtype)
        expected, expected_last = hidden_states(model, ids, torch.ones_like(ids), self.layers)

        # Each tap, and the last state.
        count = ids.shape[1]
        taps = aux[:count].chunk(3, dim=-1)
        taps_here = expected[0].chunk(3, dim=-1)
        found = {
            f"state after layer {layer}": distance(ours, here)
            for layer, ours, here in zip(self.layers, taps, taps_here, strict=True)
        }
        found["last state"] = distance(last[:count], expected_last[0])

        bound = _DISTANCE.get(self.engine.dtype, _HALF_DISTANCE)
        for name, value in found.items():
            if not value <= bound:
                raise self._refusal(
                    encoded,
                    f"its {name} is not that of transformers: they differ by {value:.2g} "
                    f"(relative, median over tokens, at most {bound})",
                )
        return (
            f"its states are those of transformers to {max(found.values()):.1g} (relative, median "
            f"of {count} tokens of the first row)"
        )


def scores_fit(scores: Sequence[Score], length: int, vocab_size: int) -> bool:
    """Whether scores are of tokens and places that are there, all with a probability or none."""
    kinds = {type(score.log_prob) for score in scores}
    return kinds in ({float}, {int}, {float, int}, {type(None)}) and all(
        type(score.place) is int
        and type(score.token) is int
        and 0 <= score.place < length
        and 0 <= score.token < vocab_size
        for score in scores
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Median over tokens of `|found - expected| / |expected|`, of states `(R, Ht)`."""
    errors = (found.float() - expected.float()).norm(dim=-1)
    return float((errors / expected.float().norm(dim=-1).clamp_min(1e-30)).median())
