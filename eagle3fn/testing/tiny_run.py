"""A folder as `eagle3fn extract` and `eagle3fn vocab` leave it, of a tiny target, in seconds."""

from pathlib import Path

import torch

from eagle3fn.base.device import fast_dtype
from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features
from eagle3fn.data.kept_tokens import kept_tokens
from eagle3fn.data.pipeline import split
from eagle3fn.data.sources import CPU_BATCH_TOKENS, model_source
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.target_files import target_stamps
from eagle3fn.data.target_source import config_hash, target_config
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.vocab import build_map, count_tokens, held_out_of, save_map
from eagle3fn.testing.tiny_target import save_target, tiny_model, tiny_tokenizer, write_talks

SIZE = 256
"""The draft vocabulary's, of the target's 300: of most rows it has the target's choice."""

_MAX_LENGTH = 128


def write_tiny_run(folder: str | Path, conversations: int = 10, spread: float = 0.02) -> Path:
    """Write `target/`, `talks.jsonl`, `features/` and `vocab.safetensors` into a folder.

    The target is a random Llama of seven layers, 16 wide, with a vocabulary of 300; its tokens are
    single bytes. Each conversation is one sample of 28 to 51 tokens.

    Args:
        folder: made where it is not there.
        conversations: how many; they differ in their lengths alone, and the same ones come again
            from the thirteenth on.
        spread: the standard deviation of the target's random weights. By the default its
            distributions are nearly uniform; by 0.3 some tokens are far likelier than others.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds features of another call.
    """
    run = Path(folder)
    run.mkdir(parents=True, exist_ok=True)
    target = run / "target"
    talks = write_talks(run / "talks.jsonl", conversations)

    # The target and its tokenizer.
    model = tiny_model(eos_token_id=1, num_hidden_layers=7, initializer_range=spread)
    model.generation_config.eos_token_id = 1
    save_target(model, tiny_tokenizer(), target)

    # Its features, as `eagle3fn extract` writes them.
    tree = target_config(target)
    draft = draft_config_from_target(tree, str(target), SIZE)
    stamps = target_stamps(str(target))
    model, tokenizer = load_target(target, fast_dtype("cpu"))
    source = model_source(
        model,
        aux_layers(draft, tree["num_hidden_layers"]),
        batch_tokens=CPU_BATCH_TOKENS,
        name=str(target),
        stamps=stamps,
    )
    template = ChatTemplate(tokenizer, stop_ids(str(target), tokenizer), {})
    features = run / "features"
    extract(source, template, talks, features, max_length=_MAX_LENGTH, stored=torch.bfloat16)

    # The draft vocabulary, of the samples that are not held out.
    opened = open_features(features)
    samples = len(opened.samples)
    kept, _ = split(samples, held_out_of(samples))
    counts = count_tokens(opened, kept)
    vocab_map = build_map(counts, SIZE, kept_tokens(target, len(counts)).ids)
    made_of = {"target": str(target), "target_hash": config_hash(target)}
    save_map(run / "vocab.safetensors", vocab_map, made_of)
    return run
