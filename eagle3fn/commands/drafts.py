"""Commands that bring drafts, maps and features to engines and other trainers, and back."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.base.output import Result

if TYPE_CHECKING:
    from eagle3fn.base.draft_config import DraftConfig


def export(options: Any) -> Result:
    """Write a draft as an engine reads it."""
    from eagle3fn.base.errors import UserError
    from eagle3fn.train.drafts import load_draft, stored_dtype
    from eagle3fn.use.engine_limits import ENGINES
    from eagle3fn.use.export import check_out_draft, export_for
    from eagle3fn.use.model_card import read_facts

    engine = ENGINES[options.engine]
    check_out_draft(options.out)
    name = options.target_name or options.target
    if engine.by_number and not name:
        raise UserError(
            f"--for {engine.name}: its layout names the target; add --target FOLDER_OR_ID"
        )
    if not options.target and not (engine.any_taps and engine.last_layer):
        raise UserError(
            f"--for {engine.name}: which layers it taps depends on the target's depth; add "
            "--target FOLDER_OR_ID"
        )
    dtype = stored_dtype(options.draft)
    draft = load_draft(options.draft, dtype)
    layers, tree = _target_layers(draft.config, options.target)
    local = bool(name) and Path(name).is_dir()
    if local:
        # vLLM takes a relative path by the folder that it is started in, or as a hub id.
        name = os.path.abspath(name)

    facts = read_facts(options.draft)
    export_for(
        draft,
        engine,
        options.out,
        layers,
        dtype,
        name or "",
        tuple(tree.get("architectures") or ()),
        facts._replace(target=name or facts.target),
    )
    if local and engine.by_number:
        print(
            f"{options.out}/config.json names the target by its path here, {name}; to serve or "
            "publish it elsewhere, give its name there with --target-name"
        )
    print(f"{options.out}: for {engine.read}")
    return Result({"out": options.out, "for": options.engine, "target": name})


def _target_layers(draft: "DraftConfig", target: str | None) -> tuple[int, dict[str, Any]]:
    """The target's number of layers and its configuration; without it, the depth whose default taps
    end where the draft's do.
    """
    from eagle3fn.base.errors import UserError
    from eagle3fn.data.target_source import target_config

    if target is None:
        if draft.aux_layers is None:
            raise UserError(
                "--target: the draft's config.json lists no taps, so the default ones of its "
                "target are needed; name the target"
            )
        return max(draft.aux_layers) + 4, {}

    tree = target_config(target)
    pairs = (("vocab_size", draft.vocab_size), ("hidden_size", draft.target_hidden_size))
    for key, size in pairs:
        if tree[key] != size:
            raise UserError(
                f"--target {target}: its {key} is {tree[key]}, the draft's target has {size}; name "
                "the target that the draft was trained for"
            )
    return tree["num_hidden_layers"], tree


def convert(options: Any) -> Result:
    """Bring drafts, maps or features of other trainers to ours, or maps and features to theirs."""
    from eagle3fn.base.errors import UserError

    if options.origin and not options.draft:
        raise UserError(
            "--from: of drafts alone; files of maps and features are known by themselves"
        )
    if options.draft:
        if options.kind != "eagle3fn":
            raise UserError(
                "--for: of maps and features; a draft goes to engines by eagle3fn export"
            )
        return _convert_draft(options)
    if options.vocab:
        return _convert_map(options)
    return _convert_features(options)


def _convert_draft(options: Any) -> Result:
    import torch

    from eagle3fn.base.types import Frozen
    from eagle3fn.train.foreign_drafts import read_foreign
    from eagle3fn.use.export import check_out_draft, export
    from eagle3fn.use.model_card import read_facts

    check_out_draft(options.out)
    found = read_foreign(options.draft, options.origin)
    draft = found.draft
    layers, _ = _target_layers(draft.config, options.target)
    frozen = Frozen(draft.embed_tokens, torch.empty(0), *draft.vocab)
    facts = read_facts(options.draft)
    facts = facts._replace(target=options.target or facts.target)
    export(draft.params, frozen, draft.config, options.out, layers, found.dtype, True, facts)
    for line in found.changes:
        print(line)
    print(f"{options.out}: a draft of {draft.config.draft_vocab_size} tokens, from {found.origin}")
    return Result(
        {
            "out": options.out,
            "from": found.origin,
            "draft_vocab_size": draft.config.draft_vocab_size,
            "changes": list(found.changes),
        }
    )


def _convert_map(options: Any) -> Result:
    from functools import partial

    from eagle3fn.data.target_source import config_hash, config_hashes, target_config
    from eagle3fn.data.vocab import load_map
    from eagle3fn.specforge.feature_files import read_map, write_map
    from eagle3fn.use.convert import check_out_map, read_map_of, write_map_for

    check_out_map(options.out, options.kind, read_map)

    # Checked, and where the target is named, as its map.
    provenance: dict[str, Any] = {"converted_from": Path(options.vocab).name}
    vocab_size = hashes = None
    if options.target:
        vocab_size = target_config(options.target)["vocab_size"]
        hashes = config_hashes(options.target)
        provenance |= {"target": options.target, "target_hash": config_hash(options.target)}
    read = partial(read_map_of, read=read_map)
    vocab_map = load_map(options.vocab, vocab_size, None, hashes, read)
    stored = read(Path(options.vocab)).provenance
    write_map_for(options.out, vocab_map, options.kind, stored | provenance, write_map, read_map)
    sizes = f"{len(vocab_map.d2t)} of {len(vocab_map.t2d)} tokens"
    print(f"{options.out}: {sizes}, for {options.kind}")
    return Result(
        {
            "out": options.out,
            "for": options.kind,
            "draft_vocab_size": len(vocab_map.d2t),
            "vocab_size": len(vocab_map.t2d),
        }
    )


def _convert_features(options: Any) -> Result:
    from eagle3fn.base.errors import UserError
    from eagle3fn.base.places import anything, check_out_folder
    from eagle3fn.data.features import open_features
    from eagle3fn.specforge.feature_files import write_ckpt
    from eagle3fn.use.convert import LAST_BEFORE_NORM, write_files

    if options.kind == "speculators":
        raise UserError(
            f"--for speculators: {LAST_BEFORE_NORM}; let speculators generate its own states"
        )
    check_out_folder(options.out, anything)
    if options.kind == "eagle3fn":
        return _convert_features_to_ours(options)
    features = open_features(options.features)
    count = write_files(features, options.out, write_ckpt, ".ckpt", progress.bar("sample"))
    progress.close()
    print(f"{options.out}: {count} samples as .ckpt files")
    return Result({"out": options.out, "for": options.kind, "samples": count})


def _convert_features_to_ours(options: Any) -> Result:
    import torch

    from eagle3fn.base.errors import UserError
    from eagle3fn.data.features import open_features
    from eagle3fn.data.target_source import config_hash, target_config
    from eagle3fn.data.target_tensors import read_stored_target
    from eagle3fn.specforge.feature_files import READER
    from eagle3fn.use.convert import write_ours
    from eagle3fn.use.speculators_data import has_states, speculators_reader

    if not options.target:
        raise UserError("--target: such files do not say of which target they are; name it")
    tree = target_config(options.target)
    sizes = {key: tree[key] for key in ("vocab_size", "hidden_size")}

    # speculators keeps the last state before the target's final norm.
    reader = READER
    if has_states(options.features):
        stored = read_stored_target(options.target, torch.float32)
        reader = speculators_reader(options.features, lambda last: stored.norm(last.float()))
    features = open_features(options.features, **sizes, reader=reader)
    if not features.reader:
        raise UserError(f"--features {options.features}: are ours already; add --for specforge")

    target = {
        "name": options.target,
        **sizes,
        "num_layers": tree["num_hidden_layers"],
        "config_hash": config_hash(options.target),
    }
    index = write_ours(features, options.out, target, progress.bar("sample"))
    progress.close()
    totals = index["totals"]
    print(
        f"{options.out}: {totals['samples']} samples, {totals['tokens']} tokens, "
        f"{totals['supervised']} supervised"
    )
    return Result({"out": options.out, "for": options.kind, **totals})
