"""Commands that check: evaluation here or in an engine, a run's report, parity with SpecForge."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.base.output import Result
from eagle3fn.commands.shared import given_options, named_values, say, template_arguments

if TYPE_CHECKING:
    from eagle3fn.base.sampling import Sampling


def evaluate(options: Any) -> Result:
    """Decode prompts plainly and with the draft, by this package or in a serving engine."""
    _check_evaluate(options)
    if options.engine:
        return _evaluate_in_engine(options)
    import torch

    from eagle3fn.base.device import check_device
    from eagle3fn.base.files import write_json
    from eagle3fn.base.thread_timing import sizes_of, thin_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.target_source import target_config
    from eagle3fn.use.eval_settings import EvalSettings
    from eagle3fn.use.evaluate import evaluate
    from eagle3fn.use.groups import group_lines
    from eagle3fn.use.prompts import read_prompts

    check_device(options.device)
    prompts = read_prompts(*options.prompts, first=options.tasks)
    _choose_draft_length(options)
    settings = EvalSettings(
        tasks=len(prompts.texts),
        max_new=options.max_new,
        draft_length=options.draft_length,
        device=options.device,
        speed_dtype=options.dtype,
        template_arguments=template_arguments(options),
        **_sampling(options)._asdict(),
    )
    _say_prompts(options)
    sizes = sizes_of(target_config(options.target))
    rows = [1, 1 + options.draft_length]  # a token, and a block that is verified
    say(
        take_threads(
            lambda: thin_products(sizes, rows, torch.float32), options.device, options.threads
        )
    )
    report = evaluate(
        options.target,
        options.draft,
        prompts.texts,
        settings,
        untrained_folder=options.untrained,
        plain_store=options.plain,
        on_progress=progress.bars("prompt"),
        prompts_name=prompts.name,
        categories=prompts.categories,
    )
    progress.close()
    write_json(options.out, report)
    for line in group_lines(report):
        print(line)
    if not report["accepted_length"]:
        print("nothing was drafted: every answer ended with its first token")
    same = report.get("lossless_note") or f"lossless {report['lossless']}"
    print(
        f"{options.out}: {same}, "
        f"accepted length {report['accepted_length']:.3f}, "
        f"{report['speedup']:.2f} times as fast in {report['speed_dtype']}"
    )
    return _evaluated(options, report)


def _evaluated(options: Any, report: dict[str, Any]) -> Result:
    """The report without its long lists; these are in its file."""
    short = {name: value for name, value in report.items() if not isinstance(value, list)}
    return Result({"out": options.out, **short})


def _sampling(options: Any) -> "Sampling":
    """How tokens are chosen."""
    from eagle3fn.base.sampling import Sampling

    return Sampling(
        options.temperature or 0.0,
        1.0 if options.top_p is None else options.top_p,
        options.seed or 0,
    )


def _choose_draft_length(options: Any) -> None:
    """Set `--draft-length` where it is not given, and say why it is what it is."""
    from eagle3fn.use.eval_settings import EvalSettings
    from eagle3fn.use.model_card import read_facts

    if options.draft_length is not None:
        return
    unroll = read_facts(options.draft).unroll if Path(options.draft).is_dir() else None
    options.draft_length = unroll or EvalSettings.draft_length
    why = "which the draft was trained with" if unroll else "as its card names no trained unroll"
    say(f"--draft-length is {options.draft_length}, {why}")


def _say_prompts(options: Any) -> None:
    """Say what a prompt becomes."""
    from eagle3fn.data.target_loading import load_tokenizer
    from eagle3fn.data.template import ChatTemplate
    from eagle3fn.data.user_turns import describe_prompts

    arguments = template_arguments(options)
    say(describe_prompts(ChatTemplate(load_tokenizer(options.target), arguments=arguments)))


_HERE_ALONE = ("--device", "--plain", "--untrained", "--threads")

_ENGINES_ALONE = ("--engine-python", "--engine-arg", "--converter")


def _check_evaluate(options: Any) -> None:
    """Refuse options of `evaluate` that would have no effect, by name, and places for no file."""
    from eagle3fn.base.errors import UserError
    from eagle3fn.use.evaluation_file import check_out_evaluation

    check_out_evaluation(options.out)
    if not options.temperature:
        for name in given_options(options, ("--top-p", "--seed")):
            raise UserError(f"{name}: greedy decoding draws nothing; give --temperature above 0")
    if options.engine:
        for name in given_options(options, _HERE_ALONE):
            raise UserError(
                f"{name}: has no effect on an engine; leave it out, or give the engine's own "
                "setting with --engine-arg NAME=VALUE"
            )
        _check_engine(options)
    else:
        for name in given_options(options, _ENGINES_ALONE):
            raise UserError(f"{name}: is for --engine vllm or llamacpp; name one, or leave it out")


def _check_engine(options: Any) -> None:
    """Refuse what the engine cannot do, and options that would have no effect on it."""
    from eagle3fn.base.errors import UserError

    if not options.engine_python:
        raise UserError(
            f"--engine {options.engine}: name the Python of an environment that has it with "
            "--engine-python"
        )

    # GGUF files.
    files = [Path(options.target).suffix, Path(options.draft).suffix]
    if options.engine == "vllm" and options.converter:
        raise UserError("--converter: is for --engine llamacpp; vLLM loads exported folders")
    if options.engine == "vllm" and files[1] == ".gguf":
        raise UserError(f"--draft {options.draft}: vLLM loads exported folders; name one")
    if files == [".gguf", ".gguf"]:
        for name in given_options(options, ("--dtype", "--converter")):
            raise UserError(f"{name}: GGUF files are loaded as they are; leave it out")


def _engine_dtype(options: Any) -> str | None:
    """What an engine computes in; None where a GGUF file of the target says it."""
    gguf = options.engine == "llamacpp" and Path(options.target).suffix == ".gguf"
    return options.dtype or (None if gguf else "float32")


def _evaluate_in_engine(options: Any) -> Result:
    """Decode prompts plainly and with the draft, in a serving engine."""
    from contextlib import nullcontext

    from eagle3fn.base.files import write_json
    from eagle3fn.engines.llamacpp import gguf_files
    from eagle3fn.use.engine_evaluate import EngineEvalSettings, describe, engine_evaluate
    from eagle3fn.use.groups import group_lines
    from eagle3fn.use.prompts import read_prompts

    prompts = read_prompts(*options.prompts, first=options.tasks)
    _choose_draft_length(options)
    settings = EngineEvalSettings(
        engine=options.engine,
        python=options.engine_python,
        tasks=len(prompts.texts),
        max_new=options.max_new,
        draft_length=options.draft_length,
        dtype=_engine_dtype(options),
        sampling=_sampling(options),
        arguments=named_values(options.engine_arg or [], "--engine-arg", "enforce_eager=true"),
        template_arguments=template_arguments(options),
    )
    _say_prompts(options)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    served = nullcontext((options.target, options.draft))
    if options.engine == "llamacpp":
        served = gguf_files(
            options.target,
            options.draft,
            options.converter,
            options.dtype,
            out.parent,
            options.engine_python,
        )
    with served as loaded:
        report = engine_evaluate(
            options.target,
            options.draft,
            prompts.texts,
            settings,
            out.with_suffix(""),
            served=loaded,
            on_progress=progress.bars("prompt"),
            prompts_name=prompts.name,
            categories=prompts.categories,
        )
    progress.close()
    write_json(out, report)
    for line in group_lines(report):
        print(line)
    print(f"{out}: {describe(report)}")
    return _evaluated(options, report)


def report(options: Any) -> Result:
    """Gather a run's results."""
    from eagle3fn.use.report import NUMBERS, PAGE, write_report
    from eagle3fn.use.report_table import report_table

    folder = Path(options.folder)
    numbers = write_report(folder)
    print(f"{report_table(numbers)}\n\npage    {folder / PAGE}\nnumbers {folder / NUMBERS}")
    return Result(numbers)


def parity(options: Any) -> Result:
    """Compare SpecForge's recipe with SpecForge."""
    from eagle3fn.specforge.parity import run

    return run(options.cases, options.seed, options.json, options.bisect, progress.bar)
