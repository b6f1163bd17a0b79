"""Checks of a draft, and of its variants, in several engines: results, table, verdict."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.engines.environments import Place
from eagle3fn.engines.process import scratch
from eagle3fn.use.engine_check import check_engine
from eagle3fn.use.engine_limits import unrepresentable
from eagle3fn.use.engine_pair import CheckSettings, Pair, load_pair, run_ours
from eagle3fn.use.engine_variants import variants, write_variant
from eagle3fn.use.export import load_draft

Results = dict[str, dict[str, Any]]
"""By draft and engine; the draft that was given has the name `GIVEN`."""

GIVEN = "as trained"
Say = Callable[[str], None]


def check_drafts(
    target: str | Path,
    draft: str | Path,
    prompts: Sequence[str],
    places: Mapping[str, Place],
    settings: CheckSettings,
    work: str | Path,
    *,
    names: Sequence[str] | None = None,
    say: Say = lambda line: None,
) -> Results:
    """Check a draft in engines.

    Args:
        target: folder of the target.
        draft: exported folder.
        prompts: user turns.
        places: where each engine is; all of these are asked.
        settings: how much is compared.
        work: folder for logs, which stay.
        names: of drafts of `use.engine_variants` that are checked too; empty: all of them.
        say: gets a line when something begins or ends.

    Returns:
        Of each draft and engine what `check_engine` returns, or `refused`: a sentence on what the
        engine cannot represent.

    Raises:
        UserError: unreadable, a draft of another target, prompts that are too long, or no variant
            of a name.
    """
    pair = load_pair(target, prompts, settings)
    Path(work).mkdir(parents=True, exist_ok=True)
    results: Results = {}
    with scratch("engines") as made:
        for name, folder in _folders(pair, Path(draft), made, names):
            say(f"{name}: this package")
            results[name] = _check_one(pair, folder, places, settings, Path(work), say)
    return results


def _folders(
    pair: Pair, draft: Path, made: Path, names: Sequence[str] | None
) -> Iterator[tuple[str, Path]]:
    """Name and exported folder of each draft; a variant's folder lasts until the next."""
    yield GIVEN, draft
    if names is None:
        return
    layers = pair.model.config.get_text_config().num_hidden_layers
    head = pair.model.get_output_embeddings().weight
    given = load_draft(draft, pair.model.dtype)
    others = {each.name: each for each in variants(given, layers, head) if each.name != GIVEN}
    for name in names:
        if name not in others:
            raise UserError(f"--variants {name!r}: must be one of {', '.join(others)}")
    for name in names or others:
        folder = made / "draft"
        write_variant(others[name], folder, layers)
        yield name, folder


def _check_one(
    pair: Pair,
    folder: Path,
    places: Mapping[str, Place],
    settings: CheckSettings,
    work: Path,
    say: Say,
) -> dict[str, Any]:
    ours = run_ours(pair, folder, settings)
    layers = pair.model.config.get_text_config().num_hidden_layers
    found: dict[str, Any] = {}
    for engine, place in places.items():
        refused = unrepresentable(engine, ours.draft.config, layers)
        if refused:
            found[engine] = {"refused": refused}
        else:
            found[engine] = check_engine(engine, place, pair, ours, settings, work)
        say(f"  {engine}: {words(found[engine])}")
    return found


# What came out


def verdict(results: Results) -> int:
    """0: every engine agrees; 1: one does not; 2: one cannot represent the draft that was given.

    That an engine cannot represent a variant is a result, and no failure.
    """
    checked = [one for found in results.values() for one in found.values()]
    if not all(one["agrees"] for one in checked if "refused" not in one):
        return 1
    refused = any("refused" in one for one in results[GIVEN].values())
    return 2 if refused else 0


def table(results: Results) -> str:
    """One line an engine, for a terminal."""
    lines = []
    for name, found in results.items():
        lines.append(name)
        for engine, one in found.items():
            version = one.get("version") or "-"
            lines.append(f"  {engine:<12} {version[:13]:<14} {words(one)}")
    return "\n".join(lines)


def words(result: Mapping[str, Any]) -> str:
    """An engine's result in one line."""
    if "refused" in result:
        return f"refused: {result['refused']}"
    if "error" in result:
        return f"failed: {result['error']}"
    parts = ["agrees" if result["agrees"] else "DISAGREES"]
    if result["max_logit_diff"] is not None:
        parts.append(f"logits within {result['max_logit_diff']:.1e}")
    if result["max_feature_diff"] is not None:
        parts.append(f"features within {result['max_feature_diff']:.1e} of the largest")
    if result["tokens_equal"] is not None:
        ours = result["ours"]
        parts.append(
            f"{result['tokens_equal']} of {result['prompts']} answers equal, with equal counts "
            f"{result['counts_equal']}: {result['rounds']} rounds (ours {ours['rounds']}), "
            f"{result['drafted']} drafted ({ours['drafted']}), "
            f"{result['accepted']} accepted ({ours['accepted']})"
        )
        for one in result["differing"]:
            parts.append(f"prompt {one['prompt']} parts at token {one['token']} by the {one['by']}")
    return ", ".join(parts)


def parse_places(given: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` of each `--python`, by name.

    Raises:
        UserError: another form, or an unknown engine.
    """
    found = {}
    for text in given:
        name, mark, path = text.partition("=")
        if not mark or not path or name not in known:
            raise UserError(f"--python {text}: must be NAME=PATH with one of {', '.join(known)}")
        found[name] = path
    return found
