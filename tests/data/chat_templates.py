"""Chat templates and tokenizers of our own, each with one habit of those that are in use."""

from typing import Any

HEAD = "{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
# A thought is a key of the turn, or it is in the content.
READ = (
    "{% set c = m.content or '' %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].replace('<think>', '').strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
CALLS = (
    "{% for t in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (t.function | tojson) + '</tool_call>' }}{% endfor %}"
)

PLAIN = "{% for m in messages %}" + HEAD + "{{ m.content }}" + END + "{% endfor %}" + ASK
TRIMS = PLAIN.replace("m.content", "m.content | trim")
BLANK = PLAIN.replace("{{ m.content }}", "{{ ' ' + m.content | trim }}")
"""A blank before each text, which the generation prompt has not."""
MARKED = PLAIN.replace(
    HEAD + "{{ m.content }}" + END,
    "{% if m.role == 'assistant' %}{% generation %}"
    + HEAD
    + "{{ m.content }}"
    + END
    + "{% endgeneration %}{% else %}"
    + HEAD
    + "{{ m.content }}"
    + END
    + "{% endif %}",
)
"""Marks around the header and the line break, too."""
THINKS = (
    "{% if tools %}{{ '<|im_start|>system\nTOOLS ' + (tools | tojson) + '<|im_end|>\n' }}"
    "{% endif %}"
    + LAST
    + "{% for m in messages %}"
    + HEAD
    + "{% if m.role == 'assistant' %}"
    + READ
    + "{% if loop.index0 > ns.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}"
    + CALLS
    + "{% else %}{{ m.content }}{% endif %}"
    + END
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
"""Thoughts are shown in answers after the last question only."""
NOT_THINKING: dict[str, Any] = {"enable_thinking": False}
OPENS = (
    "{% for m in messages %}"
    + HEAD
    + "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    + END
    + "{% endfor %}"
    + ASK.replace("assistant\n'", "assistant\n<think>\n'")
)
"""The prompt opens a thought, and history has none."""
ROLES = (
    "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|assistant|>', "
    "'tool': '<|observation|>', 'system': '<|system|>'}[m.role] + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The next role's mark ends an answer."""
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|system|>",
    "<|end|>",
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def merging_tokenizer(template: Any, eos: str | None = "<|im_end|>") -> Any:
    """Bytes, of which some pairs merge, line breaks too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [("Ċ", "Ċ"), ("Ġ", "a"), ("t", "h"), ("th", "e"), ("o", "n"), ("on", "e")]
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    vocabulary = {text: number for number, text in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    words = pre_tokenizers.Split(Regex(r" ?\w+|\s*[\n]+|\s+|[^\s\w]+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, level])  # type: ignore
    inner.decoder = decoders.ByteLevel()  # type: ignore
    return wrapped(inner, template, eos)


def blank_tokenizer(template: Any, eos: str | None = "<|im_end|>", prepend: str = "always") -> Any:
    """Letters; a blank is a letter of its own, and one is put before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["▁", "<unk>", "\n", *map(chr, range(33, 127))]
    words = ["▁o", "▁on", "▁one", "on", "one"]
    merges = [("▁", "o"), ("▁o", "n"), ("▁on", "e"), ("o", "n"), ("on", "e")]
    vocabulary = {text: number for number, text in enumerate(letters + words)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)  # type: ignore
    inner.decoder = decoders.Metaspace(prepend_scheme=prepend)  # type: ignore
    return wrapped(inner, template, eos)


def wrapped(inner: Any, template: Any, eos: str | None) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    inner.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in SPECIAL])
    inner.add_tokens([AddedToken(each, special=False, normalized=False) for each in TAGS])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    made.chat_template = template
    made.name_or_path = "tiny"
    return made
