"""What an engine cannot represent of a draft, as a sentence; read in its source or measured."""

from collections.abc import Callable
from dataclasses import replace

from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.errors import UserError


def unrepresentable(engine: str, config: DraftConfig, target_layers: int) -> str | None:
    """Why an engine would compute something else than this draft; None if it would not.

    Args:
        engine: "vllm", "llamacpp", "speculators" or "eagle".
        config: the draft's.
        target_layers: the target's number of decoder layers.
    """
    check = _LIMITS.get(engine)
    return check(config, target_layers) if check else None


def _eagle(config: DraftConfig, target_layers: int) -> str | None:
    if config.rope_type != "default":
        return (
            f"EAGLE reads no RoPE variant {config.rope_type}: it has linear and dynamic alone, "
            "with a base of 10000 whatever rope_theta is"
        )
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        return (
            f"EAGLE's heads have hidden_size / num_attention_heads = "
            f"{config.hidden_size // config.num_attention_heads} features, not {config.head_dim}"
        )
    try:
        default = aux_layers(replace(config, aux_layers=None), target_layers)
    except UserError:
        default = None
    named = aux_layers(config, target_layers)
    if named != default:
        return f"EAGLE taps the layers {default} whatever config.json says, not {named}"
    return None


_LIMITS: dict[str, Callable[[DraftConfig, int], str | None]] = {"eagle": _eagle}
