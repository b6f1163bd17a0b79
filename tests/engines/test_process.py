"""A program of another environment: what it answers, and every way in which it can end."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.engines import process
from eagle3fn.engines.process import EngineProcess, engine_version, scratch
from tests.waiting import await_that

PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, {programs!r})
from answering import serve

def start(settings):
    print("the engine talks")
    if settings.get("start"):
        exec(settings["start"])
    return {{"version": "1.2.3"}}, lambda request: eval(request["value"])

if __name__ == "__main__":
    serve(start)
"""


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts the program with settings; ends it with the test."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(programs=str(process.PROGRAMS)))
    monkeypatch.setattr(process, "PROGRAMS", tmp_path)
    begun = []

    def started(start: str = "", python: str = sys.executable, **options) -> EngineProcess:
        log = tmp_path / "log"
        settings = {"start": start}
        begun.append(EngineProcess("toy", python, "program.py", settings, log, **options))
        return begun[-1]

    yield started
    for one in begun:
        one.close()


def ended(pid: int) -> bool:
    """Whether a process ends within seconds; one that nobody waited for yet has ended too."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_facts_and_answers_arrive_and_prints_go_to_the_log(begin):
    with begin() as engine:
        assert engine.facts == {"version": "1.2.3"}
        assert engine.ask({"value": "[1, 2.5, 'ü']"}) == [1, 2.5, "ü"]
        assert engine.ask({"value": "print('noise') or 7"}) == 7
    assert "the engine talks" in engine.log.read_text()


def test_long_answers_arrive_whole(begin):
    with begin() as engine:
        assert engine.ask({"value": "list(range(500_000))"}) == list(range(500_000))


def test_a_long_request_to_a_program_that_does_not_read_ends_with_its_time(begin, tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys, time\nsys.stdin.readline()\n"
        "print('{\"ready\": {}}', flush=True)\ntime.sleep(600)\n"
    )
    with begin() as engine, pytest.raises(EngineGone, match="no answer after 1 s"):
        engine.ask({"value": "x" * 1_000_000}, 0.6)


def test_an_error_of_a_request_is_one_line_and_the_program_goes_on(begin):
    with begin() as engine:
        with pytest.raises(UserError, match=r"^toy: ZeroDivisionError: .*; see .*log$") as found:
            engine.ask({"value": "1 / 0"})
        assert found.type is UserError
        assert engine.ask({"value": "3"}) == 3


def test_a_python_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--engine-python /none: no such program; name the Python"):
        EngineProcess("toy", "/none", "program.py", {}, "log")


def test_a_module_that_is_not_there_is_named(begin):
    with pytest.raises(UserError, match="has no module nothing_of_this_name; install it there"):
        begin("import nothing_of_this_name")


def test_a_failed_start_is_one_line(begin):
    with pytest.raises(UserError, match=r"^toy: ValueError: no room; see"):
        begin("raise ValueError('no\\nroom')")


def test_a_reason_that_was_printed_is_found(begin):
    said = "print('(Worker) ERROR 11-27 [x.py:9] AssertionError: weights of size 3'), "
    said += "print('ended'), exec('raise RuntimeError(\\'failed. See root cause above.\\')')"
    with begin() as engine, pytest.raises(UserError, match=r"^toy: AssertionError: weights of si"):
        engine.ask({"value": said})


def test_a_killed_engine_is_named_with_what_it_said_last(begin):
    with (
        begin() as engine,
        pytest.raises(EngineGone, match="killed by SIGKILL, as the system does where memory"),
    ):
        engine.ask({"value": "os.kill(os.getpid(), signal.SIGKILL)"})


def test_an_exit_for_want_of_memory_says_so(begin):
    said = "print('CUDA Error: out of memory'), os._exit(3)"
    with (
        begin() as engine,
        pytest.raises(EngineGone, match=r"exit code 3, out of memory .at work.: CUDA Error"),
    ):
        engine.ask({"value": said})


def test_a_warning_is_no_reason(begin):
    said = "print('KeyError: x'), print('WARNING 02:32 ValueError: no tokenizer'), os._exit(3)"
    with begin() as engine, pytest.raises(UserError, match=r"exit code 3 .at work.: KeyError: x;"):
        engine.ask({"value": said})


def test_an_engine_that_hangs_is_ended(begin):
    with begin() as engine:
        with pytest.raises(EngineGone, match="no answer after 1 s"):
            engine.ask({"value": "time.sleep(60)"}, seconds=1)
        engine._process.wait(5)


def test_threads_get_the_answers_to_their_own_requests(begin):
    with begin() as engine, ThreadPoolExecutor(8) as pool:
        asked = [f"time.sleep({number % 3} / 1000) or {number}" for number in range(60)]
        answers = list(pool.map(lambda value: engine.ask({"value": value}), asked))
    assert answers == list(range(60))


def test_close_ends_the_wait_of_another_thread(begin):
    engine = begin()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.ask, {"value": "time.sleep(0.3) or os._exit(0)"})
        engine.close()
        with pytest.raises(EngineGone, match=r"^toy: (ended with exit code 0|was closed)"):
            waiting.result(10)
    with pytest.raises(EngineGone, match=r"^toy: was closed; see"):
        engine.ask({"value": "1"})


def test_an_interrupted_engine_does_not_finish_its_answer(begin, tmp_path, monkeypatch):
    """An interrupt leaves the block; another thread waits for the answer."""
    monkeypatch.setattr(process, "EXIT_SECONDS", 60.0)
    busy = tmp_path / "busy"
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyboardInterrupt), begin() as engine:
            request = {"value": f"os.mkdir({str(busy)!r}) or time.sleep(4)"}
            waiting = pool.submit(engine.ask, request)
            await_that(busy.exists)
            raise KeyboardInterrupt
        with pytest.raises(EngineGone, match=r"^toy: was killed by SIGTERM"):
            waiting.result(10)


def test_an_abandoned_engine_is_killed_while_it_computes(begin, tmp_path):
    """With what it has started, though it ignores SIGTERM and does not read its stdin."""
    abandoned = threading.Event()
    value = "signal.signal(signal.SIGTERM, signal.SIG_IGN), os.fork()"
    value += f", os.mkdir({str(tmp_path / 'pid')!r} + str(os.getpid())), time.sleep(60)"
    with begin(abandoned=abandoned) as engine, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.ask, {"value": value})
        await_that(lambda: len(list(tmp_path.glob("pid*"))) == 2)
        abandoned.set()
        with pytest.raises(EngineGone, match=r"^toy: was closed .at work.; see"):
            waiting.result(10)
        pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
        assert engine._process.pid in pids
        assert all(ended(pid) for pid in pids)


def test_an_abandoned_engine_does_not_finish_its_start(begin, tmp_path):
    abandoned = threading.Event()
    start = f"os.mkdir({str(tmp_path / 'pid')!r} + str(os.getpid())); time.sleep(60)"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(begin, start, abandoned=abandoned)
        await_that(lambda: list(tmp_path.glob("pid*")))
        abandoned.set()
        with pytest.raises(EngineGone, match=r"^toy: was closed .starting.; see"):
            waiting.result(10)
    (path,) = tmp_path.glob("pid*")
    assert ended(int(path.name.removeprefix("pid")))


def test_close_ends_what_the_engine_started(begin):
    with begin() as engine:
        child = engine.ask({"value": "__import__('subprocess').Popen(['sleep', '60']).pid"})
        assert Path(f"/proc/{child}").exists()
    assert ended(child)


def test_an_engine_ends_with_its_parent(begin, tmp_path):
    # The parent is a process of its own, killed without a chance to clean up.
    code = f"""
import os, sys
from pathlib import Path
from eagle3fn.engines import process
process.PROGRAMS = Path({str(tmp_path)!r})
engine = process.EngineProcess("toy", sys.executable, "program.py", {{}}, {str(tmp_path / "l")!r})
print(engine._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    begin().close()  # the program's file is written
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended(int(found.stdout))


@pytest.mark.parametrize(
    ("version", "refused"), [("0.9.12", True), ("0.10", False), ("0.11.0+cpu", False)]
)
def test_an_old_engine_is_refused(version, refused):
    facts = {"version": version}
    if not refused:
        assert engine_version(facts, (0, 10), "toy", "py") == version
        return
    with pytest.raises(UserError, match=r"toy 0\.9\.12 .*: too old, 0.10 or later is needed"):
        engine_version(facts, (0, 10), "toy", "py")


PARENT = """
import sys
from pathlib import Path
from eagle3fn.engines import process
process.PROGRAMS = Path(sys.argv[1])
engine = process.EngineProcess("toy", sys.executable, "program.py", {{}}, sys.argv[2])
print(engine._process.pid, flush=True)
engine.ask({{"value": f"os.mkdir({{sys.argv[3]!r}}) or time.sleep(600)"}})
"""


def test_a_program_outlives_the_thread_that_started_it(begin):
    started = ThreadPoolExecutor(1)
    engine = started.submit(begin).result()
    started.shutdown()
    assert engine.ask({"value": "time.sleep(1.5) or 3"}) == 3


def test_a_busy_program_ends_with_its_parent(begin, tmp_path):
    """It does not read its stdin, so that it cannot see that this is closed."""
    begin()  # writes the program
    busy = tmp_path / "busy"
    paths = [str(tmp_path), str(tmp_path / "log2"), str(busy)]
    arguments = [sys.executable, "-c", PARENT.format(), *paths]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not busy.exists() and parent.poll() is None:
        time.sleep(0.01)
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ended(pid)


def test_folders_of_killed_processes_are_removed_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / ".eagle3fn-vllm.abcdefgh.tmp"
    (left / "eagle3fn-vllm").mkdir(parents=True)
    (left / "eagle3fn-vllm/states").write_bytes(b"much")
    (tmp_path / "eagle3fn-vllm").mkdir()  # not ours
    with scratch("vllm") as first, scratch("vllm") as second:
        assert not left.exists()
        assert first.is_dir() and second.is_dir() and first != second
    assert [path.name for path in tmp_path.iterdir()] == ["eagle3fn-vllm"]
