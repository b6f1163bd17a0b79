"""Configuration, tokenizer and model by transformers: the one place that calls `from_pretrained`.

No code of a target's folder is ever run, and nobody is asked whether it may: remote code is
refused, and so are pickled weights. Whatever the library raises becomes one line that names the
file. transformers is imported here inside functions, never when the file is loaded.
"""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError, is_out_of_memory, one_line
from eagle3fn.base.read import check_regular
from eagle3fn.data.target_source import config_file, no_fit, not_loadable, source_of
from eagle3fn.data.target_values import check_config, check_generation, check_tokenizer

_NEVER: dict[str, Any] = {"trust_remote_code": False}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PROBE = "a text, é 1\n"


def load_config(path_or_id: str | Path) -> Any:
    """The target's configuration as transformers' object.

    Raises:
        UserError: not loadable; a model type that transformers does not have; an impossible value.
    """
    from transformers import AutoConfig

    name, extra = source_of(path_or_id)
    if not extra:
        check_config(path_or_id)
    with _refusing(config_file(path_or_id)):
        return AutoConfig.from_pretrained(name, **extra, **_NEVER)


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The target's tokenizer alone; a folder needs no config.json and no weights.

    Raises:
        UserError: not loadable, or it cannot read and write a short text; names its file.
    """
    from transformers import AutoTokenizer

    has_config = not Path(path_or_id).is_dir() or (Path(path_or_id) / "config.json").is_file()
    name, extra = source_of(path_or_id) if has_config else (str(path_or_id), {})
    if not extra:
        check_tokenizer(path_or_id)
    with _refusing(_tokenizer_file(path_or_id)), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, **extra, **_NEVER)
        _try(tokenizer)
    return tokenizer


def load_weights(
    path_or_id: str | Path, attn: str, dtype: Any, spread: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The model by its `attn` implementation or else by "eager", and transformers' report of it.

    With `spread` accelerate puts its layers on all cards, and what they have no room for elsewhere.

    Raises:
        UserError: not loadable.
    """
    name, extra = source_of(path_or_id)
    if not extra:
        check_generation(path_or_id)
        extra: dict[str, Any] = {"use_safetensors": True}  # no pickles
    if spread:
        extra = {**extra, "device_map": "auto"}
    for file in sorted(Path(path_or_id).glob("*.safetensors*")):
        check_regular(file)
    with _refusing(path_or_id), _escaped_log():
        return _by_attention(name, attn, dtype=dtype, **extra, **_NEVER)


def _by_attention(name: str, attn: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    options["output_loading_info"] = True
    try:
        return loader.from_pretrained(name, attn_implementation=attn, **options)
    except ValueError as error:
        unsupported = attn in str(error) or "attention implementation" in str(error)
        if attn == "eager" or not unsupported:
            raise
    return loader.from_pretrained(name, attn_implementation="eager", **options)


def build(config: Any) -> Any:
    """The model of a configuration, of the library's own code, with parameters as it draws them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **_NEVER)


def _try(tokenizer: Any) -> None:
    """Do with a tokenizer what is done with it later."""
    marks = "".join(tokenizer.special_tokens_map.values())
    ids = tokenizer(_PROBE + marks, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError("it makes no tokens of a text")
    if not isinstance(tokenizer.decode(ids, skip_special_tokens=False), str):
        raise ValueError("it decodes to no text")
    for number, token in tokenizer.added_tokens_decoder.items():
        if type(number) is not int or not isinstance(token.content, str):
            raise ValueError("an added token has no number or no text")


def _tokenizer_file(path_or_id: str | Path) -> str:
    """The file that a fault of the tokenizer is looked for in first."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (Path(path_or_id) / name).is_file():
            return str(Path(path_or_id) / name)
    return str(path_or_id)


# What the libraries raise and print


@contextmanager
def _refusing(where: str | Path) -> Iterator[None]:
    """Turn whatever the library raises into a refusal of the target.

    It raises what comes of a value that it did not expect, and its Rust part panics.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if is_out_of_memory(error) or not (panic or isinstance(error, Exception)):
            raise
        if "ignore_mismatched_sizes" in str(error):
            what = "tensors in its files have other shapes than config.json says"
            raise no_fit(where, what) from None
        raise not_loadable(where, error) from None


@contextmanager
def _escaped_log() -> Iterator[None]:
    """Keep control codes of what files say, such as names of tensors, out of transformers' log."""
    from transformers.utils import logging as library

    def escape(record: logging.LogRecord) -> bool:
        lines = _COLOUR.sub("", record.getMessage()).split("\n")
        record.msg = "\n".join(map(one_line, lines))
        record.args = ()
        return True

    handlers = library.get_logger("transformers").handlers
    for handler in handlers:
        handler.addFilter(escape)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(escape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what is printed to the process's stderr; print it afterwards, unless this fails.

    Panics of Rust print a backtrace there, past Python's `sys.stderr`.
    """
    try:
        sys.stderr.flush()
        own = os.dup(2)
    except (OSError, AttributeError, ValueError):  # there is none
        yield
        return

    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
            sys.stderr.flush()
        finally:
            os.dup2(own, 2)
            os.close(own)
        kept.seek(0)
        os.write(2, kept.read())
