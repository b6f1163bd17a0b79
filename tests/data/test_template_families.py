"""The proof: samples are, token by token, what a target reads and writes, for each chat template.

A tiny random target is asked by `generate` on the prompt that `apply_chat_template` gives. Its
answer becomes a turn as a serving engine returns it, with and without parsers. The samples made of
the row must be the very ids of each prompt and answer.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data.jinja import DATE, Program
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import conversation_of
from eagle3fn.data.written import NO_THOUGHT

FREE = 3
"""Letters that the target chooses in each place that is its own."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "the time",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string", "description": "a zone"}},
                "required": ["zone"],
            },
        },
    }
]
OFF = {"enable_thinking": False}
ON = {"enable_thinking": True}


class Form(NamedTuple):
    """How a family's target writes, and how an engine is spoken to. Texts around free letters."""

    stop: str  # the token after an answer
    others: tuple[str, ...] = ()  # further stop tokens, those of generation_config.json
    begins: str = ""  # of an answer without a thought
    ends: str = ""  # of an answer
    thought: tuple[str, str] | None = None
    call: tuple[str, str] | None = None
    call_stop: str = ""  # the token after a call, if it is another one
    call_begins: str | None = None  # of a call without a thought, if not `begins`
    thought_call: str | None = None  # closes a thought before a call, if not `thought[1]`
    key: str = "reasoning_content"  # of a thought in an engine's message
    as_text: bool = False  # arguments of a call as JSON text
    on: dict[str, Any] = {}  # noqa: RUF012  template arguments that make it think
    off: dict[str, Any] = {}  # noqa: RUF012  and that make it not


JSON_CALL = ('<tool_call>\n{"name": "clock", "arguments": {"zone": "', '"}}\n</tool_call>')
XML_CALL = (
    "<tool_call>\n<function=clock>\n<parameter=zone>\n",
    "\n</parameter>\n</function>\n</tool_call>",
)
PYTHON_CALL = ("<|tool_call_start|>[clock(zone='", "')]<|tool_call_end|>")
DEEPSEEK_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{"zone": "',
    '"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
)
THINK = ("<think>\n", "\n</think>\n\n")
CHATML = Form("<|im_end|>", ("<|endoftext|>",))
QWEN2 = CHATML._replace(call=JSON_CALL)
QWEN3 = QWEN2._replace(begins="".join(THINK), thought=THINK, off=OFF)
QWEN3_5 = QWEN3._replace(call=XML_CALL)
NEMOTRON = CHATML._replace(
    thought=("<think>\n", "\n</think>\n"),
    begins="<think></think>",
    call=(XML_CALL[0], XML_CALL[1] + "\n"),
    call_begins="<think></think>\n",
    off=OFF,
)
ULTRA = NEMOTRON._replace(thought=("<think>\n", "</think>"), thought_call="</think>\n")
LLAMA = Form("<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>"))
DEEPSEEK = Form("<｜end▁of▁sentence｜>", thought=THINK, call=DEEPSEEK_CALL, as_text=True)
GEMMA4 = Form(
    "<turn|>",
    ("<eos>", "<|tool_response>"),
    thought=("<|channel>thought\n", "\n<channel|>"),
    call=('<|tool_call>call:clock{zone:<|"|>', '<|"|>}<tool_call|>'),
    call_stop="<|tool_response>",
    on=ON,
)
HARMONY = "<|channel|>commentary json<|message|>"

FORMS = {
    "cohere": Form("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Form("<|END_OF_TURN_TOKEN|>", ends="<|END_RESPONSE|>"),
    "deepseek_r1_distill": DEEPSEEK._replace(call=None),
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": GEMMA4,
    "gemma": Form("<end_of_turn>", ("<eos>",)),
    "gemma3": Form("<end_of_turn>", ("<eos>",)),
    "gemma4": GEMMA4,
    "gemma4_v2": GEMMA4._replace(call_stop="<turn|>"),
    "glm4moe": Form(
        "<|user|>",
        ("<|endoftext|>", "<|observation|>"),
        begins="\n<think></think>\n",
        thought=("\n<think>", "</think>\n"),
        call=(
            "<tool_call>clock\n<arg_key>zone</arg_key>\n<arg_value>",
            "</arg_value>\n</tool_call>",
        ),
        call_stop="<|observation|>",
        off=OFF,
    ),
    "gptoss": Form(
        "<|return|>",
        ("<|endoftext|>", "<|call|>"),
        begins="<|channel|>final<|message|>",
        thought=(
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        call=(f' to=functions.clock{HARMONY}{{"zone": "', '"}'),
        call_stop="<|call|>",
        call_begins="",
        thought_call="<|end|><|start|>assistant",
        key="thinking",
    ),
    "idefics3": Form("<end_of_utterance>", begins=" "),
    "lfm2": CHATML,
    "lfm2_v2": CHATML._replace(call=PYTHON_CALL),
    "lfm2_2_5": CHATML._replace(call=PYTHON_CALL, thought=("<think>", "</think>"), key="thinking"),
    "llama3": LLAMA,
    "llama3_1": LLAMA._replace(call=('{"name": "clock", "parameters": {"zone": "', '"}}')),
    "llama3_2": LLAMA._replace(call=('{"name": "clock", "parameters": {"zone": "', '"}}')),
    "llava_next": Form("</s>", begins=" "),
    "muse_glimmer": Form(
        "<|eot|>",
        begins=" to=user<|message|>",
        thought=(" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
        call=(
            ' to=clock<|message|><atem:function_calls>\n<atem:invoke name="clock">\n'
            '<atem:parameter name="zone">',
            "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>",
        ),
        call_begins="",
        thought_call="<|eom|><|start|>assistant",
    ),
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": ULTRA,
    "nemotron_3_5_lightning": ULTRA,
    "phi3": Form("<|end|>", ("<|endoftext|>", "<|assistant|>")),
    "phi3_5": Form("<|end|>", ("<|endoftext|>", "<|assistant|>")),
    "qwen2_5": QWEN2,
    "qwen2_5_vl": CHATML,
    "qwen3": QWEN3,
    "qwen3_5_nothink": QWEN3_5._replace(on=ON),
    "qwen3_5_think": QWEN3_5,
    "qwen3_6": QWEN3_5,
    "qwen3_8": QWEN3_5,
    "qwen3_instruct_2507": QWEN2,
    "qwen3_vl": QWEN2,
    "smolvlm": Form("<end_of_utterance>", begins=" "),
}
"""By the template's name. A revision (`_v2`) and a marked copy (`_training`) have its form."""

SCENARIOS = (
    "plain",
    "system",
    "not thinking",
    "raw thought",
    "exact thought",
    "thought",
    "calls",
    "thought calls",
)
"""What is asked. Thoughts are read by no parser, by one that keeps blanks, and by one that does
not."""

# Templates, tokenizers and targets.


@cache
def folder() -> Path | None:
    """The templates that the wheel `trl` ships; none of its modules is imported."""
    found = importlib.util.find_spec("trl")
    if not found or not found.origin:
        return None
    return Path(found.origin).parent / "chat_templates"


@cache
def source(name: str) -> str:
    return (folder() / f"{name}.jinja").read_text(encoding="utf-8")  # type: ignore


def form_of(name: str) -> Form:
    base = name.removesuffix("_training")
    while base not in FORMS:
        base, cut, _ = base.rpartition("_")
        assert cut, f"{name}: a family without a form; add it to FORMS"
    return FORMS[base]


MARK = re.compile(
    r"""<\|[^|>\s'"]+\|>|<｜[^｜>\s]+｜>|<\|\w+>|<\w+\|>|<\|"\|>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|</s>"""
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@cache
def tokenizer_of(name: str) -> Any:
    """Single bytes, and the special tokens that the template writes: decoding can be undone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    form = form_of(name)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    inner.decoder = decoders.ByteLevel()  # type: ignore

    marks = dict.fromkeys(["<bos>", form.stop, *form.others, *MARK.findall(source(name))])
    inner.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in marks])
    inner.add_tokens([AddedToken(each, special=False, normalized=False) for each in TAGS])
    # Some families name no stop token but this one in the tokenizer.
    eos = form.others[0] if form.others else form.stop
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token=eos)
    tokenizer.chat_template = source(name)
    tokenizer.name_or_path = name
    return tokenizer


@cache
def target_of(vocab: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 8192,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


class Only:
    """Logits that allow some tokens alone."""

    def __init__(self, allowed: list[int]) -> None:
        self.allowed = allowed

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[:, self.allowed] = logits[:, self.allowed]
        return masked


LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


@cache
def chosen(
    vocab: int, ids: tuple[int, ...], allowed: tuple[int, ...], stops: tuple[int, ...]
) -> Any:
    """The tokens that the target goes on with after `ids`: letters, or a stop token."""
    torch.manual_seed(sum(ids))
    out = target_of(vocab).generate(
        torch.tensor([ids]),
        do_sample=True,
        max_new_tokens=FREE,
        eos_token_id=list(stops),
        pad_token_id=0,
        logits_processor=[Only(list(allowed))],
    )
    return tuple(out[0, len(ids) :].tolist())


class Engine:
    """Serves the target by a template: renders, generates, and gives back what it wrote."""

    def __init__(self, name: str, arguments: dict[str, Any], tools: list[Any] | None) -> None:
        self.form = form_of(name)
        self.tokenizer = tokenizer_of(name)
        self.arguments = arguments
        self.tools = tools
        text = self.tokenizer.chat_template
        self.only_parts = "['content'][0]['t" in text
        self.messages: list[dict[str, Any]] = []
        self.served: list[tuple[list[int], list[int]]] = []  # ids of prompts and of answers

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt(self) -> str:
        return self.tokenizer.apply_chat_template(
            [self.message(each) for each in self.messages],
            tools=self.tools,
            add_generation_prompt=True,
            tokenize=False,
            **self.arguments,
        )

    def answer(self, *pieces: str, stop: str = "") -> str:
        """What the target writes: `pieces` with free letters between them, and a stop token.

        The first piece begins the answer; it is left out where the prompt has it already.
        """
        prompt = self.prompt()
        begins = pieces[0]
        supplied = next((i for i in range(len(begins), 0, -1) if prompt.endswith(begins[:i])), 0)
        prompt_ids = self.ids(prompt)
        letters = tuple(self.ids("".join(LETTERS)))
        stops = tuple(self.ids(each)[0] for each in (self.form.stop, *self.form.others))

        # The family's marks are forced; the target chooses what is between them, and when to stop
        # is forced again.
        written = self.ids(begins[supplied:])
        for piece in pieces[1:]:
            written += self.choice(prompt_ids + written, letters, stops)
            written += self.ids(piece)
        end = self.ids(stop or self.form.stop)
        written += self.choice(prompt_ids + written, tuple(end), stops)
        assert written[-1:] == end
        self.served.append((prompt_ids, written))
        return self.tokenizer.decode(written[:-1])

    def choice(self, ids: list[int], allowed: tuple[int, ...], stops: tuple[int, ...]) -> list[int]:
        return list(chosen(len(self.tokenizer), tuple(ids), allowed, stops))

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """An OpenAI message as the engine gives it to this template."""
        made = dict(message)
        if self.form.key in ("thinking",) and "reasoning_content" in made:
            made["thinking"] = made.pop("reasoning_content")
        if self.form.as_text and "tool_calls" in made:
            (call,) = made["tool_calls"]
            zone = call["function"]["arguments"]["zone"]
            text = f'{{"zone": "{zone}"}}'
            made["tool_calls"] = [{**call, "function": {"name": "clock", "arguments": text}}]
        if self.only_parts:
            made["content"] = [{"type": "text", "text": made["content"]}]
        return made

    def say(self, role: str, content: str, **more: Any) -> None:
        self.messages.append({"role": role, "content": content, **more})


# Conversations.


class Play:
    """A conversation with the engine, and the row that it leaves."""

    def __init__(self, name: str, scenario: str) -> None:
        self.form = form_of(name)
        self.scenario = scenario
        self.arguments = self._arguments(name)
        self.tools = TOOLS if scenario.endswith("calls") else None
        self.engine = Engine(name, self.arguments, self.tools)

    def _arguments(self, name: str) -> dict[str, Any]:
        if "thought" in self.scenario:
            return self.form.on
        engine = Engine(name, {}, None)
        engine.say("user", "a")
        prompt = engine.prompt()
        opens = bool(self.form.thought) and prompt.endswith(self.form.thought[0])
        return self.form.off if opens or self.scenario in ("not thinking", "calls") else {}

    def row_or_what_was_said(self) -> dict[str, Any]:
        """The row, or one that ends where the engine's template refuses to go on."""
        from jinja2 import TemplateError

        try:
            return self.row()
        except TemplateError:
            self.engine.say("assistant", "abc")
            return {"messages": self.engine.messages}

    def row(self) -> dict[str, Any]:
        if self.scenario == "system":
            self.engine.say("system", "be kind")
        for number in range(2):
            self.engine.say("user", f"question {number}")
            if self.tools:
                self.call(number)
                reply = {"tool_call_id": f"call{number}", "name": "clock"}
                self.engine.say("tool", f"reply {number}", **reply)
            self.answer()
        row: dict[str, Any] = {"messages": self.engine.messages}
        if self.tools:
            row["tools"] = self.tools
        if self.arguments:
            row["chat_template_kwargs"] = self.arguments
        return row

    def answer(self) -> None:
        if "thought" not in self.scenario:
            text = self.engine.answer(self.form.begins, self.form.ends)
            content = text.removesuffix(self.form.ends)
            if self.form.begins.strip():
                content = content.split(self.form.begins.strip())[-1]
            # As an engine gives it, or as it is often kept in files.
            self.engine.say("assistant", content if self.scenario == "plain" else content.strip())
            return

        assert self.form.thought
        opens, closes = self.form.thought
        text = self.engine.answer(opens, closes, self.form.ends)
        if self.scenario == "raw thought":
            self.engine.say("assistant", text)
            return
        thought, content = self._read(text, closes)
        self.engine.say("assistant", content, reasoning_content=thought)

    def call(self, number: int) -> None:
        assert self.form.call
        begin, end = self.form.call
        stop = self.form.call_stop
        more: dict[str, Any] = {}
        if self.scenario == "calls":
            begins = self.form.begins if self.form.call_begins is None else self.form.call_begins
            text = self.engine.answer(begins + begin, end, stop=stop)
        else:
            assert self.form.thought
            opens, closes = self.form.thought
            closes = closes if self.form.thought_call is None else self.form.thought_call
            text = self.engine.answer(opens, closes + begin, end, stop=stop)
            more["reasoning_content"], text = self._read(text, closes)
        zone = text.partition(begin.strip())[2].partition(end.strip())[0].strip()
        function = {"name": "clock", "arguments": {"zone": zone}}
        call = {"id": f"call{number}", "type": "function", "function": function}
        self.engine.say("assistant", "", tool_calls=[call], **more)

    def _read(self, text: str, closes: str) -> tuple[str, str]:
        """The thought and the rest, with the blanks around the marks or without."""
        assert self.form.thought
        thought, _, content = text.partition(closes.strip())
        opens = self.form.thought[0].strip()
        thought = thought.partition(opens)[2] if opens in thought else thought
        return (
            (thought, content) if "exact" in self.scenario else (thought.strip(), content.strip())
        )


def expected(served: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Ids and masks: an answer goes on a sample if its prompt begins with the sample's ids."""
    samples: list[tuple[list[int], list[int]]] = []
    for prompt, written in served:
        ids, mask = samples[-1] if samples else ([], [])
        if not ids or prompt[: len(ids)] != ids:
            ids, mask = [], []
            samples.append((ids, mask))
        added = prompt[len(ids) :] + written
        mask += [0] * (len(added) - len(written)) + [1] * len(written)
        ids += added
    return samples


@cache
def maker_of(name: str) -> SampleMaker:
    form = form_of(name)
    tokenizer = tokenizer_of(name)
    stops = [tokenizer.convert_tokens_to_ids(each) for each in (form.stop, *form.others)]
    return SampleMaker(ChatTemplate(tokenizer, stops), 100_000)


def samples_of(name: str, row: dict[str, Any]) -> Any:
    return maker_of(name).samples("row", conversation_of(row, "file:1"), "file:1")


# Cases. Where a family cannot have what a row says, the row is refused by name.

NO_REASONING = "does not render reasoning_content"
NO_TOOLS = r"does not render (clock|tool_calls)"
REFUSED = {
    ("gemma", "system"): "System role not supported",
    ("gptoss", "raw thought"): "refuses these turns .*channel",
    ("deepseekv3", "calls"): NO_TOOLS,
    ("deepseekv3", "thought calls"): NO_TOOLS,
    # The thought is written into the content, and the template leaves it out.
    **{
        (name, scenario): NO_REASONING
        for name in ("deepseek_r1_distill", "deepseekv3", "gemma4", "gemma4_v2", "gemma4_v3")
        for scenario in ("exact thought", "thought")
    },
    # Thoughts are rendered before calls alone, or never.
    **{
        (name, "thought calls"): NO_REASONING
        for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4")
    },
    ("gemma4_v4", "exact thought"): NO_REASONING,
    ("gemma4_v4", "thought"): NO_REASONING,
}
"""Refusals of what the family's target writes, by what is said."""

THOUGHTLESS = {
    (name, scenario)
    for name in ("deepseek_r1_distill", "deepseekv3")
    for scenario in ("plain", "system")
}
"""Prompts always open a thought: answers without one are left out, each with its reason."""


def cases() -> list[tuple[str, str]]:
    found = folder()
    names = sorted(path.stem for path in found.glob("*.jinja")) if found else []
    return [(name, each) for name in names for each in scenarios(name)]


def scenarios(name: str) -> tuple[str, ...]:
    form = form_of(name)
    if name.endswith("_training"):  # the same text with marks that have no effect
        return ("thought calls",) if form.thought and form.call else ("plain",)
    return SCENARIOS if form.off else tuple(each for each in SCENARIOS if each != "not thinking")


pytestmark = pytest.mark.skipif(
    not cases(), reason="the wheel trl, whose chat templates are tried, is not installed"
)


@pytest.fixture(autouse=True)
def one_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some templates print the date; samples have a fixed one."""
    from datetime import datetime

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls.fromisoformat(DATE)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)


@pytest.mark.parametrize(("name", "scenario"), cases())
def test_samples_are_what_the_target_read_and_wrote(name: str, scenario: str):
    base = name.removesuffix("_training")
    form = form_of(name)
    if ("thought" in scenario and not form.thought) or (
        scenario.endswith("calls") and not form.call
    ):
        said = f"({NO_TOOLS}|{NO_REASONING})"
        with pytest.raises(UserError, match=f"file:1: .*{said}"):
            samples_of(name, general_row(scenario))
        return

    play = Play(name, scenario)
    refused = REFUSED.get((base, scenario))
    if refused:
        with pytest.raises(UserError, match=f"file:1: .*{refused}"):
            samples_of(name, play.row_or_what_was_said())
        return

    found = samples_of(name, play.row())
    if (base, scenario) in THOUGHTLESS:
        assert not found.samples
        assert found.dropped == [NO_THOUGHT] * 2
        return

    made = [(each.input_ids.tolist(), each.token_mask.tolist()) for each in found.samples]
    wanted = expected(play.engine.served)
    assert shown(name, made) == shown(name, wanted)
    assert made == wanted
    assert not found.dropped


def general_row(scenario: str) -> dict[str, Any]:
    """A row as in a scenario, for families that cannot have it."""
    function = {"name": "clock", "arguments": {"zone": "UTC"}}
    calls = scenario.endswith("calls")
    answer: dict[str, Any] = {"role": "assistant", "content": "" if calls else "noon"}
    if "thought" in scenario:
        answer["reasoning_content"] = "it is late"
    if calls:
        answer["tool_calls"] = [{"id": "call0", "type": "function", "function": function}]
    row = {"messages": [{"role": "user", "content": "what time is it?"}, answer]}
    return {**row, "tools": TOOLS} if calls else row


def shown(name: str, samples: list[tuple[list[int], list[int]]]) -> list[str]:
    """Samples as text, what is supervised in brackets."""
    tokenizer = tokenizer_of(name)
    texts = []
    for ids, mask in samples:
        text = ""
        supervised = 0
        for number, on in zip(ids, mask, strict=True):
            text += ("⟦" if on else "⟧") * (on != supervised) + tokenizer.decode([number])
            supervised = on
        texts.append(text + "⟧" * supervised)
    return texts


IN_ORDER = {
    *("cohere", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2"),
    *(
        "llava_next",
        "phi3",
        "phi3_5",
        "qwen2_5",
        "qwen2_5_vl",
        "qwen3_instruct_2507",
        "qwen3_vl",
        "smolvlm",
    ),
}
"""Families whose long conversations are rendered once, not once for each answer."""


@pytest.mark.parametrize("name", sorted({name for name, _ in cases() if "training" not in name}))
def test_beginnings_rendered_at_once_are_those_rendered_each(name: str):
    engine = Engine(name, {}, None)
    for number in range(3):
        engine.say("user", f"question {number}")
        engine.say("assistant", f"answer {number}")
    messages = [engine.message(each) for each in engine.messages]
    program = Program(source(name))
    for ask in (True, False):
        variables = {"bos_token": "<bos>", "eos_token": "<eos>", "add_generation_prompt": ask}
        found = program.prefixes.prefixes(messages, variables)
        assert bool(found) == (name in IN_ORDER)
        for count in range(1, 7):
            assert not found or found.of(count) == program.render(
                {**variables, "messages": messages[:count]}
            )


def test_every_exception_is_of_a_family_that_is_tried():
    assert {*REFUSED, *THOUGHTLESS} <= set(cases())


def test_the_date_that_a_template_prints_does_not_change_samples():
    row = general_row("plain")
    (sample,) = samples_of("llama3_2", row).samples
    assert "Today Date: 01 Jan 2026" in tokenizer_of("llama3_2").decode(sample.input_ids)
