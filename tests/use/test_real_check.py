"""A random pair in vLLM: it computes what this package does, and a changed draft is seen."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.types import Frozen
from eagle3fn.engines.environments import Place
from eagle3fn.model.table import init_params
from eagle3fn.use.engine_check import check_engine
from eagle3fn.use.engine_pair import CheckSettings, load_pair, run_ours
from eagle3fn.use.export import WEIGHTS, export
from tests.factories import make_map, tiny_tokenizer
from tests.serving import python_of

pytestmark = pytest.mark.engines

LAYERS = 8
VOCAB = 300
DRAFT_VOCAB = 200
SETTINGS = CheckSettings(tasks=2, max_new=12, draft_length=3, logit_tasks=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target and a random draft of it; heads of 32, as vLLM has none of 16 on a CPU."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=VOCAB,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.2,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    model.save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")

    config = draft_config_from_target(model.config.to_dict(), "target", DRAFT_VOCAB)
    vocab = make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(1))
    frozen = Frozen(model.get_input_embeddings().weight, torch.zeros(1), *vocab)
    params = init_params(config, 0, torch.float32)
    params = {name: 10 * value if value.ndim == 2 else value for name, value in params.items()}
    export(params, frozen, config, root / "draft", LAYERS, torch.float32)
    return root / "target", root / "draft"


def test_vllm_computes_what_this_package_does_and_another_draft_is_noticed(folders, tmp_path):
    target, draft = folders
    pair = load_pair(target, ["how many?", "list them"], SETTINGS)
    ours = run_ours(pair, draft, SETTINGS)
    place = Place(Path(python_of("vllm")))
    result = check_engine("vllm", place, pair, ours, SETTINGS, tmp_path)
    assert result["agrees"] is True, result
    assert 0 < result["max_logit_diff"] < 1e-4
    assert result["max_feature_diff"] < 1e-4
    assert result["tokens_equal"] == result["counts_equal"] == 2

    # The folder that vLLM loads has another head than the draft here.
    tensors = load_file(draft / WEIGHTS)
    tensors["lm_head.weight"][3] += 0.1
    save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
    result = check_engine("vllm", place, pair, ours, SETTINGS, tmp_path)
    assert result["agrees"] is False
    assert result["max_logit_diff"] > 1e-3
