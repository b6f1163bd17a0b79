"""The sources of `train --online`, whose pool is closed while an engine's process starts."""

import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eagle3fn.base.errors import EngineGone
from eagle3fn.base.launch import World
from eagle3fn.commands.online_sources import Logs, sources_of
from eagle3fn.data.source_pool import Pool
from eagle3fn.data.target_source import target_config
from eagle3fn.engines import process
from tests.engines.made_rows import CUT, LAYERS, make_target
from tests.waiting import await_that

PROGRAMS = {"vllm": "vllm_features.py", "transformers": "transformers_states.py"}
HANGS = "import os, time\nfrom pathlib import Path\n"
HANGS += "os.mkdir(Path(__file__).parent / f'pid{os.getpid()}')\ntime.sleep(60)\n"


@pytest.mark.parametrize("engine", PROGRAMS)
def test_process_that_starts_ends_with_the_pool(engine, tmp_path, monkeypatch):
    made = make_target(tmp_path, 1)
    monkeypatch.setattr(process, "PROGRAMS", tmp_path)
    (tmp_path / PROGRAMS[engine]).write_text(HANGS)
    options = Namespace(
        out=tmp_path / "run",
        target=str(made.target),
        engine=engine,
        engine_python=sys.executable,
        engine_url=None,
        engine_arg=None,
        generate=False,
        dry_run=False,
        sources=1,
        check="logits",
        dtype="float32",
        batch_tokens=1,
        max_length=CUT,
        threads=1,
    )
    tree = target_config(str(made.target))
    logs = Logs(str(options.out), dry_run=False)
    pool = Pool(sources_of(options, tree, LAYERS, World(0, 1), logs))
    with pool, ThreadPoolExecutor(1) as threads:
        opened = threads.submit(pool.first)
        await_that(lambda: list(tmp_path.glob("pid*")))
        pool.close()
        with pytest.raises(EngineGone, match=r": was closed .starting."):
            opened.result(20)
    (path,) = tmp_path.glob("pid*")
    assert not Path("/proc", path.name.removeprefix("pid")).exists()
