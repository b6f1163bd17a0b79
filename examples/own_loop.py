"""A training loop of one's own: from feature files to an exported draft, by the public names alone.

usage: python examples/own_loop.py [RUN [TARGET]]

RUN has `features/`, as `eagle3fn extract` writes it, and `vocab.safetensors`, as `eagle3fn vocab`
does; without it a tiny random run is made. TARGET is the target's folder, by default the one that
the features were made with. The draft goes to RUN/own-draft.
"""

import sys
import tempfile
from pathlib import Path

import torch

import eagle3fn as e3
from eagle3fn.testing import write_tiny_run

DTYPE = torch.bfloat16


def main(run: Path, target: str = "") -> float:
    """Train for 20 steps; the loss on the held-out samples."""
    # What stays the same: configuration, features, the target's tensors.
    features = e3.open_features(run / "features")
    target = target or features.index["target"]["name"]
    tree = e3.target_config(target)
    vocab_map = e3.load_map(run / "vocab.safetensors")
    draft = e3.draft_config_from_target(tree, target, len(vocab_map.d2t))
    config = e3.Config(draft, data=e3.DataConfig(held_out=2), train=e3.TrainConfig(steps=20))
    frozen = e3.make_frozen(e3.read_target_tensors(target, DTYPE), vocab_map, config)
    kept, held_out = e3.split(len(features.samples), config.data.held_out)

    # The loop. A step's micro-batches carry the row counts of the whole batch.
    fns = e3.bind(config, frozen)
    state = fns.init_state(fns.init(config.train.seed))
    for micro_batches in e3.batches(features, kept, config, start=0, stop=config.train.steps):
        state, _ = fns.step(state, micro_batches, donate=True)

    # The draft as serving engines read it, and the held-out loss.
    e3.export(state.params, frozen, draft, run / "own-draft", tree["num_hidden_layers"], DTYPE)
    batch = e3.collate([e3.read_sample(features, number) for number in held_out], config)
    return float(fns.forward_loss(state.params, batch)[0])


if __name__ == "__main__":
    arguments = sys.argv[1:] or [str(write_tiny_run(tempfile.mkdtemp(prefix="eagle3fn-")))]
    print("held-out loss", main(Path(arguments[0]), *arguments[1:]))
    print("draft:", Path(arguments[0]) / "own-draft")
