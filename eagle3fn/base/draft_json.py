"""A draft's `config.json`, read: its shape and switches, and none that is not built."""

from pathlib import Path

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.draft_keys import draft_config_from_keys
from eagle3fn.base.errors import UserError, shown
from eagle3fn.base.read import CONFIG_LIMIT, read_object
from eagle3fn.base.switches import read_switches


def draft_config_from_json(path: str | Path, origin: str | None = "") -> DraftConfig:
    """Read an EAGLE-3 draft's `config.json`, as training frameworks and exported drafts have it.

    Keys that are neither a field's nor a switch are not read: engines' configurations have many.

    Args:
        path: the file.
        origin: whose layout it has, as `read_switches` takes it. None: the draft is computed by an
            engine, and may have what is not built here.

    Raises:
        UserError: unreadable, not an EAGLE-3 draft, a value is missing or impossible, or a switch
            that is not built is on.
    """
    tree = read_object(path, CONFIG_LIMIT)
    names = tree.get("architectures")
    if not isinstance(names, list) or not any("Eagle3" in str(name) for name in names):
        raise UserError(
            f"{path}: architectures = {shown(names)}: not an EAGLE-3 draft, which has "
            '["LlamaForCausalLMEagle3"]; name a draft, such as RUN/draft, not its target'
        )
    if origin is not None:
        tree = read_switches(tree, str(path), origin)
    return draft_config_from_keys(tree, str(path))
