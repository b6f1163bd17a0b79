"""Trackers that a training's rows are logged to: TensorBoard, Weights & Biases, Trackio.

Each is a row of `TRACKERS`, whose library is imported when the first row is logged. A tracker that
fails is left out, and the training goes on.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.named import in_one_line
from eagle3fn.base.read import read_object
from eagle3fn.train.events import Events

PROJECT = "eagle3fn"
_FILE = "tracking.json"


class Tracker(NamedTuple):
    """A run of a tracker: values by name at a step, and its end."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


class Place(NamedTuple):
    """Where a tracker logs a run."""

    folder: Path  # the run's
    run_id: str  # the same in every call of a run
    step: int  # of the first row: what was logged of it and of later ones is written again


class Library(NamedTuple):
    """A tracker's library: how a run of it is opened, with the run's settings."""

    package: str  # imported and installed by this name
    start: Callable[[Place, dict[str, Any]], Tracker]


def _tensorboard(place: Place, settings: dict[str, Any]) -> Tracker:
    """Event files in the run's `tensorboard/`; later steps of an earlier call are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(place.folder / "tensorboard"), purge_step=place.step)
    for section, values in settings.items():
        lines = "".join(f"    {name} = {value!r}\n" for name, value in values.items())
        writer.add_text(f"settings/{section}", lines, place.step)

    def log(row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(place: Place, settings: dict[str, Any]) -> Tracker:
    """A run whose id goes on; W&B itself leaves steps out that it has."""
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=PROJECT,
        name=place.folder.resolve().name,
        id=place.run_id,
        dir=str(place.folder),
        config=settings,
        resume="allow",
    )
    return Tracker(lambda row, step: run.log(row, step=step), run.finish)


def _trackio(place: Place, settings: dict[str, Any]) -> Tracker:
    """A run whose name goes on."""
    import trackio  # pyright: ignore[reportMissingImports]

    name = f"{place.folder.resolve().name}-{place.run_id}"
    run = trackio.init(project=PROJECT, name=name, config=settings, resume="allow")
    return Tracker(lambda row, step: run.log(row, step=step), run.finish)


TRACKERS = {
    "tensorboard": Library("tensorboard", _tensorboard),
    "wandb": Library("wandb", _wandb),
    "trackio": Library("trackio", _trackio),
}
"""By the name of `--track`."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there; nothing is imported.

    Raises:
        UserError: names the package and how it is installed.
    """
    for name in names:
        package = TRACKERS[name].package
        if find_spec(package) is None:
            raise UserError(
                f"--track {name}: the package {package} is not installed; pip install {package}, "
                f"or leave {name} out"
            )


@contextmanager
def tracked(
    events: Events, names: Sequence[str], out: str | Path, settings: dict[str, Any]
) -> Iterator[Events]:
    """The events, which also log every row to these trackers; they are closed at the end.

    Rows of updates are named `train/…`, held-out ones `held_out/…`. The training calls events on
    rank 0 alone, so no other rank opens a tracker, and a training that is refused opens none.
    """
    live = [_Logged(name, Path(out), settings, events.on_notice) for name in names]

    def log(row: dict[str, Any], prefix: str) -> None:
        values = scalars(row, prefix)
        for tracker in live:
            tracker.log(values, row["step"])

    def on_step(row: dict[str, Any], total: int) -> None:
        events.on_step(row, total)
        log(row, "train")

    def on_eval(row: dict[str, Any]) -> None:
        events.on_eval(row)
        log(row, "held_out")

    try:
        yield events._replace(on_step=on_step, on_eval=on_eval)
    finally:
        for tracker in live:
            tracker.close()


def scalars(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """A row's numbers by name: those of a list by the drafted token's position, from 1 on.

    >>> scalars({"step": 7, "loss": 2.0, "accuracy": [0.5, 0.25], "grad_norm": None}, "train")
    {'train/loss': 2.0, 'train/accuracy/1': 0.5, 'train/accuracy/2': 0.25}
    """
    found = {}
    for name, value in row.items():
        if name == "step" or value is None:
            continue
        if isinstance(value, list):
            found |= {f"{prefix}/{name}/{i}": one for i, one in enumerate(value, 1)}
        else:
            found[f"{prefix}/{name}"] = value
    return found


class _Logged:
    """A tracker that opens at its first row, and is left out from its first failure on."""

    def __init__(
        self, name: str, out: Path, settings: dict[str, Any], notice: Callable[[str], None]
    ) -> None:
        self._name = name
        self._out = out
        self._settings = settings
        self._notice = notice
        self._tracker: Tracker | None = None
        self._failed = False

    def log(self, values: dict[str, float], step: int) -> None:
        if self._failed:
            return
        try:
            if self._tracker is None:
                place = Place(self._out, _run_id(self._out), step)
                self._tracker = TRACKERS[self._name].start(place, self._settings)
            self._tracker.log(values, step)
        except (
            Exception,
            SystemExit,
        ) as error:  # of any kind: a library's failure must not cost the training
            self._give_up(error, f"nothing is logged to it from step {step} on")

    def close(self) -> None:
        if self._tracker is None or self._failed:
            return
        try:
            self._tracker.close()
        except (Exception, SystemExit) as error:
            self._give_up(error, "its last rows may be missing there")

    def _give_up(self, error: BaseException, what: str) -> None:
        self._failed = True
        self._notice(
            f"--track {self._name}: {in_one_line(error)}; {what}, the "
            "training goes on; metrics.jsonl and eval.jsonl have all rows"
        )


def _run_id(out: Path) -> str:
    """The run's id with trackers, made by its first call."""
    path = out / _FILE
    if path.exists():
        run_id = read_object(path).get("id")
        if isinstance(run_id, str) and run_id.isalnum():
            return run_id
        raise UserError(f"{path}: no id in it; delete it, and trackers begin a new run")
    run_id = secrets.token_hex(4)
    write_json(path, {"id": run_id})
    return run_id
