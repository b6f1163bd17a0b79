"""Target and draft as the files that llama.cpp loads, made by its own converter."""

import subprocess
from pathlib import Path

from eagle3fn.base.errors import UserError
from eagle3fn.engines.process import find_python, last_words

CONVERTER = "convert_hf_to_gguf.py"


def to_gguf(
    python: str | Path,
    source: str | Path,
    model: str | Path,
    out: str | Path,
    target: str | Path | None = None,
    dtype: str = "f32",
    log: str | Path | None = None,
) -> Path:
    """Convert a model's folder; returns `out`.

    Args:
        python: the Python of an environment that has what the converter needs.
        source: llama.cpp's tree, which has the converter.
        model: folder of a target, or of an exported draft.
        out: the file to write.
        target: a draft's target, whose tokenizer and taps the draft's file names.
        dtype: of the tensors, as the converter calls it.
        log: file for what the converter prints; None: beside `out`, ending in `.log`.

    Raises:
        UserError: no such Python, or the converter fails, with its last words.
    """
    out = Path(out)
    log = Path(log) if log else out.with_suffix(".log")
    command = [
        find_python("what llama.cpp's converter needs", python),
        str(Path(source) / CONVERTER),
        str(model),
    ]
    command += ["--outfile", str(out), "--outtype", dtype]
    if target is not None:
        command += ["--target-model-dir", str(target)]
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not out.is_file():
        raise UserError(
            f"llama.cpp's converter, exit code {done.returncode}: {last_words(log)}; see {log}"
        )
    return out
