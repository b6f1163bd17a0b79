"""The page of a report: its parts, its numbers, and that no text of a run can do anything there."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eagle3fn.use import report as report_module
from eagle3fn.use.report import gather, write_report
from eagle3fn.use.report_page import report_page
from tests.use.finished_run import STEP, write_run

VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(NamedTuple):
    """A page that was parsed."""

    tags: Counter[str]
    attributes: list[tuple[str, str]]
    sections: dict[str, str]  # the texts of each by its id, without style
    unclosed: list[str]

    @property
    def text(self) -> str:
        return "".join(self.sections.values())


def parsed(html: str) -> Page:
    tags: Counter[str] = Counter()
    attributes = []
    sections = {"": ""}
    open_tags: list[str] = []
    inside = [""]

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            tags[tag] += 1
            attributes.extend((name, value or "") for name, value in attrs)
            if tag == "section":
                inside[0] = dict(attrs)["id"]
                sections[inside[0]] = ""
            if tag not in VOID:
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            tags[tag] += 1
            attributes.extend((name, value or "") for name, value in attrs)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag
            if tag == "section":
                inside[0] = ""

        def handle_data(self, data: str) -> None:
            if open_tags[-1:] != ["style"]:
                sections[inside[0]] += data

    reader = Reader()
    reader.feed(html)
    reader.close()
    return Page(tags, attributes, sections, open_tags)


def page_of(folder: Path, files: dict[str, Any] | None = None) -> Page:
    """The page of a run with these files."""
    write_run(folder, files)
    write_report(folder)
    return parsed((folder / "report.html").read_text())


ROUND = {
    "drafted": [5, 6],
    "drafted_text": [" world", " wide"],
    "accepted": 1,
    "emitted": [5, 7],
    "emitted_text": [" world", " web"],
}
EXAMPLE = {
    "prompt": "Say hello",
    "first": [4],
    "first_text": ["hello"],
    "rounds": [ROUND],
    "left_out": 3,
}
COSTS = {
    "context": 90,
    "verify_seconds": [0.05, 0.051, 0.052],
    "first_draft_seconds": 0.004,
    "next_draft_seconds": 0.003,
    "predicted_seconds_per_token": [0.0367, 0.0421],
}
GROUP = {"prompts": 2, "tokens": 40, "verifications": 25, "accepted_length": 1.52}
FULL_ROW = {
    "loss": 2.5,
    "grad_norm": 1.5,
    "learning_rate": 1e-4,
    "accepted_length": 1.125,
    "accuracy": [0.5, 0.25],
    "conditional_accuracy": [0.5, 0.75],
    "counted": 0.875,
    "rows": 40,
}
WHOLE: dict[str, Any] = {
    "evaluation.json": {
        "draft_length": 2,
        "accepted_length": 1.625,
        "acceptance_by_position": [0.5, 0.25],
        "tasks": 10,
        "lossless": True,
        "speed_dtype": "float32",
        "threads": 2,
        "speed_tasks": 4,
        "speed_draft_length": 2,
        "speed_accepted_length": 1.4,
        "plain_tokens_per_s": 20.0,
        "tokens_per_s": 25.0,
        "speedup": 1.25,
        "timed_tokens": 512,
        "differing_tokens": 0,
        "break_even_accepted_length": 1.18,
        "costs": COSTS,
        "by_category": {"code": GROUP, "chat": GROUP | {"accepted_length": 1.25}},
        "examples": [EXAMPLE],
    },
    "stages.json": {"extract": 12.5, "train": 37.5},
    "settings.json": {"minutes": 10},
    "train/metrics.jsonl": [STEP | FULL_ROW | {"step": n} for n in (1, 2)],
    "train/eval.jsonl": [{"step": 0} | FULL_ROW, {"step": 2} | FULL_ROW],
}
CONFIG = """
[draft]
draft_vocab_size = 96
vocab_size = 128
norm_output = true
[optimizer]
learning_rate = 0.001
beta1 = 0.9
decay_roles = ["attention", "matrix", "norm", "embedding", "head", "bias"]
"""
PARTS = ["summary", "training", "acceptance", "examples", "costs", "data", "settings"]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run that has everything a page shows."""
    write_run(tmp_path, WHOLE)
    (tmp_path / "train/config.toml").write_text(CONFIG)
    return tmp_path


def whole_page(whole: Path) -> Page:
    write_report(whole)
    return parsed((whole / "report.html").read_text())


def test_a_page_has_every_part_and_is_well_formed(whole):
    page = whole_page(whole)
    assert [name for name in page.sections if name] == PARTS
    assert not page.unclosed
    links = [value for name, value in page.attributes if name == "href"]
    assert links == [f"#{name}" for name in PARTS]
    assert page.tags["h1"] == page.tags["title"] == page.tags["main"] == 1
    assert page.tags["h2"] == len(PARTS)
    assert page.tags["svg"] == page.tags["figcaption"] == 8
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == 9 and all(labels)  # the charts, and the links to the parts
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)


def test_a_page_loads_and_runs_nothing(whole):
    page = whole_page(whole)
    html = (whole / "report.html").read_text()
    assert not re.search(r"https?:|//|url\(|@import|javascript:", html)
    assert not set(page.tags) & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_numbers_of_a_page_are_those_of_the_json(whole):
    page = whole_page(whole)
    report = json.loads((whole / "report.json").read_text())
    shown = {
        "summary": [f"{report['speedup']:.2f}×", "yes", f"{report['accepted_length']:.3f}"],
        "training": ["training 2.5", "held-out 1.125", "learning rate 0.0001", "60 tokens"],
        "acceptance": ["with all before 0.125", "by itself 0.25", "1.520", "1.250"],
        "costs": ["50.00 ms", "predicted of the costs 1.362", "break-even 1.18", "measured 1.25"],
        "data": [f"{report['supervised_tokens']}", "60, those of each epoch", "96 of the target's"],
        "settings": ["optimizer.learning_rate", "12.5", "minutes", report["revision"]],
    }
    for part, texts in shown.items():
        for text in texts:
            assert text in page.sections[part], (part, text)
    assert report["changed"] == {
        "draft.norm_output": {"value": True, "default": False},
        "optimizer.learning_rate": {"value": 0.001, "default": 0.0001},
    }
    assert "beta1" not in page.sections["settings"]


def test_rounds_are_shown_with_what_was_rejected(whole):
    page = whole_page(whole)
    html = (whole / "report.html").read_text()
    assert (
        '<span class="own">hello</span><span class="round" title="round 1: 1 of 2 accepted; '
        'rejected:  wide"><span class="accepted"> world</span><del> wide</del>'
        '<span class="own"> web</span></span>'
    ) in html
    assert "2 tokens in 1 rounds, accepted length 2.00" in page.sections["examples"]
    assert "… 3 more tokens" in page.sections["examples"]
    assert "examples" not in json.loads((whole / "report.json").read_text())


def test_what_comes_after_an_end_token_is_not_called_rejected(tmp_path):
    """Both drafted tokens were right, and the first of them ended the answer."""
    ended = ROUND | {"accepted": 2, "emitted": [5], "emitted_text": [" world"]}
    evaluation = WHOLE["evaluation.json"] | {"examples": [EXAMPLE | {"rounds": [ended]}]}
    page = page_of(tmp_path, {"evaluation.json": evaluation})
    assert page.tags["del"] == 1  # the label of the switch
    assert "1 of 2" in page.sections["examples"]


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J\u202e{{ 7 * 7 }}"


def test_texts_of_a_run_can_do_nothing(tmp_path):
    tokens = {"drafted_text": [EVIL, EVIL], "emitted_text": [EVIL, EVIL]}
    example = {"prompt": EVIL, "first_text": [EVIL], "rounds": [ROUND | tokens]}
    evaluation = WHOLE["evaluation.json"] | {
        "prompts": EVIL,
        "device": EVIL,
        "engine": EVIL,
        "engine_version": EVIL,
        "by_category": {EVIL: GROUP, "b": GROUP},
        "examples": [EXAMPLE | example],
    }
    files = {
        "evaluation.json": evaluation,
        "settings.json": {EVIL: EVIL, "deep": {EVIL: [EVIL]}},
        "stages.json": {EVIL: 1.0},
        "train/from.json": {"named": EVIL, "run": EVIL, "step": 1, "changes": [EVIL]},
    }
    write_run(tmp_path, files)
    (tmp_path / "train/config.toml").write_text('[train]\ninit = "<script>alert(2)</script>"\n')
    page = whole_page(tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("onerror", "src")]
    html = (tmp_path / "report.html").read_text()
    assert not {"\x1b", "\u202e"} & set(html)
    assert "49" not in page.sections["examples"]
    assert page.text.count("<script>alert(1)</script>") > 5
    assert "<script>alert(2)</script>" in page.sections["settings"]


def test_halves_of_surrogate_pairs_are_written_out(tmp_path):
    """No file of a run may hold one; a page of numbers that come from elsewhere can be written."""
    write_run(tmp_path, WHOLE)
    run = gather(tmp_path)
    examples = [EXAMPLE | {"prompt": "a\ud800b\x00\n\tc"}]
    html = report_page(run.numbers | {"target": "\udfff"}, run.rows, examples)
    assert "a\\ud800b\\x00\n\tc" in html and "\\udfff" in html
    html.encode()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"examples": None}, "made by a version that kept no rounds"),
        ({"examples": None, "engine": "vllm", "engine_version": "1"}, "does not report its rounds"),
    ],
)
def test_an_evaluation_without_rounds_says_how_to_get_them(tmp_path, changes, text):
    evaluation = WHOLE["evaluation.json"] | changes
    evaluation = {name: value for name, value in evaluation.items() if value is not None}
    page = page_of(tmp_path, {"evaluation.json": evaluation})
    assert text in page.sections["examples"]


def test_a_training_alone_has_a_page_that_says_what_is_missing(tmp_path):
    rows = [json.dumps(STEP) + "\n"]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    write_report(tmp_path)
    page = parsed((tmp_path / "report.html").read_text())
    assert [name for name in page.sections if name] == PARTS
    assert "Not evaluated yet" in page.sections["summary"]
    assert "was not evaluated yet" in page.sections["examples"]
    assert "no rates by position" in page.sections["acceptance"]
    assert "Costs are measured by eagle3fn evaluate" in page.sections["costs"]
    assert "RUN/features" in page.sections["data"]
    assert "no config.toml" in page.sections["settings"]
    assert "trained to step 1, report" in page.sections[""]


@pytest.mark.parametrize(
    ("planned", "text"),
    [(1, "to step 1 of 1, report"), (40, "to step 1 of 40 (under way, or ended early), report")],
)
def test_a_page_says_how_far_the_training_is(tmp_path, planned, text):
    page = page_of(tmp_path, {"train/horizon.json": {"steps": planned}})
    assert text in " ".join(page.sections[""].split())


def test_the_folder_of_the_training_finds_the_evaluation_next_to_it(whole):
    """`--run RUN/train` is what `--run RUN` is; its files are written where it says."""
    of_run = write_report(whole)
    of_training = write_report(whole / "train")
    assert of_training == of_run
    assert of_run["run"] == whole.name
    assert (whole / "train/report.html").read_text() == (whole / "report.html").read_text()


def test_a_break_even_length_that_is_noise_is_not_drawn(tmp_path):
    evaluation = WHOLE["evaluation.json"] | {"break_even_accepted_length": 0.99}
    page = page_of(tmp_path, {"evaluation.json": evaluation})
    assert "break-even 0.99" not in page.text
    assert "noise of the timing" in page.sections["summary"]


def test_rows_of_another_run_are_drawn_and_marked(tmp_path):
    branch = {"named": "/old", "run": "old", "step": 1, "changes": []}
    page = page_of(tmp_path, WHOLE | {"train/from.json": branch})
    assert page.sections["training"].count("until here the other run") == 4
    assert "step 1, 30 tokens" in page.sections["training"]


def test_long_runs_are_drawn_as_means_and_a_skipped_update_as_a_gap(tmp_path):
    steps = [STEP | {"step": n, "loss": float(n % 2)} for n in range(1, 1001)]
    for row in steps[500:510]:
        row["loss"] = None
    page = page_of(tmp_path, {"train/metrics.jsonl": steps})
    text = page.sections["training"]
    assert "training, mean of 10 steps" in text
    assert "step 10, 300 tokens · training, mean of 10 steps 0.5" in text
    html = (tmp_path / "report.html").read_text()
    loss = html[html.index("Loss</figcaption>") :].split("</svg>")[0]
    assert loss.count('class="line s0"') == 2


def test_samples_are_counted_by_length(tmp_path):
    import numpy as np

    from eagle3fn.use.report_files import length_counts

    lengths = np.array([1, 1, 5, 6, 100])
    counts = length_counts(lengths)
    assert sum(each["samples"] for each in counts) == 5
    assert counts[0] == {"from": 1, "to": 5, "samples": 3}
    assert counts[1] == {"from": 6, "to": 10, "samples": 1}
    assert counts[-1] == {"from": 96, "to": 100, "samples": 1}


def test_an_installed_package_has_the_template():
    """It lies next to the module, and the project's file names it for a wheel."""
    assert (Path(report_module.__file__).parent / "report.html.jinja").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["eagle3fn"]
    assert any(Path("use/report.html.jinja").match(pattern) for pattern in patterns)


@pytest.mark.parametrize(
    "costs",
    [
        3,
        COSTS | {"verify_seconds": [0.05]},
        COSTS | {"verify_seconds": [0.0, 0.1, 0.1]},
        COSTS | {"predicted_seconds_per_token": [0.0, 0.1]},
        COSTS | {"context": "x"},
        {name: value for name, value in COSTS.items() if name != "next_draft_seconds"},
    ],
)
def test_damaged_costs_are_named(tmp_path, costs):
    write_run(tmp_path, {"evaluation.json": WHOLE["evaluation.json"] | {"costs": costs}})
    with pytest.raises(ValueError, match=r"evaluation\.json: costs is no value that evaluate"):
        write_report(tmp_path)


# In a browser

NAMES = ("chromium", "google-chrome", "chrome", "chromium-browser", "chromium-headless-shell")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
PROBE = """<script>
window.onload = () => {
  const sizes = [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect());
  const title = document.documentElement;
  title.dataset.charts = sizes.filter(size => size.width > 200 && size.height > 100).length;
  title.dataset.overflow = title.scrollWidth - title.clientWidth;
};
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium; name it by CHROMIUM=/path/to/it")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_draws_the_page(whole, width):
    """Every chart has a size, nothing is wider than the window, and no error is logged."""
    write_report(whole)
    html = (whole / "report.html").read_text()
    policy = re.search('<meta http-equiv="Content-Security-Policy".*', html)
    assert policy

    # The page itself runs nothing, so what measures it goes into a copy without its policy.
    probed = whole / "probed.html"
    probed.write_text(html.replace(policy.group(), "").replace("</body>", PROBE))
    for path in (whole / "report.html", probed):
        dom, log = in_browser(path, width)
        assert "CONSOLE" not in log
    assert 'data-charts="8"' in dom
    assert 'data-overflow="0"' in dom


def in_browser(page: Path, width: int) -> tuple[str, str]:
    """The page's tree after it was drawn, and what the browser logged."""
    done = subprocess.run(
        [
            CHROMIUM or "",
            "--headless",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},900",
            f"--user-data-dir={page.parent / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, done.stderr
