"""What llama.cpp is given for a target and its draft: GGUF files, converted where they are not."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle3fn.base.errors import UserError
from eagle3fn.base.read import read_json
from eagle3fn.engines.process import find_python, last_words

CONVERTER = "convert_hf_to_gguf.py"
OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@contextmanager
def gguf_files(
    target: str | Path,
    draft: str | Path,
    converter: str | Path | None,
    dtype: str | None,
    folder: str | Path,
    python: str | Path,
) -> Iterator[tuple[Path, Path]]:
    """Yield target and draft as GGUF files; those that are folders are converted and deleted after.

    For a draft, the converter reads the tokenizer and the number of layers in the target's folder.

    Args:
        target: folder or GGUF file.
        draft: exported folder or GGUF file.
        converter: the checkout of llama.cpp that has `convert_hf_to_gguf.py`, or that file; None
            only for two GGUF files.
        dtype: of the converted weights, a key of `OUT_TYPES`; None is float32.
        folder: where converted files are for the time being, and where the converter's words stay.
        python: the Python of an environment that has what the converter needs: torch,
            transformers, sentencepiece.

    Raises:
        UserError: no converter, no folder to convert, or the converter fails.
    """
    paths = [Path(target), Path(draft)]
    if all(path.suffix == ".gguf" for path in paths):
        yield paths[0], paths[1]
        return

    source = find_converter(converter)
    if paths[0].suffix == ".gguf":
        raise UserError(
            f"--draft {draft}: to convert a draft, llama.cpp's converter needs the target's "
            "folder; name the target's folder, or a draft that is a GGUF file"
        )
    for path in paths:
        if path.suffix != ".gguf" and not (path / "config.json").is_file():
            raise UserError(
                f"{path}: no config.json there; llama.cpp's converter needs a model's folder"
            )

    kind = OUT_TYPES[dtype or "float32"]
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as made:

        def convert(name: str, model: Path, options: list[str]) -> Path:
            out = Path(made) / f"{name}.gguf"
            words = [str(model), "--outfile", str(out), "--outtype", kind, *options]
            command = [find_python("what the converter needs", python), str(source / CONVERTER)]
            _convert([*command, *words], out, Path(folder) / f"convert-{name}.log")
            return out

        if paths[1].suffix != ".gguf":
            check_taps(paths[1], paths[0])
            paths[1] = convert("draft", paths[1], ["--target-model-dir", str(target)])
        yield convert("target", paths[0], []), paths[1]


def find_converter(given: str | Path | None) -> Path:
    """The folder of the converter.

    Raises:
        UserError: none is named, or it is not there.
    """
    if given is None:
        raise UserError(
            f"--engine llamacpp reads GGUF files: name llama.cpp's {CONVERTER} or its checkout "
            "with --converter, or give target and draft as GGUF files"
        )
    path = Path(given)
    if path.name == CONVERTER:
        path = path.parent
    if not (path / CONVERTER).is_file():
        raise UserError(
            f"--converter {given}: no {CONVERTER} there; name a checkout of llama.cpp or that file"
        )
    return path


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


def _convert(command: list[str], out: Path, log: Path) -> None:
    """Run the converter, which must write `out`."""
    with log.open("wb") as output:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code or not out.is_file():
        said = last_words(log) or "it printed nothing"
        raise UserError(
            f"llama.cpp's converter, {command[2]}: ended with exit code {code}: {said}; see {log}"
        )
