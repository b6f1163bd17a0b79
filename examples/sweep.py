"""Many learning rates at once: a whole training as one function of its rate, under `vmap`.

`step` computes the entries of a `vmap` one after another, to the bits of a loop over them: what is
gained is one call where there were two loops, not time. Both are measured here.
"""

import time

import torch
from problem import draw, open_problem
from torch.func import vmap

import eagle3fn as e3

RATES = torch.tensor([1e-4, 3e-4, 1e-3, 3e-3, 1e-2], dtype=torch.float64)


def main() -> None:
    """Train a draft for each rate, all together; then one after another."""
    config, frozen, features, kept, held_out, folder = open_problem(
        objective=e3.ObjectiveConfig(ttt_length=3),
        optimizer=e3.OptimizerConfig(learning_rate=1.0),  # its schedule: shares of a rate
        data=e3.DataConfig(max_length=128, held_out=4),
        train=e3.TrainConfig(steps=16),
    )
    fns = e3.bind(config, frozen)
    share = e3.SCHEDULES["cosine"](config.optimizer, config.train.steps)
    batches = list(e3.batches(features, kept, config, start=0, stop=config.train.steps))
    batch = e3.collate([e3.read_sample(features, number) for number in held_out], config)
    first = fns.init_state(fns.init(config.train.seed))

    def loss_after(rate):
        """The held-out loss of a draft trained with this highest rate."""
        state = first
        for number, micro_batches in enumerate(batches):
            state, _ = fns.step(state, micro_batches, rate=rate * share(number))
        return fns.forward_loss(state.params, batch)[0]

    begin = time.perf_counter()
    together = vmap(loss_after)(RATES)
    between = time.perf_counter()
    alone = torch.stack([loss_after(rate) for rate in RATES])
    ratio = (between - begin) / (time.perf_counter() - between)

    print(f"held-out loss before training: {float(fns.forward_loss(first.params, batch)[0]):.4f}")
    for rate, loss in zip(RATES.tolist(), together.tolist(), strict=True):
        print(f"learning rate {rate:.0e}: held-out loss {loss:.4f}")
    print(f"best learning rate: {float(RATES[together.argmin()]):.0e}")
    print("same bits as one after another:", torch.equal(together, alone))
    print(f"time of vmap / time of one after another, as measured: {ratio:.2f}")
    labels = {"xlabel": "learning rate", "ylabel": "held-out loss"}
    draw(folder / "sweep.png", lambda axes: axes.semilogx(RATES, together, "o-"), **labels)


if __name__ == "__main__":
    main()
