"""Ctrl-C, SIGTERM and SIGHUP: one line, what goes on, and a second Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle3fn.base.cores import local_ranks
from eagle3fn.base.errors import UserError
from eagle3fn.base.program import called_as, exit_code
from eagle3fn.base.signals import ENDING, children_spared, received, signals_noted, signals_raised
from eagle3fn.train.memory import memory_of


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C is ignored in what a shell starts in the background, such as these tests."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
)
def test_signal_is_one_line_that_names_what_goes_on(capsys, number, name):
    code = exit_code("eagle3fn extract", lambda: send(number), "call again: eagle3fn extract")
    assert code == 128 + number
    assert capsys.readouterr().err == (
        f"eagle3fn extract: stopped by {name}; call again: eagle3fn extract\n"
    )


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    exit_code("x", lambda: send(signal.SIGINT))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert received() is None


def test_signal_that_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code("x", lambda: send(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_noted_signal_does_not_interrupt_and_its_name_is_kept():
    with signals_raised():
        with signals_noted() as stop_requested:
            assert not stop_requested()
            send(signal.SIGTERM)
            assert stop_requested()
        assert received() == signal.SIGTERM
    assert received() is None


def test_second_sigterm_changes_nothing():
    with signals_noted() as stop_requested:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop_requested()


def test_no_signal_is_noted_outside_the_main_thread():
    found = []

    def look() -> None:
        with signals_noted() as stop_requested:
            found.append(stop_requested())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False]


STUBBORN = """
import time
from eagle3fn.base.program import exit_code
from eagle3fn.base.signals import signals_noted
def run():
    with signals_noted():
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
exit_code("x", run)
"""


@pytest.mark.parametrize("before", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_second_ctrl_c_ends_at_once(before):
    """A Ctrl-C after a SIGTERM is the first one."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    for number in before:
        process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "stopped at once by a second Ctrl-C"


def test_children_do_not_get_a_terminals_ctrl_c():
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with children_spared():
        inside = subprocess.check_output([sys.executable, "-c", program], text=True)
    outside = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert (inside.strip(), outside.strip()) == ("True", "False")


def test_command_is_called_again_as_it_was(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert called_as(["train", "--out", "my run"]) == "eagle3fn train --out 'my run'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert called_as(["train"]) == "torchrun --nproc-per-node 4 -m eagle3fn.cli train"


@pytest.mark.parametrize("value", ["", "abc", "0", "-3", "1.5", "²", "9" * 5000])
def test_a_number_of_ranks_that_is_none_is_one(monkeypatch, value):
    """`WORLD_SIZE=` in the environment, as a script leaves it."""
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert called_as(["train"]) == "eagle3fn train"
    assert local_ranks() == 1
    assert memory_of("cpu") > 0


# Output


LOUD = """
import sys
from eagle3fn.base.program import exit_code
def run():
    for number in range(20000):
        print("line", number, "of many that nobody reads", flush=number % 7 == 0)
    print("error text", file=sys.stderr)
    open(sys.argv[1], "w").write("finished")
sys.exit(exit_code("x", run))
"""


def test_output_that_nobody_reads_does_not_end_a_program(tmp_path: Path):
    """`eagle3fn train … | head -n 1`."""
    done = tmp_path / "done"
    command = f'{sys.executable} -c "$0" {done} 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}'
    printed = subprocess.check_output(["bash", "-c", command, LOUD], text=True)
    assert printed == "line 0 of many that nobody reads\n0\n"
    assert done.read_text() == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_the_output_does_not_end_a_program(tmp_path: Path):
    done = tmp_path / "done"
    command = f'{sys.executable} -c "$0" {done} > /dev/full 2>&1'
    assert subprocess.run(["bash", "-c", command, LOUD], check=False).returncode == 0
    assert done.read_text() == "finished"


def test_characters_that_the_output_does_not_have_are_escaped():
    program = """
from eagle3fn.base.errors import UserError
from eagle3fn.base.program import exit_code
def run():
    print("größe")
    raise UserError("größe.json: no such file")
exit_code("x", run)
"""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False
    )
    assert ended.stdout == b"gr\\xf6\\xdfe\n"
    assert ended.stderr == b"x: gr\\xf6\\xdfe.json: no such file\n"


# Memory


def fail_to_allocate() -> None:
    import torch

    torch.empty(2**62, dtype=torch.uint8)


def test_want_of_memory_is_one_line_with_a_remedy(capsys):
    assert exit_code("eagle3fn extract", fail_to_allocate) == 2
    line = capsys.readouterr().err
    assert line.startswith("eagle3fn extract: out of memory (")
    assert line.count("\n") == 1 and "data.micro_batch" in line


def test_other_errors_of_a_library_are_not_hidden():
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_code("x", fail)


def test_user_error_is_code_2(capsys):
    def fail() -> None:
        raise UserError("bad.json: no such file")

    assert exit_code("x", fail) == 2
    assert capsys.readouterr().err == "x: bad.json: no such file\n"


def test_texts_of_files_stay_on_the_one_line(capsys):
    def run() -> int:
        raise UserError("a.json: schema a\nb\x1b[2J\u2028\ud800 is not 1 – write it anew")

    assert exit_code("x", run) == 2
    said = capsys.readouterr().err
    assert said == "x: a.json: schema a\\nb\\x1b[2J\\u2028\\ud800 is not 1 – write it anew\n"
