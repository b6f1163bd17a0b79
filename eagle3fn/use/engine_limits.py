"""What each engine reads of a draft, and what it cannot represent: one row an engine."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from eagle3fn.base.draft_config import DEFAULT_TAPS, DraftConfig, aux_layers, switches
from eagle3fn.base.errors import UserError
from eagle3fn.base.rope_settings import ROPE_TYPES, scaling_as_trained

_EVERY_ROPE = tuple(kind for kind in ROPE_TYPES if kind != "mrope")  # which is written as default
_PLAIN_BASE = 10_000.0
_WITHOUT = "without what it lacks"
_ANY_ENGINE = {"train_embedding"}
_OTHER_TAPS = "with other taps"


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
    other_width: bool = True  # a draft of another width than the target
    any_head_dim: bool = True  # else it is hidden_size / num_attention_heads
    any_taps: bool = True  # else the default ones alone
    any_count: bool = True  # of taps; else three
    last_layer: bool = True  # captures the output of the target's last layer
    # the draft's switches that it reads; `train_embedding`, a matter of training, is any engine's
    switches: frozenset[str] = frozenset()
    # of the layers after the first, the norm before attention where it has another name
    later_norm: str = ""
    command: str = ""  # how it is started, with DRAFT and TARGET


_TAP_NORMS = frozenset({"norm_before_fc", "fc_norm"})
_NORMS = _TAP_NORMS | {"norm_output", "norm_before_residual"}
_LAYER = frozenset({"attention_bias", "qk_norm", "num_hidden_layers", "draft_window"})

VLLM = Engine(
    "vllm",
    "vLLM 0.32.0, run",
    by_number=True,
    switches=_NORMS | _LAYER,
    command=(
        "vllm serve TARGET --speculative-config "
        '\'{"model": "DRAFT", "method": "eagle3", "num_speculative_tokens": 3}\''
    ),
)
SGLANG = Engine(
    "sglang",
    "SGLang 0.5.23, read",
    last_layer=False,
    switches=_TAP_NORMS | {"norm_output", "num_hidden_layers"},
    later_norm="hidden_norm",
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
    any_count=False,
    switches=frozenset({"norm_before_fc", "norm_before_residual"}),
    command=(
        "python convert_hf_to_gguf.py DRAFT --target-model-dir TARGET --outfile draft.gguf && "
        "llama-server -m target.gguf -md draft.gguf --spec-type draft-eagle3"
    ),
)
SPECULATORS = Engine(
    "speculators",
    "speculators 0.9.0, run",
    by_number=True,
    other_width=False,
    switches=_NORMS | _LAYER,
)
EAGLE = Engine(
    "eagle",
    "SafeAILab/EAGLE with transformers 4.53, read and run",
    ropes=("default", "linear", "dynamic"),
    scaled_base=False,
    any_head_dim=False,
    any_taps=False,
    any_count=False,
)
ENGINES = {row.name: row for row in (VLLM, SGLANG, LLAMACPP, SPECULATORS, EAGLE)}
"""The engines by their names."""


def lacking(config: DraftConfig, target_layers: int) -> dict[str, list[str]]:
    """By engine what it cannot represent of a draft; an empty list where it can represent it.

    Args:
        config: the draft's.
        target_layers: the target's number of decoder layers.
    """
    return {
        name: [fault for fault, _ in faults(config, target_layers, engine)]
        for name, engine in ENGINES.items()
    }


def unrepresentable(engine: str, config: DraftConfig, target_layers: int) -> str | None:
    """All because of which an engine would compute something else than this draft; None if it
    would not.

    Args:
        engine: a name of `ENGINES`.
        config: the draft's.
        target_layers: the target's number of decoder layers.
    """
    found = lacking(config, target_layers)[engine]
    return f"{engine}: {'; '.join(found)} ({ENGINES[engine].read})" if found else None


def check_representable(config: DraftConfig, target_layers: int, engine: Engine) -> None:
    """Refuse a draft that an engine cannot represent.

    Args:
        config: the draft's shape.
        target_layers: the target's number of decoder layers.
        engine: a row of `ENGINES`.

    Raises:
        UserError: names all that it cannot represent, and the engines that can.
    """
    found = lacking(config, target_layers)
    if not found[engine.name]:
        return
    others = able(found)
    can = f"; {', '.join(others)} can" if others else ""
    remedies = dict.fromkeys(remedy for _, remedy in faults(config, target_layers, engine))
    raise UserError(
        f"--for {engine.name}: {'; '.join(found[engine.name])} ({engine.read}){can}; train a draft "
        f"{' and '.join(remedies)}"
    )


def able(found: dict[str, list[str]]) -> list[str]:
    """The engines that can represent a draft, of what `lacking` returns."""
    return [name for name, missing in found.items() if not missing]


def unable_line(found: dict[str, list[str]]) -> str:
    """Which engines cannot represent a draft and why, in a line; "" where all can."""
    parts = [f"{name} ({'; '.join(missing)})" for name, missing in found.items() if missing]
    return f"cannot represent it: {', '.join(parts)}" if parts else ""


def engines_line(config: DraftConfig, target_layers: int) -> str:
    """Which engines can represent a draft, and what the others lack, in a line."""
    found = lacking(config, target_layers)
    parts = [f"{', '.join(able(found)) or 'none'} can represent this draft", unable_line(found)]
    return "engines: " + "; ".join(part for part in parts if part)


def faults(config: DraftConfig, target_layers: int, engine: Engine) -> Iterator[tuple[str, str]]:
    """What an engine cannot represent of a draft, each with a remedy."""
    for fault in (*_rope_faults(config, engine), *_size_faults(config, engine)):
        yield fault, _WITHOUT
    for fault in _tap_faults(aux_layers(config, target_layers), target_layers, engine):
        yield fault, _OTHER_TAPS
    for fault in _switch_faults(config, engine):
        yield fault, _WITHOUT


def _size_faults(config: DraftConfig, engine: Engine) -> Iterator[str]:
    if config.other_width and not engine.other_width:
        sizes = f"{config.hidden_size} of a target of {config.target_hidden_size}"
        yield f"it has no draft of another width than its target's ({sizes})"
    ratio = config.hidden_size / config.num_attention_heads
    if config.head_dim != ratio and not engine.any_head_dim:
        text = f"its head size is hidden_size / num_attention_heads = {ratio:g}, not"
        yield f"{text} {config.head_dim}"


def _tap_faults(taps: tuple[int, ...], target_layers: int, engine: Engine) -> Iterator[str]:
    default = (1, target_layers // 2 - 1, target_layers - 4)
    if len(taps) != DEFAULT_TAPS and not engine.any_count:
        yield f"it has three taps, this draft has {len(taps)}"
    elif taps != default and not engine.any_taps:
        yield f"it taps layers {default} alone, this draft has {taps}"
    if taps[-1] == target_layers - 1 and not engine.last_layer:
        yield f"it does not capture the output of the target's last layer, {taps[-1]}"


def _switch_faults(config: DraftConfig, engine: Engine) -> Iterator[str]:
    for field in switches():
        value = getattr(config, field.name)
        if value != field.default and field.name not in engine.switches | _ANY_ENGINE:
            yield f"it has no {field.name}, which is {value} in this draft"
    if engine is SPECULATORS and config.norm_before_fc and config.fc_norm:
        yield "it has norm_before_fc or fc_norm, not both"
    if engine is VLLM and config.qk_norm and config.attention_bias:
        yield "its layer with qk_norm has no bias after attention, which attention_bias has"


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
