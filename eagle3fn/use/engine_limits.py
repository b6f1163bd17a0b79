"""What each engine reads of a draft, and what it cannot represent: one row an engine."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from eagle3fn.base.draft_config import DraftConfig, aux_layers, switches
from eagle3fn.base.errors import UserError
from eagle3fn.base.rope_settings import ROPE_TYPES, scaling_as_trained

_EVERY_ROPE = tuple(kind for kind in ROPE_TYPES if kind != "mrope")  # which is written as default
_PLAIN_BASE = 10_000.0
_WITHOUT = "train a draft without it"
_OTHER_TAPS = "train a draft with other taps"


class Engine(NamedTuple):
    """One engine, as its source was read.

    The rows are what `check_representable` refuses by and what docs/drafts.md prints.
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


def unrepresentable(engine: str, config: DraftConfig, target_layers: int) -> str | None:
    """Why an engine would compute something else than this draft; None if it would not.

    Args:
        engine: a name of `ENGINES`.
        config: the draft's.
        target_layers: the target's number of decoder layers.
    """
    for fault, _ in faults(config, target_layers, ENGINES[engine]):
        return f"{engine}: {fault} ({ENGINES[engine].read})"
    return None


def check_representable(config: DraftConfig, target_layers: int, engine: Engine) -> None:
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


def faults(config: DraftConfig, target_layers: int, engine: Engine) -> Iterator[tuple[str, str]]:
    """What an engine cannot represent of a draft, each with a remedy."""
    for fault in _rope_faults(config, engine):
        yield fault, _WITHOUT

    # Sizes.
    if config.own_embedding and not engine.own_embedding:
        sizes = f"{config.hidden_size} of a target of {config.target_hidden_size}"
        yield f"it has no draft of another width than its target's ({sizes})", _WITHOUT
    ratio = config.hidden_size / config.num_attention_heads
    if config.head_dim != ratio and not engine.any_head_dim:
        text = f"its head size is hidden_size / num_attention_heads = {ratio:g}, not"
        yield f"{text} {config.head_dim}", _WITHOUT

    # Taps.
    taps = aux_layers(config, target_layers)
    default = (1, target_layers // 2 - 1, target_layers - 4)
    if taps != default and not engine.any_taps:
        yield f"it taps layers {default} alone, this draft has {taps}", _OTHER_TAPS
    if taps[-1] == target_layers - 1 and not engine.last_layer:
        text = f"it does not capture the output of the target's last layer, {taps[-1]}"
        yield text, _OTHER_TAPS

    # Switches of the draft that were added to its configuration.
    for field in switches():
        if getattr(config, field.name) != field.default:
            yield f"whether it reads {field.name} was not looked at", _WITHOUT


def _rope_faults(config: DraftConfig, engine: Engine) -> Iterator[str]:
    scaling = scaling_as_trained(config.rope_scaling, config.max_position_embeddings)
    kind = config.rope_type if scaling else "default"
    if kind not in engine.ropes:
        yield f"it has no RoPE of type {kind}, only {', '.join(engine.ropes)}"
    if scaling and not engine.scaled_base and config.rope_theta != _PLAIN_BASE:
        yield f"where RoPE is scaled it rotates by base {_PLAIN_BASE:g}, not {config.rope_theta:g}"
    if kind == "yarn" and not engine.yarn_keys:
        for key in _yarn_keys(scaling or {}):
            yield f"it does not read YaRN's {key}"


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
