"""What the other examples share: `python examples/X.py [RUN [TARGET]]`.

RUN has `features/` and `vocab.safetensors`, as `runs/demo`; without it a tiny random run is made.
TARGET is the target's folder, by default the one that the features were made with.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import eagle3fn as e3
from eagle3fn.testing import write_tiny_run


class Problem(NamedTuple):
    """What stays the same while a draft is trained."""

    config: e3.Config
    frozen: e3.Frozen  # the target's tensors and the vocabulary map
    features: e3.FeatureSet
    kept: Sequence[int]  # numbers of the samples to train on
    held_out: Sequence[int]  # and of the others
    folder: Path  # where pictures go


def open_problem(arguments: Sequence[str] | None = None, **sections: Any) -> Problem:
    """The problem that the program's arguments name; `sections` are those of `e3.Config`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    folder = Path(arguments[0]) if arguments else Path(tempfile.mkdtemp(prefix="eagle3fn-"))
    if not arguments:
        write_tiny_run(folder, conversations=32, spread=0.3)
    features = e3.open_features(folder / "features")
    target = arguments[1] if len(arguments) > 1 else features.index["target"]["name"]
    vocab_map = e3.load_map(folder / "vocab.safetensors")
    draft = e3.draft_config_from_target(e3.target_config(target), target, len(vocab_map.d2t))
    config = e3.Config(draft, **sections)
    tensors = e3.read_target_tensors(target, getattr(torch, config.train.dtype))
    frozen = e3.make_frozen(tensors, vocab_map, config)
    kept, held_out = e3.split(len(features.samples), config.data.held_out)
    return Problem(config, frozen, features, kept, held_out, folder)


def draw(path: Path, plot: Callable[[Any], object], **labels: str) -> None:
    """Save what `plot` draws on axes of matplotlib, where it is installed, with `labels`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    plot(axes)
    axes.set(**labels)
    figure.savefig(path, dpi=80)
    print("picture:", path)
