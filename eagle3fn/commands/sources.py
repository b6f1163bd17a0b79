"""Where a command's features come from: the target in this process, or a serving engine.

Options are read by the names that `commands.options` gives them; what differs between commands is
an argument.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from eagle3fn.commands.shared import given_options, named_values

if TYPE_CHECKING:
    import torch

    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.sources import FeatureSource
    from eagle3fn.engines.hidden_states import HiddenStates

_OF_ENGINES = ("--engine-python", "--engine-url", "--engine-arg", "--check")


def check_engine_options(
    options: Any, of_server: Sequence[str] = ("engine_arg", "threads")
) -> None:
    """Refuse options of an engine that would have no effect or do not go together, by name.

    Args:
        options: the command's; read are `engine`, `engine_python`, `engine_url` and `of_server`.
        of_server: names of the options that a running server has its own values of.

    Raises:
        UserError: one of them would have no effect, misses another, or has one too many.
    """
    from eagle3fn.base.errors import UserError

    if not options.engine:
        for name in given_options(options, _OF_ENGINES):
            raise UserError(f"{name}: needs --engine, such as --engine vllm")
        return

    if options.engine == "transformers":
        if options.engine_url:
            raise UserError("--engine transformers: has no servers; leave --engine-url out")
        return
    if bool(options.engine_python) == bool(options.engine_url):
        raise UserError(
            f"--engine {options.engine}: needs either --engine-python, a Python that has it, or "
            "--engine-url, a running server"
        )
    if options.engine_url:
        for name in of_server:
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: a running server has its own; give it at its start")
    if options.engine == "sglang" and options.engine_python:
        raise UserError("--engine sglang: is asked as running servers alone; give --engine-url")


@contextmanager
def model_source(
    options: Any, layers: tuple[int, ...], device: str, writing: "Sampling | None" = None
) -> "Iterator[tuple[FeatureSource, Any]]":
    """The target in this process as a source of features, and its tokenizer.

    It computes with torch's number of threads at the time, which the caller sets.

    Args:
        options: the command's; read are `target`, `dtype` and `batch_tokens`.
        layers: the tapped decoder layers, ascending and counted from 0.
        device: where the target is computed, checked; `base.device.SPREAD` for all cards.
        writing: how the target writes answers; None: it writes none.

    Raises:
        UserError: as `data.target.load_target`; files that cannot be read.
    """
    import torch

    from eagle3fn.base.device import fast_dtype
    from eagle3fn.data.sources import BATCH_TOKENS, CPU_BATCH_TOKENS, model_source
    from eagle3fn.data.target import load_target, stop_ids
    from eagle3fn.data.target_files import target_stamps

    card = card_of(device)
    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype(card)
    stamps = target_stamps(options.target)
    model, tokenizer = load_target(options.target, dtype, device)

    on_cpu = torch.device(card).type == "cpu"
    batch_tokens = options.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS)
    source = model_source(
        model,
        layers,
        batch_tokens=batch_tokens,
        name=options.target,
        stamps=stamps,
        stops=() if writing is None else stop_ids(options.target, tokenizer),
    )
    yield source, tokenizer


def as_transformers(source: "FeatureSource", target: str, device: str) -> "FeatureSource":
    """A target in this process, known as `--engine transformers` is on such a device.

    The two have the same bits where the versions of their libraries and their threads are the same,
    so a run may begin with one and go on with the other. A GGUF file, which engines do not read,
    stays as it is.

    Raises:
        UserError: files that cannot be read.
    """
    import torch
    import transformers

    from eagle3fn.data.target_source import source_of, weights_folder
    from eagle3fn.data.weights import files_digest

    _, gguf = source_of(target)
    if gguf:
        return source
    kind = torch.device(card_of(device)).type
    record = {"name": "transformers", "version": transformers.__version__, "device": kind}
    weights = files_digest(weights_folder(target))
    return source._replace(
        identity={**source.identity, "weights": weights, "engine": record},
        index={**source.index, "engine": record},
    )


def room(options: Any) -> int:
    """Tokens that must fit after a sample: an engine that serves writes one more."""
    return 0 if options.engine in (None, "transformers") else 1


def card_of(device: str) -> str:
    """A target's device as torch knows it: that of the cards, where it is spread over all.

    Raises:
        UserError: as `base.device.check_spread`.
    """
    from eagle3fn.base.device import SPREAD, check_spread

    return check_spread() if device == SPREAD else device


@contextmanager
def engine_source(
    options: Any,
    tree: dict[str, Any],
    layers: tuple[int, ...],
    log: str,
    say: Callable[[str], None],
    writing: "Sampling | None" = None,
    abandoned: threading.Event | None = None,
) -> "Iterator[tuple[FeatureSource, Any]]":
    """An engine as a source of features, and the target's tokenizer; it ends with the context.

    Args:
        options: the command's; read are `target`, `dtype`, `batch_tokens`, `check` and what
            `open_engine` reads.
        tree: the target's configuration (`data.target_source.target_config`).
        layers: the tapped decoder layers, ascending and counted from 0.
        log: path of the file into which an engine in a process of its own writes.
        say: called with one line on how the engine's first row compares.
        writing: how the target writes answers; None: it writes none.
        abandoned: as of `engines.process.EngineProcess`.

    Raises:
        UserError: samples as long as the target's limit; files that cannot be read; an engine that
            does not start or answer.
    """
    import torch

    from eagle3fn.data.engine_source import check_room, engine_source
    from eagle3fn.data.target import stop_ids
    from eagle3fn.data.target_files import target_stamps
    from eagle3fn.data.target_loading import load_tokenizer
    from eagle3fn.data.target_source import loaded_config

    if room(options):
        check_room(loaded_config(options.target), options.max_length, options.engine)
    arguments = named_values(options.engine_arg or [], "--engine-arg", "tensor_parallel_size=2")
    check = options.check or _default_check(options, arguments)
    tokenizer = load_tokenizer(options.target)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    stamps = target_stamps(options.target)
    with open_engine(options, tree, layers, dtype, arguments, log, abandoned) as engine:
        if writing is not None:
            _check_temperature(engine, writing)
        source = engine_source(
            engine,
            options.target,
            layers,
            batch_tokens=options.batch_tokens or _batch_tokens(options.engine, arguments),
            check=check,
            say=say,
            stamps=stamps,
            stops=() if writing is None else stop_ids(options.target, tokenizer),
        )
        yield source, tokenizer


def _default_check(options: Any, arguments: dict[str, Any]) -> str:
    """What an engine's first row is compared with; transformers would be the same library twice."""
    from eagle3fn.data.engine_source import default_check

    return (
        "logits" if options.engine == "transformers" else default_check(options.target, arguments)
    )


def _check_temperature(engine: Any, writing: "Sampling") -> None:
    """Refuse to let an engine write that would draw other tokens than it is asked for."""
    from eagle3fn.engines.vllm_process import VllmProcess

    if isinstance(engine, VllmProcess):
        engine.check_temperature(writing.temperature)


def _batch_tokens(engine: str, arguments: dict[str, Any]) -> int:
    """Tokens that an engine is asked for at once; of transformers as in this process."""
    from eagle3fn.data.engine_source import ENGINE_BATCH_TOKENS
    from eagle3fn.data.sources import BATCH_TOKENS, CPU_BATCH_TOKENS

    if engine != "transformers":
        return ENGINE_BATCH_TOKENS
    return CPU_BATCH_TOKENS if arguments.get("device", "cpu") == "cpu" else BATCH_TOKENS


def open_engine(
    options: Any,
    tree: dict[str, Any],
    layers: tuple[int, ...],
    dtype: "torch.dtype | None",
    arguments: dict[str, Any],
    log: str,
    abandoned: threading.Event | None = None,
) -> "AbstractContextManager[HiddenStates]":
    """The engine that the options name; it is started, or its server asked, at once.

    Args:
        options: the command's, checked; read are `engine`, `engine_python`, `engine_url`, `target`,
            `max_length` and `threads`.
        tree: the target's configuration.
        layers: the tapped decoder layers, ascending and counted from 0.
        dtype: what it computes in; None, the engine's choice.
        arguments: of the engine's own, by name.
        log: path of the file into which an engine in a process of its own writes.
        abandoned: as of `engines.process.EngineProcess`; a running server is left as it is.

    Raises:
        UserError: it does not start or answer.
    """
    from eagle3fn.engines.sglang import SglangServers
    from eagle3fn.engines.transformers_process import TransformersProcess
    from eagle3fn.engines.vllm_process import VllmProcess, taps_of
    from eagle3fn.engines.vllm_server import VllmServer

    if options.engine == "transformers":
        return TransformersProcess(
            options.engine_python or sys.executable,
            options.target,
            layers,
            log,
            max_length=options.max_length,
            dtype=dtype,
            device=_transformers_device(arguments),
            threads=options.threads,
            abandoned=abandoned,
        )
    if options.engine == "sglang":
        return SglangServers(options.engine_url, layers, dtype=dtype)
    taps = taps_of(layers, tree["num_hidden_layers"])
    if options.engine_url:
        (url,) = options.engine_url
        return VllmServer(url, taps, max_length=options.max_length, dtype=dtype)
    return VllmProcess(
        options.engine_python,
        options.target,
        taps,
        log,
        max_length=options.max_length,
        dtype=dtype,
        arguments=arguments,
        threads=options.threads,
        abandoned=abandoned,
    )


def _transformers_device(arguments: dict[str, Any]) -> str:
    """The target's device by transformers: all that `--engine-arg` may say of it.

    Raises:
        UserError: something else.
    """
    from eagle3fn.base.errors import UserError, printable

    for name in arguments:
        if name != "device":
            raise UserError(
                f"--engine-arg {printable(name)}: of transformers there is device alone, as in "
                "device=cuda:1"
            )
    return str(arguments.get("device", "cpu"))
