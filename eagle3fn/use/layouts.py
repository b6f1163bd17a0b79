"""How an engine is started with a draft, and the keys of the layout that speculators reads."""

from collections.abc import Sequence
from typing import Any

from eagle3fn.use.engine_limits import ENGINES

_SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_CLASSES = {"llama": "Llama", "qwen3": "Qwen3"}


def how_to_serve(draft: str, target: str, engines: Sequence[str]) -> list[str]:
    """A command for each of these engines that has one, with these names."""
    commands = [ENGINES[name].command for name in engines]
    return [
        command.replace("DRAFT", draft).replace("TARGET", target) for command in commands if command
    ]


def speculators_keys(
    tree: dict[str, Any], target: str, architectures: list[str], tokens: int = 3
) -> dict[str, Any]:
    """The keys that speculators and `vllm serve DRAFT` read, besides those of an export.

    `vllm serve` takes the target by `verifier.name_or_path`; the draft it reads by the export's own
    keys, speculators by these.

    Args:
        tree: an export's `config.json`.
        target: the target's folder or hub id, as it is served.
        architectures: of the target.
        tokens: drafted in a round, unless the engine is given another number.
    """
    own = {"draft_vocab_size", "architectures", "eagle_config", "rope_theta", "rope_scaling"}
    layer = {key: value for key, value in tree.items() if key not in own}
    layer = {key: value for key, value in layer.items() if not key.startswith(("eagle", "target"))}
    layer = {key: value for key, value in layer.items() if key not in _SWITCHES}
    layer["architectures"] = [f"{_CLASSES[tree['model_type']]}ForCausalLM"]
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": architectures},
        },
        "transformer_layer_config": layer,
        # Switches, said outright: vLLM takes the first as on where it is missing.
        **{name: bool(tree.get(name)) for name in _SWITCHES},
        "embed_requires_grad": bool(tree.get("train_embedding")),
    }
