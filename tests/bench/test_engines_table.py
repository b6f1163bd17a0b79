"""The table of drafts in serving engines."""

import pytest

from bench import table as speed
from bench.engines_table import cell, table

GOOD = {
    "version": "0.32.0",
    "agrees": True,
    "max_logit_diff": 2.31e-5,
    "tokens_equal": 9,
    "prompts": 10,
    "counts_equal": 9,
    "rounds": 755,
    "accepted": 398,
    "differing": [{"prompt": 4, "token": 7, "engine": 28, "ours": 30, "by": "target"}],
}
LOGITS = {"version": "f" * 40, "agrees": True, "max_logit_diff": 1e-5, "tokens_equal": None}


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (GOOD, "logits 2.3e-05; 9 of 10 prompts: 755 rounds, 398 accepted"),
        (LOGITS, "logits 1.0e-05"),
        (
            GOOD | {"max_logit_diff": None, "agrees": False},
            "**disagrees**; 9 of 10 prompts: 755 rounds, 398 accepted",
        ),
        ({"refused": "no taps"}, "not representable"),
        ({"error": "died"}, "failed"),
        (None, "-"),
    ],
)
def test_cell(result, expected):
    assert cell(result) == expected


def test_table():
    drafts = {
        "as trained": {"eagle": LOGITS, "vllm": GOOD},
        "other taps": {
            "eagle": {"refused": "eagle: it taps others"},
            "vllm": GOOD | {"differing": []},
        },
    }
    settings = {"tasks": 10, "max_new": 48, "draft_length": 4, "logit_tasks": 5}
    lines = table(
        {"drafts": drafts, "settings": settings, "date": "2026-11-27T01:02:03Z"}
    ).splitlines()
    assert lines[0] == (
        "10 prompts, at most 48 tokens each, 4 drafted a round, fp32, 2026-11-27; "
        "logits after 5 prompts:"
    )
    assert lines[2:4] == ["| draft | vLLM 0.32.0 | EAGLE ffffffff |", "|---|---|---|"]
    assert lines[4].startswith("| as trained | logits 2.3e-05; 9 of 10")
    assert lines[5].endswith("| not representable |")
    assert lines[7:] == [
        "- as trained, vLLM: prompt 4 parts from ours at token 7 (28, ours 30), by the target.",
        "- other taps, EAGLE: it taps others.",
    ]


def test_put_changes_what_is_between_the_marks_alone():
    """Also where the block was empty: what follows it stays."""
    for old in ("old\n\n", ""):
        page = f"a\n{speed.BEGIN}{old}{speed.END}c\n"
        once = speed.put(page, "table\n")
        assert once == f"a\n{speed.BEGIN}table\n\n{speed.END}c\n"
        assert speed.put(once, "table\n") == once
