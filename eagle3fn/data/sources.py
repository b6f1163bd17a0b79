"""Where features come from: what extraction reads of a source, and a model in this process as one.

A serving engine as a source is in `data.engine_source`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.stamps import Stamps
from eagle3fn.base.types import Sample
from eagle3fn.data.cache_check import check_batch
from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.generate import Sampling, batch_generator, generate_ids
from eagle3fn.data.samples import Encoded
from eagle3fn.data.target import weights_digest
from eagle3fn.data.target_source import model_config_hash
from eagle3fn.data.target_tensors import tensors_record

BATCH_TOKENS = 16_384
"""Tokens in one run of a target on a card, where nobody says how many."""
CPU_BATCH_TOKENS = 2_048
"""The same on CPUs, whose cores have enough to do with less."""
ONE_BY_ONE = "set batch_tokens to 1 (--batch-tokens 1)"
"""The remedy where a target's rows cannot be padded together."""


class FeatureSource(NamedTuple):
    """What computes features of token ids, and what a feature folder keeps of it."""

    config: Any  # the target's configuration, transformers' object: its sizes and limits are read
    layers: tuple[int, ...]  # the tapped decoder layers, ascending and counted from 0
    dtype: torch.dtype  # computed in
    head: Tensor  # (V, Ht), the target's, on any device
    target: dict[str, Any]  # what the index says of the target
    # What distinguishes its features from those of another source: part of the fingerprint, by
    # which a folder is resumed.
    identity: dict[str, Any]
    # Samples of a group, in its order, on the CPU, stored in the given dtype.
    features: Callable[[Sequence[Encoded], torch.dtype], list[Sample]]
    # Samples of what the target writes after the prompts of a group, in its order: prompt, answer,
    # and the stop token that ended it. The mask is 1 on what was written. By how tokens are drawn,
    # the group's seed and the dtype; None: it cannot write.
    write: Callable[[Sequence[Encoded], Sampling, int, torch.dtype], list[Sample]] | None = None
    index: dict[str, Any] = {}  # noqa: RUF012  further entries of the index
    sidecar: Callable[[], dict[str, Any]] = dict  # what a shard's sidecar keeps of its making
    # The target's folder, GGUF file or id: its files are compared where a folder is gone on with.
    files: str | None = None
    stamps: Stamps | None = None  # of the files, from before they were loaded


def model_source(
    model: Any,
    layers: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    name: str | None = None,
    stamps: Stamps | None = None,
    stops: Sequence[int] = (),
) -> FeatureSource:
    """A Hugging Face model in this process.

    Args:
        model: the target (`data.target.load_target`), on any device; it computes in its own dtype.
        layers: the tapped decoder layers, ascending and counted from 0.
        batch_tokens: tokens in one run of the target, as in `token_batches`.
        name: the target's name in the index; None, where it was loaded from.
        stamps: `data.target_files.target_stamps` from before it was loaded: an extraction refuses
            files that have changed since.
        stops: tokens that end an answer (`data.target.stop_ids`); none, and it does not write.

    Raises:
        UserError: it shall write, and rows of the model cannot be padded together.
    """
    if stops and batch_tokens > 1:
        check_batch(model, ONE_BY_ONE)

    def write(
        prompts: Sequence[Encoded], sampling: Sampling, seed: int, stored: torch.dtype
    ) -> list[Sample]:
        answered = write_answers(model, prompts, sampling, stops, seed, batch_tokens)
        return run_target(model, answered, layers, batch_tokens, stored)

    record = target_record(
        model.config,
        layers,
        name=name or model.config.name_or_path,
        config_hash=model_config_hash(model),
        tensors=tensors_record(model),
    )
    return FeatureSource(
        config=model.config,
        layers=tuple(layers),
        dtype=model.dtype,
        head=model.get_output_embeddings().weight,
        target=record,
        identity={"config": record["config_hash"], "weights": weights_digest(model)},
        features=lambda group, stored: run_target(model, group, layers, batch_tokens, stored),
        write=write if stops else None,
        sidecar=lambda: {"threads": torch.get_num_threads()},
        files=str(model.config.name_or_path) or None,
        stamps=stamps,
    )


def write_answers(
    model: Any,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    stops: Sequence[int],
    seed: int,
    batch_tokens: int,
) -> list[Encoded]:
    """Prompts, and what the target writes after them: a function of the arguments alone.

    Prompts of like length are answered together, as `token_batches` of the longest answers has it.

    Returns:
        In the order of the prompts: ids of prompt and answer, and of the stop token where one
        ended it; the mask is 1 on what was written.
    """
    longest = [len(prompt.input_ids) + sampling.max_new for prompt in prompts]
    answers: dict[int, list[int]] = {}
    for index, chosen in enumerate(token_batches(longest, batch_tokens)):
        rows = [prompts[number].input_ids.tolist() for number in chosen]
        found = generate_ids(model, rows, sampling, stops, batch_generator(seed, index))
        for number, one in zip(chosen, found, strict=True):
            answers[number] = one.ids if one.stop is None else [*one.ids, one.stop]
    return [answered(prompt, answers[number]) for number, prompt in enumerate(prompts)]


def answered(prompt: Encoded, written: Sequence[int]) -> Encoded:
    """A prompt and what was written after it, which is supervised."""
    ids = torch.tensor(written, dtype=torch.int64)
    mask = torch.zeros(len(prompt.input_ids) + len(ids), dtype=torch.int64)
    mask[len(prompt.input_ids) :] = 1
    return Encoded(prompt.id, torch.cat([prompt.input_ids, ids]), mask)


def target_record(
    config: Any, layers: Sequence[int], *, name: str, config_hash: str, tensors: dict[str, str]
) -> dict[str, Any]:
    """What the index says of the target, and `train` compares."""
    return {
        "name": name,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "aux_layers": list(layers),
        "config_hash": config_hash,
        "tensors": tensors,
    }


def check_extraction(config: Any, layers: Sequence[int], max_length: int) -> None:
    """Check that a target has `max_length` positions and the tapped `layers`.

    Raises:
        UserError: it has not.
    """
    check_max_length(max_length, getattr(config, "max_position_embeddings", None))
    count = config.num_hidden_layers
    if not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(f"layers {list(layers)}: must be layers of the target in [0, {count})")


def check_max_length(max_length: int, positions: int | None) -> None:
    """Check that a sample of `max_length` tokens fits a target's positions; None: not known.

    Raises:
        UserError: it does not.
    """
    if positions is not None and max_length > positions:
        raise UserError(
            f"max_length = {max_length}: the target's max_position_embeddings is {positions}; "
            f"set --max-length to at most {positions}"
        )


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in batches of like length, the shortest first, as many as a budget of tokens allows.

    A batch counts `rows · longest` tokens, padding included. A row longer than the budget is
    alone.

    Args:
        lengths: of the rows, in tokens.
        budget: tokens of a batch; 1, and every row is alone.

    Returns:
        The rows' numbers; each batch ends with its longest.

    >>> token_batches([5, 2, 9, 3, 2], 10)
    [[1, 4, 3], [0], [2]]
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[number] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def run_target(
    model: Any,
    group: Sequence[Encoded],
    layers: Sequence[int],
    batch_tokens: int,
    stored: torch.dtype | None = None,
) -> list[Sample]:
    """The samples of a group, in its order, on the CPU, in the dtype `stored` or the target's.

    The target runs on a batch of `token_batches` at a time, padded on the right.
    """
    samples: dict[int, Sample] = {}
    for chosen in token_batches([len(row.input_ids) for row in group], batch_tokens):
        # Pad to the longest, which is the last.
        longest = len(group[chosen[-1]].input_ids)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)  # (B, S)
        mask = torch.zeros_like(ids)  # (B, S)
        for row, number in enumerate(chosen):
            length = len(group[number].input_ids)
            ids[row, :length] = group[number].input_ids
            mask[row, :length] = 1

        # (B, S, A·Ht) and (B, S, Ht)
        aux, last = hidden_states(model, ids.to(model.device), mask.to(model.device), layers)

        # Copies: a sample must not hold the whole batch in memory.
        for row, number in enumerate(chosen):
            length = len(group[number].input_ids)
            samples[number] = Sample(
                input_ids=group[number].input_ids.clone(),
                token_mask=group[number].token_mask.clone(),
                aux_hidden=aux[row, :length].to("cpu", stored, copy=True),
                last_hidden=last[row, :length].to("cpu", stored, copy=True),
            )
    return [samples[number] for number in range(len(group))]
