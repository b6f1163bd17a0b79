"""A signal in each stage, for `test_signals_in_stages.py`: `python -m tests.signals_job FOLDER`.

`FOLDER/seen.json` has, by stage, how it ended after the signal, what was left, and how it ended
when it was called again.
"""

import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.stages import commands, leftovers, run, write_world

PLACES = {
    "synthesize": ("eagle3fn.data.generate", "generate", 2),
    "inspect": ("eagle3fn.data.encode", "encode_row", 3),
    "extract": ("eagle3fn.data.shards", "write_shard", 2),
    "vocab": ("eagle3fn.data.vocab", "count_tokens", 1),
    "train": ("eagle3fn.train.bind", "step", 3),
    "evaluate": ("eagle3fn.use.target_answers", "greedy_together", 1),
    "report": ("eagle3fn.base.files", "fsync_path", 3),
    "export": ("eagle3fn.use.export", "export_for", 1),
    "convert": ("eagle3fn.specforge.feature_files", "write_ckpt", 3),
}
"""By stage, the function in whose call, counted from 1, the signal comes."""


def signal_in(stage: str, number: int) -> Callable[[], None]:
    """What a fork does first: the stage's function then sends the signal before its work."""
    module_name, name, call = PLACES[stage]

    def before() -> None:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
        calls = 0

        def signalled(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        for loaded in list(sys.modules.values()):
            if getattr(loaded, name, None) is function:
                setattr(loaded, name, signalled)

    return before


def main(root: Path) -> None:
    """Each stage: with the signal, and again without."""
    # Ctrl-C is ignored in what a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    world = root / "world"
    write_world(world)
    seen = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        for stage in PLACES:
            if number == signal.SIGTERM and stage not in ("train", "report"):
                continue
            name = f"{stage} {signal.Signals(number).name}"
            out = root / name.replace(" ", "-")
            out.mkdir()
            if stage == "report":
                for part in ("features", "train", "evaluation.json"):
                    (out / part).symlink_to(world / part)
            line = commands(world, out)[stage]
            stopped = run(line, root / f"{name}.log", signal_in(stage, number))
            left = leftovers(out)
            again = run(line, root / f"{name}.again")
            seen[name] = {"stopped": stopped._asdict(), "left": left, "again": again._asdict()}
            shutil.rmtree(out)
    (root / "seen.json").write_text(json.dumps(seen, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
