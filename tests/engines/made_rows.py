"""A tiny target in a folder, and what a right vLLM answers to the rows of its conversations."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.encode import encode_all
from eagle3fn.data.samples import Encoded, SampleMaker
from eagle3fn.engines import process
from eagle3fn.engines.hidden_states import Row, Score
from eagle3fn.engines.vllm_process import Taps, taps_of
from tests.factories import tiny_model, tiny_template, tiny_tokenizer, write_talks

LAYERS = (0, 2, 4)  # the last layer's output is also what the final norm reads
CUT = 90  # tokens of a sample


class Made(NamedTuple):
    target: Path
    talks: Path
    model: Any
    rows: list[Encoded]
    taps: Taps


def make_target(root: Path, count: int = 8, **changes: Any) -> Made:
    """`changes` are arguments of `tiny_model`."""
    model = tiny_model(initializer_range=0.3, **changes)  # layers differ
    model.save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    talks = write_talks(root / "talks.jsonl", count)
    rows = list(encode_all(SampleMaker(tiny_template(), CUT), talks, 300))
    return Made(root / "target", talks, model, rows, taps_of(LAYERS, 5))


@torch.no_grad()
def states_of(model: Any, ids: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """The layers' outputs `(S, n, Ht)`, computed row by row."""
    found, _ = hidden_states(model, ids[None], torch.ones_like(ids)[None], layers)
    return found[0].unflatten(-1, (len(layers), -1))


@torch.no_grad()
def scores_of(model: Any, ids: torch.Tensor) -> list[Score]:
    """The most probable token after each place, from the model's own logits."""
    best = model(input_ids=ids[None]).logits[0].log_softmax(-1).max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Score(place, token, value) for place, (token, value) in enumerate(pairs)]


def row_of(made: Made, ids: torch.Tensor, shift: int = 0) -> Row:
    """What a right engine gives; with `shift`, from so many layers later or earlier."""
    layers = [min(max(number - 1 + shift, 0), 4) for number in made.taps.ids]
    states = states_of(made.model, ids, layers)
    scores = scores_of(made.model, ids)
    return Row(ids.clone(), states[:, made.taps.aux], states[:, made.taps.last], scores)


def write_answers(made: Made, folder: Path) -> None:
    """The files that a stand-in program or server gives away."""
    folder.mkdir()
    answers = {}
    for number, row in enumerate(made.rows):
        ids = row.input_ids
        states = states_of(made.model, ids, [one - 1 for one in made.taps.ids])
        tensors = {"hidden_states": states.contiguous(), "token_ids": ids}
        save_file(tensors, folder / f"{number}.safetensors")
        answers[json.dumps(ids.tolist())] = {
            "file": f"{number}.safetensors",
            "scores": scores_of(made.model, ids),
        }
    (folder / "rows.json").write_text(json.dumps(answers))


def stand_in(folder: Path, answers: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> None:
    """Put the stand-in program in vLLM's place; `plan` says how it goes wrong."""
    folder.mkdir(exist_ok=True)
    if folder != process.PROGRAMS:
        shutil.copy(process.PROGRAMS / "answering.py", folder)
        shutil.copy(Path(__file__).parent / "features_engine.py", folder / "vllm_features.py")
        monkeypatch.setattr(process, "PROGRAMS", folder)
    plan = {"version": "0.32.0", "files": str(answers), **plan}
    (folder / "plan.json").write_text(json.dumps(plan))
