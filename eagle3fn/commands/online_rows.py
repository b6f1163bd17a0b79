"""The rows of `train --online`: conversations or prompts, encoded, and what they depend on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.commands.shared import chat_template

if TYPE_CHECKING:
    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.sample_file import SampleFile
    from eagle3fn.data.template import ChatTemplate


def settings_of(options: Any) -> dict[str, str]:
    """What the rows depend on, by option, as far as it is known before they are encoded.

    Raises:
        UserError: conversations or a tokenizer that cannot be read.
    """
    from eagle3fn.base.files import json_sha256
    from eagle3fn.data.extract import SAMPLE_RULE
    from eagle3fn.data.row_files import rows_digest
    from eagle3fn.data.target_loading import load_tokenizer

    template = chat_template(options, load_tokenizer(options.target))
    settings = {
        "--online": f"sha256 {rows_digest(options.online)}",
        "--max-length": str(options.max_length),
        "--batch-tokens": str(options.batch_tokens or "not given"),
        "--template-arg": json.dumps(template.arguments),
        "--generate": "given" if options.generate else "not given",
        "the target's chat template": json_sha256(template.tokenizer.chat_template),
        "the target's stop tokens": ", ".join(map(str, template.stops)),
        "the rule of samples": json.dumps(SAMPLE_RULE),
    }
    sampling = sampling_of(options)
    for name, value in sampling._asdict().items() if sampling else ():
        settings[f"--{name.replace('_', '-')}"] = str(value)
    return settings


def encode(options: Any, vocab_size: int, path: Path | None) -> "tuple[SampleFile, dict[str, Any]]":
    """The rows, written to `path` or a temporary file, and what is known of them.

    Args:
        options: the command's, checked.
        vocab_size: the target's.
        path: the file to write; None: a temporary one.

    Raises:
        UserError: bad rows, no sample.
    """
    from eagle3fn.base.files import json_sha256
    from eagle3fn.data.row_stamps import check_stamps, stamps_of
    from eagle3fn.data.target_loading import load_tokenizer

    template = chat_template(options, load_tokenizer(options.target))
    stamps = stamps_of(options.online)
    settings = settings_of(options)
    read = _prompts if options.generate else _samples
    samples, counts, said = read(options, template, vocab_size, path)
    check_stamps(options.online, stamps)
    facts = {
        "data_hash": settings["--online"].removeprefix("sha256 "),
        "max_length": options.max_length,
        "template_arguments": template.arguments,
        **counts,
        "remaining": 0,
    }
    fingerprint = json_sha256(settings)
    settings["--limit"] = f"{counts['rows']} rows"
    settings["--skip-bad"] = f"{counts.get('rejected', 0)} rows left out"
    return samples, {
        "fingerprint": fingerprint,
        "facts": facts,
        "settings": settings,
        "said": said,
    }


def _samples(
    options: Any, template: "ChatTemplate", vocab_size: int, path: Path | None
) -> "tuple[SampleFile, dict[str, Any], list[str]]":
    """Conversations, with their answers."""
    from eagle3fn.base.cores import local_ranks, own_cores
    from eagle3fn.data.encode import describe_counts, encode_file
    from eagle3fn.data.samples import NO_ANSWER, SampleMaker

    rejects = f"{options.out}.rejects.jsonl"
    encoded = encode_file(
        SampleMaker(template, options.max_length),
        options.online,
        vocab_size,
        path=path,
        limit=options.limit,
        processes=own_cores() * local_ranks(),  # the other ranks wait meanwhile
        skip_bad=options.skip_bad,
        rejects=rejects,
        on_progress=progress.counter("row"),
    )
    counts = encoded.counts()
    said = describe_counts(counts, rejects)
    if counts["dropped_reasons"].get(NO_ANSWER):
        said.append("with --generate the target answers prompts itself")
    return encoded.samples, counts, said


def _prompts(
    options: Any, template: "ChatTemplate", vocab_size: int, path: Path | None
) -> "tuple[SampleFile, dict[str, Any], list[str]]":
    """Prompts, which the target will answer."""
    from eagle3fn.data.prompt_rows import prompt_rows

    sampling = sampling_of(options)
    assert sampling is not None
    found = prompt_rows(
        template,
        options.online,
        max_length=options.max_length,
        max_new=sampling.max_new,
        out=path,
        limit=options.limit,
        skip_bad=options.skip_bad,
        rejects=f"{options.out}.rejects.jsonl",
    )
    return found.samples, found.counts(), found.describe()


def sampling_of(options: Any) -> "Sampling | None":
    """How the target's answers are drawn: as the options say, else as `regenerate` draws them; None
    if it writes none.
    """
    from eagle3fn.data.regenerate import ANEW

    if not options.generate:
        return None
    given = {name: getattr(options, name, None) for name in ANEW._fields}
    return ANEW._replace(**{name: value for name, value in given.items() if value is not None})
