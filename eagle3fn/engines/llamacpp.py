"""GGUF files of a target and its draft for llama.cpp, made by its own converter."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json
from eagle3fn.engines.process import last_words

CONVERTER = "convert_hf_to_gguf.py"
OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@contextmanager
def gguf_files(
    target: str | Path,
    draft: str | Path,
    converter: str | Path | None,
    dtype: str | None,
    folder: str | Path,
    python: str | Path = sys.executable,
) -> Iterator[tuple[Path, Path]]:
    """Yield target and draft as GGUF files; those that are folders are converted and deleted after.

    The converter needs the target's folder for a draft, and reads there the tokenizer and the
    number of layers.

    Args:
        target: folder or GGUF file.
        draft: exported folder or GGUF file.
        converter: `convert_hf_to_gguf.py` of a llama.cpp checkout, or the checkout; None only for
            two GGUF files.
        dtype: of the converted weights, a key of `OUT_TYPES`; None is float32.
        folder: where converted files are for the time being.
        python: runs the converter; this one by default.

    Raises:
        UserError: no converter, no folder to convert, or the converter fails.
    """
    paths = [Path(target), Path(draft)]
    if all(path.suffix == ".gguf" for path in paths):
        yield paths[0], paths[1]
        return

    script = find_converter(converter)
    if paths[0].suffix == ".gguf":
        raise UserError(
            f"--draft {draft}: to convert a draft, llama.cpp's converter needs the target's "
            "folder; name the target's folder, or a draft that is a GGUF file"
        )
    kind = OUT_TYPES[dtype or "float32"]
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as made:
        converted = [Path(made) / "target.gguf", paths[1]]
        _convert([str(python), str(script)], paths[0], kind, converted[0], [])
        if paths[1].suffix != ".gguf":
            check_taps(paths[1], paths[0])
            converted[1] = Path(made) / "draft.gguf"
            options = ["--target-model-dir", str(target)]
            _convert([str(python), str(script)], paths[1], kind, converted[1], options)
        yield converted[0], converted[1]


def find_converter(given: str | Path | None) -> Path:
    """The converter's file.

    Raises:
        UserError: none is named, or it is not there.
    """
    if given is None:
        raise UserError(
            f"--engine llamacpp reads GGUF files: name llama.cpp's {CONVERTER} or its checkout "
            "with --converter, or give target and draft as GGUF files"
        )
    path = Path(given)
    if path.is_dir():
        path = path / CONVERTER
    if not path.is_file():
        raise UserError(
            f"--converter {given}: no {CONVERTER} there; name a checkout of llama.cpp or that file"
        )
    return path.absolute()


def check_taps(draft: Path, target: Path) -> None:
    """Refuse a draft whose taps the converter would not read.

    It reads them from the top level of config.json alone, as layers counted from 1, and takes
    `2, L // 2, L - 3` where there are none.

    Raises:
        UserError: the draft names others in `eagle_config` alone.
    """
    tree = read_json(draft / "config.json")
    if tree.get("eagle_aux_hidden_state_layer_ids"):
        return
    nested = tree.get("eagle_config") or {}
    ids = nested.get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        return
    config = read_json(target / "config.json")
    layers = config.get("text_config", config)["num_hidden_layers"]
    expected = [1, layers // 2 - 1, layers - 4]
    if list(ids) != expected:
        raise UserError(
            f"{draft}/config.json: eagle_config names the tapped layers {ids}, which llama.cpp's "
            f"converter does not read (it would take {expected}); export the draft anew"
        )


def _convert(converter: list[str], folder: Path, kind: str, out: Path, options: list[str]) -> None:
    """Run the converter on one folder."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json there; llama.cpp's converter needs a model's folder"
        )
    log = out.with_suffix(".log")
    command = [*converter, str(folder), "--outfile", str(out)]
    command += ["--outtype", kind, *options]
    with log.open("wb") as output:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
    if code or not out.is_file():
        said = last_words(log) or "it printed nothing"
        raise UserError(f"{converter[1]}: cannot convert {folder} (exit code {code}): {said}")
