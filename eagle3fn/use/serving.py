"""What each serving engine reads of a draft, and what it cannot represent: one row an engine."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from eagle3fn.base.draft_config import DraftConfig, aux_layers, switches
from eagle3fn.base.errors import UserError
from eagle3fn.base.rope_settings import ROPE_TYPES, scaling_as_trained

_EVERY_ROPE = tuple(kind for kind in ROPE_TYPES if kind != "mrope")  # which is written as default
_PLAIN_BASE = 10_000.0


class Engine(NamedTuple):
    """One engine, as its source was read.

    The rows are what `check_engine` refuses by and what docs/drafts.md prints.
    """

    name: str  # as `eagle3fn export --for` has it
    read: str  # the version that was read or run
    by_number: bool = False  # reads the layer's weights as `layers.0.`, and a `speculators_config`
    ropes: tuple[str, ...] = _EVERY_ROPE
    scaled_base: bool = True  # has `rope_theta` where RoPE is scaled, else 10,000 there
    yarn_keys: bool = True  # has YaRN's attention_factor, mscale and truncate
    own_embedding: bool = True  # a draft of another width than the target
    any_head_dim: bool = True  # else it is hidden_size / num_attention_heads
    any_taps: bool = True  # else the default ones alone
    last_layer: bool = True  # captures the output of the target's last layer
    command: str = ""  # how it is started, with DRAFT and TARGET


VLLM = Engine(
    "vllm",
    "vLLM 0.32.0, run",
    by_number=True,
    command=(
        "vllm serve TARGET --speculative-config "
        '\'{"model": "DRAFT", "method": "eagle3", "num_speculative_tokens": 3}\''
    ),
)
SGLANG = Engine(
    "sglang",
    "SGLang 0.5.23, read",
    last_layer=False,
    command=(
        "python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path DRAFT --speculative-num-steps 3 "
        "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
    ),
)
LLAMACPP = Engine(
    "llamacpp",
    "llama.cpp, its converter of llama-cpp-python 0.3.36, run",
    yarn_keys=False,
    command=(
        "python convert_hf_to_gguf.py DRAFT --target-model-dir TARGET --outfile draft.gguf && "
        "llama-server -m target.gguf -md draft.gguf --spec-type draft-eagle3"
    ),
)
SPECULATORS = Engine("speculators", "speculators 0.9.0, run", by_number=True, own_embedding=False)
EAGLE = Engine(
    "eagle",
    "SafeAILab/EAGLE with transformers 4.53, read and run",
    ropes=("default", "linear", "dynamic"),
    scaled_base=False,
    any_head_dim=False,
    any_taps=False,
)
ENGINES = {row.name: row for row in (VLLM, SGLANG, LLAMACPP, SPECULATORS, EAGLE)}
"""The engines by their names."""


def check_engine(config: DraftConfig, target_layers: int, engine: Engine) -> None:
    """Refuse a draft that an engine cannot represent.

    Args:
        config: the draft's shape.
        target_layers: the target's number of decoder layers.
        engine: a row of `ENGINES`.

    Raises:
        UserError: names what it cannot represent, and the engines that can.
    """
    for fault, remedy in faults(config, target_layers, engine):
        others = [
            other.name
            for other in ENGINES.values()
            if not list(faults(config, target_layers, other))
        ]
        can = f"; {', '.join(others)} can" if others else ""
        raise UserError(f"--for {engine.name}: {fault} ({engine.read}){can}; {remedy}")


def faults(
    config: DraftConfig, target_layers: int, engine: Engine
) -> Iterable[tuple[str, str]]:
    """What an engine cannot represent of a draft, each with a remedy."""
    retrain = "train a draft without it"

    # RoPE.
    scaling = scaling_as_trained(config.rope_scaling, config.max_position_embeddings)
    kind = config.rope_type if scaling else "default"
    if kind not in engine.ropes:
        yield f"it has no RoPE of type {kind}, only {', '.join(engine.ropes)}", retrain
    if scaling and not engine.scaled_base and config.rope_theta != _PLAIN_BASE:
        text = f"where RoPE is scaled it rotates by base {_PLAIN_BASE:g}, not {config.rope_theta:g}"
        yield text, retrain
    if kind == "yarn" and not engine.yarn_keys:
        for key in _yarn_keys(scaling or {}):
            yield f"it does not read YaRN's {key}", retrain

    # Sizes and taps.
    if config.own_embedding and not engine.own_embedding:
        sizes = f"{config.hidden_size} of a target of {config.target_hidden_size}"
        yield f"it has no draft of another width than its target's ({sizes})", retrain
    ratio = config.hidden_size / config.num_attention_heads
    if config.head_dim != ratio and not engine.any_head_dim:
        text = f"its head size is hidden_size / num_attention_heads = {ratio:g}, not"
        yield f"{text} {config.head_dim}", retrain
    taps = aux_layers(config, target_layers)
    default = (1, target_layers // 2 - 1, target_layers - 4)
    if taps != default and not engine.any_taps:
        yield f"it taps layers {default} alone, this draft has {taps}", retrain
    if taps[-1] == target_layers - 1 and not engine.last_layer:
        text = f"it does not capture the output of the target's last layer, {taps[-1]}"
        yield text, "train a draft with other taps"

    # Switches of the draft that were added to its configuration.
    for field in switches():
        if getattr(config, field.name) != field.default:
            yield f"whether it reads {field.name} was not looked at", retrain


def _yarn_keys(scaling: dict[str, Any]) -> list[str]:
    """Which of YaRN's further settings change the tables."""
    found = []
    if scaling.get("attention_factor") is not None:
        found.append("attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        found.append("mscale")
    if not scaling.get("truncate", True):
        found.append("truncate")
    return found


def how_to_serve(draft: str, target: str) -> list[str]:
    """A command for each engine that has one, with these names."""
    return [
        engine.command.replace("DRAFT", draft).replace("TARGET", target)
        for engine in ENGINES.values()
        if engine.command
    ]


# Layouts


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
        tokens: drafted in a round, unless the engine is told another number.
    """
    own = {"draft_vocab_size", "architectures", "eagle_config", "rope_theta", "rope_scaling"}
    layer = {key: value for key, value in tree.items() if key not in own}
    layer = {key: value for key, value in layer.items() if not key.startswith(("eagle", "target"))}
    layer["architectures"] = ["LlamaForCausalLM"]
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
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
    }
