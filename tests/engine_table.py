"""The tables of docs/drafts.md, made from engines' limits and switches: run it to renew them."""

import re
from pathlib import Path

from eagle3fn.base.draft_config import switches
from eagle3fn.base.switches import SWITCHES
from eagle3fn.use.engine_limits import ENGINES, Engine

READ = [field.name for field in switches() if field.name != "train_embedding"]
"""The switches that change what an engine computes."""

PAGE = Path(__file__).resolve().parent.parent / "docs/drafts.md"


def engines_table() -> str:
    """A row for each engine: what it was read from, its layout, and what it cannot represent."""
    lines = ["| `--for` | looked at | layer's weights | cannot represent |", "|---|---|---|---|"]
    for engine in ENGINES.values():
        missing = []
        if not engine.any_taps:
            missing.append("other taps than the default ones")
        elif not engine.any_count:
            missing.append("other than three taps")
        if not engine.last_layer:
            missing.append("a tap of the target's last layer")
        ropes = [kind for kind in ENGINES["vllm"].ropes if kind not in engine.ropes]
        if ropes:
            missing.append(f"RoPE of type {' or '.join(ropes)}")
        if not engine.scaled_base:
            missing.append("a scaled RoPE with another base than 10,000")
        if not engine.yarn_keys:
            missing.append("YaRN's `attention_factor`, both `mscale`s, `truncate`")
        if not engine.any_head_dim:
            missing.append("a head size other than hidden size / heads")
        if not engine.other_width:
            missing.append("a draft of another width than the target")
        missing += unread(engine)
        names = "`layers.0.`" if engine.by_number else "`midlayer.`"
        said = "; ".join(missing) or "nothing known"
        lines.append(f"| `{engine.name}` | {engine.read} | {names} | {said} |")
    return "\n".join(lines)


def unread(engine: Engine) -> list[str]:
    """What to say of the switches that an engine does not read."""
    names = [name for name in READ if name not in engine.switches]
    if names == READ:
        return ["any switch"]
    return [", ".join(f"`{name}`" for name in names)] if names else []


def switches_table() -> str:
    """A row for each switch that is refused: the values that are read, what others mean."""
    lines = ["| key | read | else |", "|---|---|---|"]
    for switch in SWITCHES:
        values = ", ".join(f"`{value!r}`".lower() for value in switch.off) or "absent"
        lines.append(f"| `{switch.name}` | {values} | {switch.meaning} |")
    return "\n".join(lines)


TABLES = {"engines": engines_table, "switches": switches_table}


def written(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n\n)(.*?)(\n*<!-- end -->)", re.S)
        assert block.search(text), name
        text = block.sub(lambda found, table=table: found[1] + table() + "\n\n<!-- end -->", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
