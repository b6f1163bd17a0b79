"""A run's report: its table and its numbers; damaged files are named."""

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import eagle3fn
from eagle3fn.base.errors import UserError
from eagle3fn.use.report import write_report
from eagle3fn.use.report_table import report_table
from tests.use.finished_run import FILES, STEP, write_run


def table_of(folder: Path) -> str:
    """The table of a report that is written now."""
    return report_table(write_report(folder))


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_report_needs_no_stages_and_names_the_draft_length(tmp_path):
    write_run(tmp_path)
    report = write_report(tmp_path)
    table = report_table(report)
    assert report == read_report(tmp_path)
    assert not {"wall_s", "stage_seconds"} & report.keys()
    assert "wall seconds" not in table
    assert table.startswith("accepted length       1.500 at draft length 5\n")
    assert (report["train_tokens_per_s"], report["held_out_accepted_length"]) == (60.0, 1.25)


def test_wall_time_is_the_sum_of_the_stages(tmp_path):
    write_run(tmp_path, {"stages.json": {"train": 1.5, "evaluate": 2.0}})
    assert "wall seconds          4, all stages" in table_of(tmp_path)
    report = read_report(tmp_path)
    assert (report["wall_s"], report["stage_seconds"]) == (3.5, {"train": 1.5, "evaluate": 2.0})


ONE_STEP = {"accuracy": [0.5], "conditional_accuracy": [0.5], "counted": 0.9, "rows": 9}
BRANCH = {"named": "/old", "run": "old", "step": 600, "changes": []}


def test_numbers_of_a_run_that_went_on_elsewhere_are_of_its_own_rows(tmp_path):
    """The other run was better on its own held-out samples, faster, and its loss rose."""
    copied = [
        {"step": n, "loss": 2.0 + n, "tokens": 90, "seconds": 0.1} | ONE_STEP for n in range(1, 601)
    ]
    better = ONE_STEP | {"accuracy": [0.9]}
    files = {
        "train/from.json": BRANCH,
        "train/metrics.jsonl": [*copied, STEP | ONE_STEP | {"step": 601}],
        "train/eval.jsonl": [
            {"step": 0, "accepted_length": 9.5} | better,
            {"step": 599, "accepted_length": 9.0} | better,
            {"step": 600, "accepted_length": 1.5} | ONE_STEP,
            {"step": 601, "accepted_length": 1.25} | ONE_STEP | {"accuracy": [0.4]},
        ],
    }
    write_run(tmp_path, files)
    table = table_of(tmp_path)
    report = read_report(tmp_path)
    assert (report["held_out_accepted_length"], report["accuracy"]) == (1.5, [0.5])
    assert (report["steps"], report["train_tokens_per_s"]) == (601, 60.0)
    assert report["advice"] == [] and "step 600 of the run old" in table


def test_run_that_went_on_elsewhere_and_made_no_update_has_a_report(tmp_path):
    files = {"train/from.json": BRANCH | {"step": 1}, "train/eval.jsonl": [{"step": 1}]}
    write_run(tmp_path, files)
    assert "1 steps, unknown tokens/s" in table_of(tmp_path)
    assert "accuracy" not in read_report(tmp_path)


SPEED = {
    "tasks": 10,
    "lossless": True,
    "speed_dtype": "float32",
    "threads": 2,
    "device": "cpu",
    "speed_tasks": 4,
    "speed_draft_length": 2,
    "speed_accepted_length": 1.4,
    "plain_tokens_per_s": 20.0,
    "tokens_per_s": 25.0,
    "speedup": 1.25,
    "timed_tokens": 512,
    "differing_tokens": 0,
    "break_even_accepted_length": 1.2,
}


def test_table_first_says_whether_it_is_faster_and_the_text_the_same(tmp_path):
    write_run(tmp_path, {"evaluation.json": FILES["evaluation.json"] | SPEED})
    assert table_of(tmp_path).splitlines()[:4] == [
        "faster                yes: 1.25 times as fast, 25.0 tokens/s against 20.0 without the "
        "draft (float32, 2 threads, 4 prompts)",
        "same text             yes, token for token (float32, 10 prompts)",
        "accepted length       1.500 at draft length 5",
        "  when timed          1.400 at draft length 2, the fastest; "
        "faster than plain from 1.20 on",
    ]


@pytest.mark.parametrize(("length", "known"), [(1.0, True), (0.99, False)])
def test_a_break_even_length_below_one_is_called_noise(tmp_path, length, known):
    """A round emits a token at least."""
    speed = SPEED | {"break_even_accepted_length": length}
    write_run(tmp_path, {"evaluation.json": FILES["evaluation.json"] | speed})
    table = table_of(tmp_path)
    assert ("faster than plain from 1.00 on" in table) == known
    assert ("noise of the timing; time it again" in table) == (not known)
    assert "0.99" not in table


def write_training(folder: Path, within: str = "") -> None:
    """What `train --out` leaves that a report reads, and nothing else."""
    (folder / within).mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "eval.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in FILES[f"train/{name}"])
        (folder / within / name).write_text(text)


@pytest.mark.parametrize("within", ["", "train"], ids=["train --out", "demo"])
def test_a_training_alone_is_reported(tmp_path, within):
    """Of the folder of `train --out`, or the one that has it as `train/`."""
    write_training(tmp_path, within)
    assert table_of(tmp_path).splitlines() == [
        "accepted length       not known: run eagle3fn evaluate with --out RUN/evaluation.json, "
        "then report again",
        "  held-out, simulated 1.250",
        "training              1 steps, 60 tokens/s",
    ]
    report = read_report(tmp_path)
    assert (report["steps"], report["supervised_tokens"]) == (1, None)
    assert "accepted_length" not in report
    assert (tmp_path / "report.html").stat().st_size

    # An evaluation beside it is read.
    (tmp_path / "evaluation.json").write_text(json.dumps(FILES["evaluation.json"]))
    assert table_of(tmp_path).startswith("accepted length       1.500 at draft length 5\n")


def test_a_training_that_has_not_evaluated_yet_is_reported(tmp_path):
    write_training(tmp_path)
    (tmp_path / "eval.jsonl").unlink()
    assert table_of(tmp_path).splitlines()[1:] == ["training              1 steps, 60 tokens/s"]


def test_features_without_their_index_are_refused(tmp_path):
    write_run(tmp_path)
    (tmp_path / "features/index.json").unlink()
    with pytest.raises(UserError, match=r"features/index\.json: no such file"):
        write_report(tmp_path)


def test_a_folder_without_a_training_is_refused(tmp_path):
    with pytest.raises(UserError, match="nor has its train/; name the folder of eagle3fn train"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("start", "said"), [("DRAFT", True), ("random", False)])
def test_a_draft_that_became_worse_than_its_start_is_said(tmp_path, start, said):
    lengths = [{"step": step, "accepted_length": 1.6 - step / 10} for step in (0, 1)]
    write_run(tmp_path, {"train/eval.jsonl": lengths})
    (tmp_path / "train/config.toml").write_text(f'[train]\ninit = "{start}"\n')
    assert ("and it was 1.600 before the first, of the draft" in table_of(tmp_path)) == said


GROUP = {"prompts": 2, "tokens": 40, "verifications": 25, "accepted_length": 1.52}


def test_table_ends_with_the_groups(tmp_path):
    groups = {"by_category": {"code": GROUP, "chat": GROUP}, "by_prompt_length": {"1-64": GROUP}}
    write_run(tmp_path, {"evaluation.json": FILES["evaluation.json"] | groups})
    assert table_of(tmp_path).splitlines()[-3:] == [
        "category                 accepted  prompts verified   tokens",
        "code                        1.520        2       25       40",
        "chat                        1.520        2       25       40",
    ]
    assert read_report(tmp_path)["by_category"] == groups["by_category"]


def test_sampled_answers_are_described(tmp_path):
    sampled = {"lossless": None, "lossless_note": "sampled (temperature 1), by …", "tasks": 3}
    write_run(tmp_path, {"evaluation.json": FILES["evaluation.json"] | sampled})
    assert table_of(tmp_path).startswith("same text             sampled (temperature 1), by …\n")


@pytest.mark.parametrize(
    "groups",
    [[], {"a": 3}, {"a": {**GROUP, "prompts": -1}}, {"a": {"prompts": 1}}],
    ids=["list", "number", "negative", "incomplete"],
)
def test_damaged_groups_are_named(tmp_path, groups):
    write_run(tmp_path, {"evaluation.json": FILES["evaluation.json"] | {"by_category": groups}})
    with pytest.raises(UserError, match="by_category is no value that evaluate writes"):
        write_report(tmp_path)


def test_table_says_no_where_it_is_slower_or_not_the_same(tmp_path):
    changes = {
        "speedup": 0.8,
        "tokens_per_s": 16.0,
        "lossless": False,
        "speed_dtype": "bfloat16",
        "threads": 1,
        "differing_tokens": 3,
    }
    write_run(tmp_path, {"evaluation.json": FILES["evaluation.json"] | SPEED | changes})
    assert table_of(tmp_path).splitlines()[:2] == [
        "faster                no: 0.80 times as fast, 16.0 tokens/s against 20.0 without the "
        "draft (bfloat16, 1 thread, 4 prompts)",
        "same text             NO (float32, 10 prompts); in bfloat16, where a block rounds "
        "otherwise, 3 of 512 differ",
    ]


FULL_EVALUATION = FILES["evaluation.json"] | SPEED


@pytest.mark.parametrize("extra", [{}, {"loss": 3.5}], ids=["without loss", "with loss"])
def test_held_out_length_is_the_best_after_training(tmp_path, extra):
    """Rows with and without a loss are read; the untrained draft's row does not count."""
    rows = [{"step": step, "accepted_length": length} for step, length in ((0, 2.0), (1, 1.5))]
    rows = [{**row, **extra} for row in rows]
    rows += [{"step": 2}, {"step": 3, "accepted_length": None}]
    write_run(tmp_path, {"train/eval.jsonl": rows})
    write_report(tmp_path)
    assert read_report(tmp_path)["held_out_accepted_length"] == 1.5


def test_report_without_installed_metadata(tmp_path, monkeypatch):
    original = metadata.version

    def missing(name: str) -> str:
        if name == "eagle3fn":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", missing)
    write_run(tmp_path)
    write_report(tmp_path)
    assert read_report(tmp_path)["versions"]["eagle3fn"] == eagle3fn.__version__


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluation.json", [1]),
        ("evaluation.json", {"draft_length": 5}),
        *(
            ("evaluation.json", FULL_EVALUATION | {name: value})
            for name in FULL_EVALUATION
            for value in ({}, "\x1b[2J" if FULL_EVALUATION[name] is True else [None])
        ),
        ("evaluation.json", FULL_EVALUATION | {"speedup": 1e300}),
        ("evaluation.json", FULL_EVALUATION | {"speedup": -1.0}),
        ("evaluation.json", FULL_EVALUATION | {"accepted_length": -1.0}),
        ("evaluation.json", FULL_EVALUATION | {"acceptance_by_position": [0.5] * 1001}),
        ("evaluation.json", FILES["evaluation.json"] | {"wall_s": "w"}),
        ("evaluation.json", FULL_EVALUATION | {"lossless": None}),
        *(
            (
                "evaluation.json",
                {key: FULL_EVALUATION[key] for key in FULL_EVALUATION if key != name},
            )
            for name in ("tokens_per_s", "speed_tasks", "tasks", "timed_tokens", "accepted_length")
        ),
        ("evaluation.json", FILES["evaluation.json"] | {"acceptance_by_position": 3}),
        ("evaluation.json", FILES["evaluation.json"] | {"prompts": 3}),
        ("stages.json", [1]),
        ("stages.json", {"train": "long"}),
        ("settings.json", 3),
        ("features/index.json", [1]),
        ("features/index.json", {"totals": {}}),
        ("features/index.json", {"totals": {"supervised": -1}}),
        ("stages.json", {"train": -1}),
        ("train/metrics.jsonl", []),
    ],
)
def test_damaged_files_are_named(tmp_path, name, value):
    write_run(tmp_path, {name: value})
    with pytest.raises(UserError, match=rf"{name.replace('.', '[.]')}: ") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["settings.json", "stages.json"])
def test_a_link_that_leads_nowhere_is_not_as_if_the_file_were_missing(tmp_path, name):
    write_run(tmp_path, {})
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name}: no such file"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("metrics", 3, "no object"),
        ("metrics", {"step": 2}, "no number under tokens"),
        ("metrics", STEP | {"loss": "2"}, "no number under loss"),
        ("metrics", STEP | {"seconds": -1}, "no number under seconds"),
        ("metrics", STEP | {"tokens": 1e300}, "no number under tokens"),
        ("metrics", STEP | {"step": 1.5}, "no number under step"),
        ("metrics", STEP | {"loss": math.nan}, "not JSON .NaN is no number"),
        ("metrics", STEP | {"learning_rate": "1"}, "no number under learning_rate"),
        ("metrics", STEP | {"accepted_length": []}, "no number under accepted_length"),
        ("eval", {"step": 1, "loss": "3"}, "no number under loss"),
        ("eval", {"accepted_length": 1.5}, "no number under step"),
        ("eval", {"step": 1, "accepted_length": [1]}, "no number under accepted_length"),
        ("eval", [], "no object"),
    ],
)
def test_damaged_rows_are_named(tmp_path, name, row, reason):
    name = f"train/{name}.jsonl"
    write_run(tmp_path, {name: [*FILES[name], row, *FILES[name]]})
    with pytest.raises(UserError, match=rf"{name}:2: {reason}.*; mend or delete the row"):
        write_report(tmp_path)


def test_a_report_of_a_training_under_way_leaves_out_a_row_that_is_not_whole(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "train/metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({**STEP, "step": 2}) + "\n" + json.dumps({**STEP, "step": 3})[:-9])
    write_report(tmp_path)
    assert read_report(tmp_path)["steps"] == 2


def test_steps_too_short_to_time_have_no_rate(tmp_path):
    write_run(tmp_path, {"train/metrics.jsonl": [{**STEP, "seconds": 0.0}]})
    assert "training              1 steps, unknown tokens/s" in table_of(tmp_path)
    assert read_report(tmp_path)["train_tokens_per_s"] is None


def test_what_a_file_says_is_shown_without_control_codes(tmp_path):
    evil = {"engine_version": "1\n\x1b[2J", "prompts": "a\nb"}
    write_run(tmp_path, {"evaluation.json": ENGINE | evil})
    assert "llamacpp 1\\n\\x1b[2J, 3 prompts" in table_of(tmp_path)


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_places_are_checked_before_anything_is_read(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: is a folder; name a file"):
        write_report(tmp_path)


def test_what_a_killed_report_left_is_removed(tmp_path):
    write_run(tmp_path)
    (tmp_path / ".report.html.abcdefgh.tmp").mkdir()
    write_report(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


ENGINE = {
    **FILES["evaluation.json"],
    "engine": "llamacpp",
    "engine_version": "2030.1",
    "tasks": 3,
    "acceptance_by_position": None,  # it does not count drafted tokens by position
    "engine_accepted_length": 1.625,
    "lossless": True,
    "speed_dtype": "bfloat16",
    "speed_tasks": 3,
    "speedup": 1.5,
    "tokens_per_s": 15.0,
    "plain_tokens_per_s": 10.0,
    "timed_tokens": 30,
    "differing_tokens": 0,
}


def test_an_engine_is_named_with_its_own_accepted_length(tmp_path):
    write_run(tmp_path, {"evaluation.json": ENGINE})
    table = table_of(tmp_path)
    assert "without the draft (bfloat16, llamacpp 2030.1, 3 prompts)" in table
    assert "same text             yes, token for token (bfloat16, 3 prompts)\n" in table
    assert "accepted length       1.500 at draft length 5\n" in table
    assert "\n  engine's own        1.625\n" in table


def test_what_an_engine_does_not_give_is_said(tmp_path):
    unknown = {"accepted_length": None, "engine_accepted_length": None, "speed_dtype": None}
    sampled = {"lossless": None, "lossless_note": "sampled: not compared token by token"}
    write_run(tmp_path, {"evaluation.json": ENGINE | unknown | sampled})
    table = table_of(tmp_path)
    assert "same text             sampled: not compared token by token\n" in table
    assert "accepted length       unknown at draft length 5\n" in table
    assert "(as its file has it, llamacpp 2030.1, 3 prompts)" in table


def test_acceptance_by_position_is_missed_without_an_engine(tmp_path):
    without = {key: value for key, value in ENGINE.items() if key != "engine"}
    write_run(tmp_path, {"evaluation.json": without})
    with pytest.raises(UserError, match="acceptance_by_position is missing"):
        write_report(tmp_path)


RATES = {
    "accuracy": [0.5, 0.25],
    "conditional_accuracy": [0.5, 0.75],
    "counted": 0.7,
    "rows": 40,
}


def test_table_has_both_accuracies_and_the_share_of_the_best_held_out_row(tmp_path):
    best = {"step": 1, "accepted_length": 1.5, **RATES}
    later = {"step": 2, "accepted_length": 1.4, **RATES, "accuracy": [0.1, 0.1]}
    write_run(tmp_path, {"train/eval.jsonl": [best, later]})
    lines = table_of(tmp_path).splitlines()
    assert "  accuracy            0.500 0.250, of all held-out rows" in lines
    assert "  conditional         0.500 0.750, given all before" in lines
    assert "rows counted          70.0% of held-out rows" in lines
    (advice,) = [line for line in lines if line.startswith("advice")]
    assert advice.startswith("advice                70% of the trained rows count")
    report = read_report(tmp_path)
    assert {name: report[name] for name in RATES if name != "rows"} == {
        name: value for name, value in RATES.items() if name != "rows"
    }
    assert len(report["advice"]) == 1


def test_without_held_out_rows_the_rates_are_the_last_updates(tmp_path):
    write_run(
        tmp_path,
        {
            "train/metrics.jsonl": [{**STEP, **RATES, "counted": 0.9}],
            "train/eval.jsonl": [{"step": 1}],
        },
    )
    table = table_of(tmp_path)
    assert "rows counted          90.0% of the last update's rows" in table
    assert "advice  " not in table and "best" not in table


@pytest.mark.parametrize("name", RATES)
def test_rates_that_are_none_are_refused_by_row(tmp_path, name):
    row = {"step": 1, "accepted_length": 1.5, **RATES, name: "x"}
    write_run(tmp_path, {"train/eval.jsonl": [row]})
    with pytest.raises(UserError, match=f"eval.jsonl:1: no number under {name}"):
        write_report(tmp_path)


COSTS = {
    "context": 64,
    "first_draft_seconds": 0.1,
    "next_draft_seconds": 0.1,
    "verify_seconds": [0.1, 0.2],
    "predicted_seconds_per_token": [0.1],
}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rates_of": "held-out rows"}, "rates_of"),
        ({"changed": 3}, "changed"),
        ({"stage_seconds": {"train": "long"}}, "stage_seconds"),
        ({"acceptance_by_position": [1e15] * 100}, "acceptance_by_position"),
        ({"costs": COSTS, "expected_acceptance_by_position": "x"}, "expected_acceptance_by_"),
        ({"costs": COSTS | {"predicted_seconds_per_token": [5e-324]}}, "costs"),
        ({"costs": COSTS, "acceptance_by_position": None, "engine": "e"}, "engine_version"),
    ],
)
def test_an_evaluation_that_no_page_can_show_is_refused_and_nothing_written(
    tmp_path, changes, name
):
    write_run(tmp_path, {"evaluation.json": FULL_EVALUATION | changes})
    with pytest.raises(UserError, match=f"evaluation.json: {name}"):
        write_report(tmp_path)
    assert not list(tmp_path.glob("report.*"))


def test_numbers_that_json_has_not_are_null(tmp_path):
    write_run(tmp_path)
    (tmp_path / "train/config.toml").write_text("[optimizer]\nlearning_rate = nan\n")
    write_report(tmp_path)
    assert "NaN" not in (tmp_path / "report.json").read_text()
    assert read_report(tmp_path)["changed"]["optimizer.learning_rate"]["value"] is None


def test_losses_that_differ_by_the_least_number_have_a_chart(tmp_path):
    rows = [STEP | {"step": 1, "loss": 0.0}, STEP | {"step": 2, "loss": 5e-324}]
    write_run(tmp_path, {"train/metrics.jsonl": rows})
    assert write_report(tmp_path)["steps"] == 2


def test_rates_of_different_lengths_are_refused_by_row(tmp_path):
    row = {"step": 1, "accepted_length": 1.5, **RATES, "accuracy": []}
    write_run(tmp_path, {"train/eval.jsonl": [row]})
    with pytest.raises(
        UserError, match=r"eval\.jsonl:1: accuracy and conditional_accuracy of diff"
    ):
        write_report(tmp_path)


def test_the_page_of_many_evaluations_stays_small(tmp_path):
    rows = [{"step": step, "accepted_length": 1.5, "loss": 2.0} for step in range(5000)]
    write_run(tmp_path, {"train/eval.jsonl": rows})
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 200_000 and "held-out, mean of 50 evaluations" in page
