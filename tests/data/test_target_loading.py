"""transformers given a target's files: no waiting for a pipe, no control codes in its log."""

import logging
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.data.target_loading import load_weights
from tests.factories import tiny_model


def write(folder: Path) -> list[Path]:
    """A target in several files; these."""
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return files


@pytest.mark.parametrize("kind", ["pipe", "dangling link"])
def test_weights_that_are_no_file_are_refused_without_waiting(tmp_path, kind):
    file = write(tmp_path)[1]
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{file.name}: (is a pipe|no such file)"):
        load_weights(tmp_path, "eager", "float32")


def test_names_of_tensors_draw_nothing_on_the_terminal(tmp_path):
    from transformers.utils import logging as library

    file = write(tmp_path)[0]
    tensors = load_file(file)
    tensors["a\x1b[2J"] = tensors.pop(min(tensors))
    save_file(tensors, file, {"format": "pt"})

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    library.get_logger("transformers").addHandler(handler)
    try:
        load_weights(tmp_path, "eager", "float32")
    finally:
        library.get_logger("transformers").removeHandler(handler)
    text = "".join(said)
    assert "a\\x1b[2J" in text and "\x1b" not in text
    assert not handler.filters
