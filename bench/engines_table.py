"""The tables of drafts in serving engines, from what scripts/check_engines.py wrote."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "speculators": "speculators",
    "eagle": "EAGLE",
}
COMMIT = 40  # characters of a version that is one


def table(result: Mapping[str, Any]) -> str:
    """One row a draft, one column an engine; below it what was refused, and tokens that differ."""
    drafts: dict[str, dict[str, Any]] = result["drafts"]
    engines = [name for name in NAMES if any(name in found for found in drafts.values())]
    settings = result["settings"]
    lines = [
        f"{settings['tasks']} prompts, at most {settings['max_new']} tokens each, "
        f"{settings['draft_length']} drafted a round, fp32, {result['date'][:10]}; "
        f"logits after {settings['logit_tasks']} prompts:",
        "",
        _row(["draft", *(f"{NAMES[name]} {_version(drafts, name)}".strip() for name in engines)]),
        "|---" * (len(engines) + 1) + "|",
    ]
    notes = []
    for draft, found in drafts.items():
        lines.append(_row([draft, *(cell(found.get(name)) for name in engines)]))
        for name in engines:
            for note in remarks(found.get(name)):
                notes.append(f"- {draft}, {NAMES[name]}: {note.removeprefix(name + ': ')}")
    if notes:
        lines += ["", *dict.fromkeys(notes)]
    return "\n".join(lines) + "\n"


def cell(result: Mapping[str, Any] | None) -> str:
    """What an engine did with a draft."""
    if result is None:
        return "-"
    if "refused" in result:
        return "not representable"
    if "error" in result:
        return "failed"
    parts = [] if result["agrees"] else ["**disagrees**"]
    if result["max_logit_diff"] is not None:
        parts.append(f"logits {result['max_logit_diff']:.1e}")
    if result["tokens_equal"] is not None:
        parts.append(
            f"{result['counts_equal']} of {result['prompts']} prompts: {result['rounds']} rounds, "
            f"{result['accepted']} accepted"
        )
    return "; ".join(parts)


def remarks(result: Mapping[str, Any] | None) -> list[str]:
    """Sentences below the table."""
    if result is None:
        return []
    if "refused" in result:
        return [f"{result['refused']}."]
    found = []
    for one in result.get("differing", []):
        found.append(
            f"prompt {one['prompt']} parts from ours at token {one['token']} "
            f"({one['engine']}, ours {one['ours']}), by the {one['by']}."
        )
    return found


def _version(drafts: Mapping[str, Mapping[str, Any]], engine: str) -> str:
    for found in drafts.values():
        version = found.get(engine, {}).get("version")
        if version:
            return version[:8] if len(version) == COMMIT else version
    return ""


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
