"""SpecForge's script and ours train alike on features that came from a serving engine.

The engine's states go through all checks of `data.engine_source`. A stand-in answers in place of
vLLM; `tests/engines/test_real_training.py` has vLLM itself.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.base.types import Frozen, Sample
from eagle3fn.data.collate import collate
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.samples import Encoded
from eagle3fn.engines.vllm_process import VllmProcess, taps_of
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing.builders import Case, generator, tiny_params
from tests.engines.made_rows import Made, stand_in, write_answers
from tests.factories import GATE
from tests.specforge.helpers import recipe_at
from tests.specforge.oracle_online import target_frozen, tiny_target
from tests.specforge.oracle_script import ScriptTrainer, load_script
from tests.specforge.script_updates import check_updates

LAYERS = (1, 2, 4)
UPDATES = 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, accumulation="params")


def drawn_rows(case: Case, count: int) -> list[Encoded]:
    """Rows of unlike length; about two of three tokens are supervised."""
    source = generator(case, 4)
    rows = []
    for number in range(count):
        ids = torch.randint(case.vocab, (8 + number % 5,), generator=source)
        mask = (torch.rand(len(ids), generator=source) < 0.7).long()
        rows.append(Encoded(str(number), ids, mask))
    return rows


def features_of(made: Made, dtype: torch.dtype, root: Path, patch: pytest.MonkeyPatch) -> Any:
    """The rows' samples, as the stand-in in vLLM's place gives them."""
    write_answers(made, root / "answers")
    stand_in(root / "programs", root / "answers", patch)
    names = (sys.executable, made.target, made.taps, root / "log")
    with VllmProcess(*names, max_length=32, dtype=torch.float32) as engine:
        source = engine_source(engine, made.target, LAYERS, check="logits")
        return source.features(made.rows, dtype)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_on_an_engines_features_equal_specforges_script(
    commit: Oracle, dtype: Any, micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`micro` micro-batches of two samples; the target computes in fp32, the draft in `dtype`."""
    case = replace(GATE, dtype=dtype)
    model = tiny_target(replace(case, dtype="float32"))
    model.save_pretrained(tmp_path / "target")
    rows = drawn_rows(case, UPDATES * micro * 2)
    made = Made(tmp_path / "target", tmp_path, model, rows, taps_of(LAYERS, 5))
    samples: list[Sample] = features_of(made, case.torch_dtype, tmp_path, monkeypatch)

    # The same micro-batches for both sides.
    config = case.config(OPTIMIZER, UPDATES)
    pairs = [
        collate(samples[first : first + 2], config, specforge.align_mask)
        for first in range(0, len(samples), 2)
    ]
    updates = [pairs[first : first + micro] for first in range(0, len(pairs), micro)]

    frozen: Frozen = target_frozen(case, model.to(case.torch_dtype))
    script = load_script(commit)
    theirs = ScriptTrainer(commit, script, case, OPTIMIZER, UPDATES, frozen=frozen)
    functions = e3.bind(config, frozen, recipe=recipe_at(2))
    params = tiny_params(case)
    state = check_updates(functions, functions.init_state(params), theirs, updates)
    assert all(not torch.equal(state.masters[name], params[name].float()) for name in params)
