"""What goes wrong, on two ranks, for `test_faults.py`: `python -m tests.train.faults_job FOLDER` writes `FOLDER/seen.json`.

Each fault meets a run that was stopped half way; afterwards one rank goes on without the fault, to the last step.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eagle3fn import cli
from eagle3fn.data.pipeline import sample_indices
from eagle3fn.data.target import target_config
from eagle3fn.data.vocab import build_map, save_map
from eagle3fn.train import bind
from tests.data_tools import random_sample, tiny_model, write_folder
from tests.train.forked import Ranks

STEPS, SAMPLES, HELD_OUT, HIDDEN, VOCAB = 8, 18, 2, 16, 300
SETTINGS = f"train.steps={STEPS} train.checkpoint_every=2 train.eval_every={STEPS} train.reduce=tree".split()
SETTINGS += f"data.global_batch=2 data.held_out={HELD_OUT} objective.ttt_length=2".split()
LAST = sample_indices(SAMPLES, 2, 0, STEPS - 1)  # the samples of the last step


def write(root: Path) -> None:
    """A target, a map, and three feature folders: good, with a NaN, and with values whose products overflow."""
    tiny_model().save_pretrained(root / "target")
    save_map(root / "map", build_map(torch.arange(VOCAB), 64), {"target": "tiny"})
    for name, value in (("good", None), ("nans", float("nan")), ("huge", 3e38)):
        samples = [random_sample(12, seed, VOCAB, HIDDEN) for seed in range(SAMPLES + HELD_OUT)]
        samples = [
            sample._replace(token_mask=torch.ones_like(sample.token_mask)) for sample in samples
        ]
        if value is not None:
            samples[LAST[1]].aux_hidden[3:6] = value
        write_folder(root / name, samples, VOCAB, HIDDEN, per_shard=1)


def run(
    root: Path, out: str, *more: str, features: str = "good", ranks: int = 2, before: Any = None
) -> dict[str, Any]:
    """`eagle3fn train` on a few ranks; `before(rank)` runs in each of them first."""
    arguments = [
        "train",
        "--target",
        root / "target",
        "--features",
        root / features,
        "--vocab",
        root / "map",
    ]
    settings = [text for setting in SETTINGS for text in ("--set", setting)]
    line = [*map(str, arguments), "--out", str(root / out), *settings, *more]

    def work(rank: int) -> int:
        if before:
            before(rank)
        return cli.main(line)

    log = root / f"{out}.log"
    job = Ranks(work, ranks, log)
    begin = os.times().elapsed
    codes = job.wait(120)
    text = "".join(log.with_name(f"{log.name}{rank}").read_text() for rank in range(ranks))
    return {"codes": codes, "text": text, "seconds": os.times().elapsed - begin}


def signal_at(step: int, number: int) -> Callable[[int], None]:
    """Rank 1 sends itself a signal when it begins a step."""

    def before(rank: int) -> None:
        plain = bind.step

        def stepping(state: Any, *args: Any, **kwargs: Any) -> Any:
            if rank == 1 and int(state.step) + 1 == step:
                os.kill(os.getpid(), number)
            return plain(state, *args, **kwargs)

        bind.step = stepping

    return before


def small_files(rank: int) -> None:
    """Rank 1 can write no file beyond 16 KiB, as on a full disk."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))


def shard(root: Path, features: str) -> Path:
    """The shard of a sample of the last step, which rank 1 trains on."""
    return root / features / f"shard-{LAST[1]:05d}.safetensors"


def damaged(root: Path, name: str, change: Callable[[Path], Any]) -> str:
    """A copy of the good features with one shard changed."""
    shutil.copytree(root / "good", root / name)
    change(shard(root, name))
    return name


def flip(path: Path) -> None:
    """Change one bit of the last value."""
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def full_disk(root: Path, seen: dict[str, Any]) -> None:
    """The checkpoints on a file system of 300 KiB, where this process may mount one."""
    place = root / "full/checkpoints"
    shutil.copytree(root / "half", root / "full")
    shutil.move(place, root / "full/kept")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        return
    try:
        shutil.copytree(root / "full/kept/step-00000002", place / "step-00000002")
        seen["full"] = [run(root, "full")]
        left = sorted(path.name for path in place.iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        seen["full"].append(run(root, "full", ranks=1) | {"left": left})
        shutil.copytree(place, root / "full/written")
    finally:
        subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    (root / "full/written").rename(place)


def main(root: Path) -> None:
    """Do everything: for each fault a run with it on two ranks, and one without it on one."""
    write(root)
    target_config(root / "target")  # imports what each rank would
    seen: dict[str, Any] = {"whole": [run(root, "whole", ranks=1)]}
    seen["sigterm"] = [run(root, "half", before=signal_at(3, signal.SIGTERM))]

    def fault(name: str, *more: str, **options: Any) -> None:
        shutil.copytree(root / "half", root / name)
        seen[name] = [run(root, name, *more, **options), run(root, name, ranks=1)]

    fault("missing", features=damaged(root, "without", Path.unlink))
    fault("truncated", features=damaged(root, "cut", lambda path: os.truncate(path, 500)))
    fault("flipped", features=damaged(root, "flip", flip))
    fault("nan", features="nans")
    fault("large", before=small_files)
    fault("config", "--set", "optimizer.learning_rate=0.5")
    fault("killed", before=signal_at(6, signal.SIGKILL))
    shutil.copytree(root / "half", root / "sigterm")
    seen["sigterm"].append(run(root, "sigterm", ranks=1))
    plain = (
        "--set",
        "objective.numerics=plain",
    )  # its norm's gradient overflows, the fast one's does not
    seen["skip"] = [run(root, "skip", *plain, "--on-nonfinite", "skip", features="huge", ranks=1)]
    seen["overflow"] = [run(root, "overflow", *plain, features="huge")]
    seen["overflow"].append(
        run(root, "overflow", *plain, "--on-nonfinite", "skip", features="huge", ranks=2)
    )
    full_disk(root, seen)
    (root / "seen.json").write_text(json.dumps(seen, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
