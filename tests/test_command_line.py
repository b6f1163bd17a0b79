"""The command line as a user meets it: help, mistakes, JSON, completion, a terminal."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from eagle3fn.base.output import has_colours
from eagle3fn.cli import COMMANDS, main, parser
from eagle3fn.commands.grammar import GROUPS, STAGES, Command, Option, parsers_of

ROOT = Path(__file__).parents[1]
EACH = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "eagle3fn.cli", *arguments]


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on stderr after a mistake in the arguments."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


# Help


def test_without_a_command_the_help_lists_all_by_the_order_of_work(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    listed = re.findall(r"^(?:  (\w+)  +(.*)|([\w ]+):)$", printed.out, re.M)
    expected = []
    for stage in STAGES:
        expected.append(("", "", stage))
        for command in COMMANDS:
            if command.stage == stage:
                expected.append((command.name, command.about, ""))
    assert listed == expected and len(listed) == len(COMMANDS) + len(STAGES)


@EACH
def test_the_example_of_a_command_is_in_its_help_and_parses(command: Command):
    epilog = parsers_of(parser())[command.name].epilog or ""
    assert f"eagle3fn {command.name} {command.example}" in epilog
    words = shlex.split(command.example)
    if ">" in words:
        words = words[: words.index(">")]
    assert parser().parse_args([command.name, *words]).run is command.run


@EACH
def test_groups_of_options_have_one_order_and_defaults_are_said(command: Command):
    sub = parsers_of(parser())[command.name]
    titles = [group.title for group in sub._action_groups if group._group_actions]
    in_order = [title for title in GROUPS if title in titles]
    assert [title for title in titles if title in GROUPS] == in_order
    assert titles[-1] == "other"
    for action in sub._actions:
        if action.default not in (None, [], False, "==SUPPRESS=="):
            assert f"(default: {action.default})" in str(action.help), action.option_strings


def options_of(command: Command) -> dict[str, Option]:
    found = {}
    for one in command.options:
        for each in (one,) if isinstance(one, Option) else one.options:
            found[each.flag] = each
    return found


def test_a_value_of_one_name_is_shown_in_one_way():
    """The same option has the same group wherever it stands, and a value a word in capitals."""
    shared = ("--target", "--device", "--threads", "--out", "--max-length", "--seed", "--dtype")
    for flag in shared:
        groups = {
            options_of(command)[flag].group
            for command in COMMANDS
            if flag in options_of(command) and command.name != "parity"
        }
        assert len(groups) == 1, flag
    for command in COMMANDS:
        for flag, one in options_of(command).items():
            assert one.group in GROUPS, flag
            assert one.metavar is None or one.metavar == one.metavar.upper(), flag


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "program_name", "message"),
    [
        (["trian"], "eagle3fn", "unknown command 'trian'; did you mean train?"),
        (["qqqq"], "eagle3fn", "unknown command 'qqqq';"),
        (["train", "--featurs", "f"], "eagle3fn train", "--featurs; did you mean --features?"),
        (["train", "--featurs=f"], "eagle3fn train", "--featurs; did you mean --features?"),
        (["plan", "--zzz"], "eagle3fn plan", "unknown option --zzz;"),
        (["plan", "word"], "eagle3fn plan", "'word' belongs to no option;"),
        (["--vresion"], "eagle3fn", "unknown option --vresion; did you mean --version?"),
        (["--json"], "eagle3fn", "name a command;"),
        (["--json", "report", "--run", "r"], "eagle3fn", "--json stands after the command;"),
        (["vocab", "--target", "t"], "eagle3fn vocab", "required"),
    ],
)
def test_a_mistake_shows_the_commands_own_usage_and_the_nearest_name(
    capsys, arguments, program_name, message
):
    lines = usage_error(capsys, *arguments)
    if "--json" in arguments:
        (line,) = lines
        assert message in json.loads(line)["error"]
        return
    usage, line = lines
    assert usage.startswith(f"usage: {program_name} ")
    assert line.startswith(f"{program_name}: ") and message in line
    assert line.endswith(f" {program_name} --help lists all")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["report", "--run", ""], "--run"),
        ([*"train --target t --features f --vocab v --out o --from".split(), ""], "--from"),
    ],
)
def test_an_empty_value_is_refused_by_the_options_own_name(capsys, arguments, flag):
    assert main(arguments) == 2
    assert f": {flag}: is empty;" in capsys.readouterr().err


# JSON


def test_a_mistake_and_an_error_are_json_where_that_is_asked_for(tmp_path, capsys):
    (line,) = usage_error(capsys, "plan", "--zzz", "--json")
    assert json.loads(line) == {
        "error": "eagle3fn plan: unknown option --zzz; eagle3fn plan --help lists all",
        "exit_code": 2,
    }
    assert main(["report", "--run", str(tmp_path), "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.err)
    assert printed.out == "" and found["exit_code"] == 2
    assert found["error"].startswith(f"eagle3fn report: {tmp_path}: has no metrics.jsonl")


def test_the_versions_are_one_line(capsys):
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert re.fullmatch(r"eagle3fn [\d.\w]+, torch 2\S+, python 3\.\d+\.\d+\n", text)
    assert main(["--version", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert ", ".join(f"{name} {number}" for name, number in values.items()) == text.strip()


# Completion


def complete(words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last of some words, by the script in a folder."""
    line = " ".join(map(shlex.quote, words))
    commands = f"""
        source eagle3fn.bash
        complete -p eagle3fn
        COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
        _shtab_eagle3fn
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", commands], capture_output=True, text=True, check=True, cwd=folder
    )
    registered, *offered = done.stdout.splitlines()
    assert registered.endswith(" eagle3fn")
    return offered


def test_bash_completes_commands_options_values_and_files(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "eagle3fn.bash").write_text(capsys.readouterr().out)
    (tmp_path / "talks.jsonl").touch()
    assert complete(["eagle3fn", "ex"], tmp_path) == ["extract", "export"]
    assert complete(["eagle3fn", "train", "--feat"], tmp_path) == ["--features"]
    assert complete(["eagle3fn", "extract", "--store", "f"], tmp_path) == ["fp8"]
    assert complete(["eagle3fn", "extract", "--conversations", "ta"], tmp_path) == ["talks.jsonl"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_scripts_too(capsys, shell):
    assert main(["completion", shell, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["shell"] == shell
    assert "eagle3fn" in json.loads(printed.out)["script"]


# A terminal


def in_terminal(command: list[str], **environment: str) -> str:
    """What a program shows on a terminal."""
    main_end, program_end = pty.openpty()
    termios.tcsetwinsize(program_end, (24, 80))
    settings = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), **environment}
    for name in {"NO_COLOR"} - set(environment):
        settings.pop(name, None)
    with subprocess.Popen(
        command, stdin=program_end, stdout=program_end, stderr=program_end, env=settings
    ):
        os.close(program_end)
        shown = b""
        try:
            while found := os.read(main_end, 2**16):
                shown += found
        except OSError:
            pass  # the program has ended
    os.close(main_end)
    return shown.decode()


def test_an_error_is_red_on_a_terminal_alone(tmp_path):
    command = program("report", "--run", str(tmp_path))
    assert "\x1b[31meagle3fn report: " in in_terminal(command)
    assert "\x1b" not in in_terminal(command, NO_COLOR="1")
    piped = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "eagle3fn report: " in piped.stderr and "\x1b" not in piped.stderr + piped.stdout


BARS = """
import sys
import time
from eagle3fn.base import progress
update = progress.bar("row", "counted", rate=sys.argv[1:] == ["rate"])
for done in range(14):
    update(done, 100)
    time.sleep(0.1)
progress.close()
"""


def test_bars_are_drawn_on_a_terminal_alone():
    command = [sys.executable, "-c", BARS]
    shown = in_terminal(command)
    assert "counted:" in shown and "/100 rows [00:01<" in shown and "\r" in shown
    assert "/s" not in shown  # a rate of checks tells a reader nothing
    assert "rows/s]" in in_terminal([*command, "rate"])
    piped = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert piped.stdout + piped.stderr == ""


def test_colours_follow_the_terminal_and_the_environment(monkeypatch):
    class Terminal:
        isatty: Callable[[], bool] = staticmethod(lambda: True)

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colours(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(Terminal())  # type: ignore[arg-type]
