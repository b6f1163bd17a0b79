"""A tiny target with features and a vocabulary map, written by the command line."""

from pathlib import Path

from eagle3fn.cli import main
from tests.factories import tiny_model, tiny_tokenizer, write_talks

SIZE = 256
"""The draft vocabulary's, of the target's 300: of most rows it has the target's choice."""


def write_run(run: Path) -> Path:
    """Write `target/`, `features/` (10 samples) and `vocab.safetensors` into the folder."""
    run.mkdir(parents=True, exist_ok=True)
    model = tiny_model(eos_token_id=1, num_hidden_layers=7)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(run / "target")
    tiny_tokenizer().save_pretrained(run / "target")

    talks = write_talks(run / "talks.jsonl", 10)
    target = ["--target", str(run / "target")]
    features = ["--out", str(run / "features"), "--max-length", "128"]
    assert main(["extract", *target, "--conversations", str(talks), *features]) == 0
    vocab = ["--features", str(run / "features"), "--out", str(run / "vocab.safetensors")]
    assert main(["vocab", *target, *vocab, "--size", str(SIZE)]) == 0
    return run
