"""What goes wrong, on two ranks, for `test_faults.py`: `python -m tests.train.faults_job FOLDER`.

Each fault happens to a run that was stopped half way. Afterwards one rank continues it without the
fault, to the last step. `FOLDER/seen.json` has, by fault, how each of these runs ended.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eagle3fn import cli
from eagle3fn.base.files import locked
from eagle3fn.data.order import shuffled_number
from eagle3fn.data.target_source import target_config
from eagle3fn.data.vocab import save_map
from eagle3fn.train import bind
from tests.factories import make_map, supervised_sample, tiny_model, write_folder
from tests.train.forked import Ranks

STEPS = 8
SAMPLES = 18
HELD_OUT = 2
HIDDEN = 16
VOCAB = 300
PATIENCE_S = 120
SETTINGS = [
    f"train.steps={STEPS}",
    "train.checkpoint_every=2",
    f"train.eval_every={STEPS}",
    "train.reduce=tree",
    "data.global_batch=2",
    f"data.held_out={HELD_OUT}",
    "objective.ttt_length=2",
]
LAST = [shuffled_number(SAMPLES, 0, 2 * (STEPS - 1) + rank) for rank in range(2)]
"""The samples of the last step: rank 0's and rank 1's."""

Seen = dict[str, list[dict[str, Any]]]


def write_inputs(root: Path) -> None:
    """A target, a map, and two feature folders.

    One is good; in the other a sample of the last step has a NaN.
    """
    tiny_model(num_hidden_layers=7).save_pretrained(root / "target")
    vocab_map = make_map(VOCAB, 64, torch.Generator().manual_seed(0))
    save_map(root / "map", vocab_map, {"target": "tiny"})
    for name, value in (("good", None), ("nans", float("nan"))):
        numbers = range(SAMPLES + HELD_OUT)
        samples = [supervised_sample(12, number, VOCAB, HIDDEN) for number in numbers]
        if value is not None:
            samples[LAST[1]].aux_hidden[3:6] = value
        write_folder(root / name, samples, VOCAB, HIDDEN, per_shard=1)


def run(
    root: Path,
    out: str,
    *more: str,
    features: str = "good",
    ranks: int = 2,
    before: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`eagle3fn train` on a few ranks; `before(rank)` runs in each of them first.

    Returns:
        Exit codes, the text of all ranks, and seconds.
    """
    line = ["train", "--target", str(root / "target"), "--features", str(root / features)]
    line += ["--vocab", str(root / "map"), "--out", str(root / out)]
    for setting in SETTINGS:
        line += ["--set", setting]
    line += more

    def work(rank: int) -> int:
        if before:
            before(rank)
        return cli.main(line)

    log = root / f"{out}.log"
    begin = time.monotonic()
    codes = Ranks(work, ranks, log).wait(PATIENCE_S)
    seconds = time.monotonic() - begin
    text = "".join(log.with_name(f"{log.name}{rank}").read_text() for rank in range(ranks))
    return {"codes": codes, "text": text, "seconds": seconds}


def signal_at(step: int, number: int) -> Callable[[int], None]:
    """Rank 1 sends itself a signal when it begins a step."""

    def before(rank: int) -> None:
        plain_step = bind.step

        def stepping(state: Any, *args: Any, **kwargs: Any) -> Any:
            if rank == 1 and int(state.step) + 1 == step:
                os.kill(os.getpid(), number)
            return plain_step(state, *args, **kwargs)

        bind.step = stepping  # of this rank's process alone

    return before


def overflowing(ranks: int) -> Callable[[int], None]:
    """In the last step a batch of the last rank holds features whose products overflow."""

    def before(rank: int) -> None:
        plain_step = bind.step

        def stepping(state: Any, micro: Any, *args: Any, **kwargs: Any) -> Any:
            if rank == ranks - 1 and int(state.step) + 1 == STEPS:
                *others, batch = micro
                aux = batch.aux_hidden.clone()
                aux[:, 3:6] = 3e38
                micro = (*others, batch._replace(aux_hidden=aux))
            return plain_step(state, micro, *args, **kwargs)

        bind.step = stepping  # of this rank's process alone

    return before


def small_files(rank: int) -> None:
    """Rank 1 can write no file beyond 16 KiB, as on a full disk."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))


def damaged(root: Path, name: str, change: Callable[[Path], Any]) -> str:
    """A copy of the good features with the shard changed that rank 1 reads in the last step."""
    shutil.copytree(root / "good", root / name)
    change(root / name / f"shard-{LAST[1]:05d}.safetensors")
    return name


def truncate(path: Path) -> None:
    """Leave the first 500 bytes."""
    os.truncate(path, 500)


def flip(path: Path) -> None:
    """Change one bit of the last value."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def full_disk(root: Path, seen: Seen) -> None:
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

        # The same file system with room: the run goes on.
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        seen["full"].append(run(root, "full", ranks=1) | {"left": left})
        shutil.copytree(place, root / "full/written")
    finally:
        subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    (root / "full/written").rename(place)


def main(root: Path) -> None:
    """For each fault a run with it on two ranks, and one without it on one rank."""
    write_inputs(root)
    target_config(root / "target")  # imports what each rank would
    seen: Seen = {}

    def fault(name: str, *more: str, **options: Any) -> None:
        """A fault of the run that was stopped half way, and the run without it."""
        shutil.copytree(root / "half", root / name)
        seen[name] = [run(root, name, *more, **options), run(root, name, ranks=1)]

    # A run that nothing happens to, and one that SIGTERM stops in step 3.
    seen["whole"] = [run(root, "whole", ranks=1)]
    seen["sigterm"] = [run(root, "half", before=signal_at(3, signal.SIGTERM))]

    # Faults of what is read, written, set, and of a rank.
    fault("missing", features=damaged(root, "without", Path.unlink))
    fault("truncated", features=damaged(root, "cut", truncate))
    fault("flipped", features=damaged(root, "flip", flip))
    fault("nan", features="nans")
    fault("large", before=small_files)
    fault("config", "--set", "optimizer.learning_rate=0.5")
    fault("killed", before=signal_at(6, signal.SIGKILL))

    shutil.copytree(root / "half", root / "sigterm")
    seen["sigterm"].append(run(root, "sigterm", ranks=1))

    # A gradient that is not finite: the plain norm's overflows, the fast one's does not.
    plain = ("--set", "objective.numerics=plain")
    skip = (*plain, "--on-nonfinite", "skip")
    seen["skip"] = [run(root, "skip", *skip, ranks=1, before=overflowing(1))]
    seen["overflow"] = [
        run(root, "overflow", *plain, before=overflowing(2)),
        run(root, "overflow", *skip, before=overflowing(2)),
    ]

    # Two at once: the second start ends.
    shutil.copytree(root / "half", root / "held")
    with locked(root / "held"):
        seen["held"] = [run(root, "held")]

    full_disk(root, seen)
    (root / "seen.json").write_text(json.dumps(seen, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
