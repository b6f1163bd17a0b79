"""The gradient noise scale along a training, and the batch size that it suggests.

McCandlish et al. 2018: with the gradient G over all samples and the covariance Σ of single ones, a
batch of B has `E |G_B|² = |G|² + tr Σ / B`. Two sizes, here 1 and N, give both without bias.
Batches well below `tr Σ / |G|²` waste few samples; ones well above it save hardly any updates.
"""

import math

from problem import draw, open_problem

import eagle3fn as e3

SAMPLES = 8  # N, of an update
EVERY = 4  # updates whose estimates are averaged: one alone is noisy, and may be negative


def square(gradient) -> float:
    """`|g|²`."""
    return sum(float(leaf.double().square().sum()) for leaf in gradient.values())


def signal_and_noise(shares) -> tuple[float, float]:
    """`|G|²` and `tr Σ` from each sample's share of a batch's gradient, their sum."""
    n = len(shares)  # a sample alone would have n times its share
    of_one = n * sum(map(square, shares))  # the mean of |N · share|²
    of_all = square({name: sum(share[name].double() for share in shares) for name in shares[0]})
    return (n * of_all - of_one) / (n - 1), (of_one - of_all) / (1 - 1 / n)


def main() -> None:
    """Train, and measure at each update."""
    config, frozen, features, kept, _, folder = open_problem(
        objective=e3.ObjectiveConfig(ttt_length=3),
        data=e3.DataConfig(max_length=128, global_batch=SAMPLES),
        train=e3.TrainConfig(steps=16),
    )
    fns = e3.bind(config, frozen)
    gradient = e3.value_and_grad(fns.forward_loss, has_aux=True)
    state = fns.init_state(fns.init(config.train.seed))
    found, scales = [], {}
    for number, micro_batches in enumerate(e3.batches(features, kept, config, 0, 16), 1):
        # Micro-batches of one sample, that carry the row counts of all: their gradients add up.
        shares = [gradient(state.params, one)[1] for one in micro_batches]
        found.append(signal_and_noise(shares))
        state, _ = fns.step(state, micro_batches, donate=True)
        if number % EVERY == 0:
            signal, noise = (sum(each) / EVERY for each in zip(*found[-EVERY:], strict=True))
            scales[number] = noise / signal if signal > 0 else math.inf
            print(f"update {number}: |G|² {signal:.3g}, tr Σ {noise:.3g}", end=", ")
            print(f"noise scale {scales[number]:.1f} samples")
    print(f"suggested data.global_batch: {max(scales[number], 1):.0f}")
    labels = {"xlabel": "update", "ylabel": "noise scale, samples"}
    shown = ([*scales], [*scales.values()], "o-")
    draw(folder / "noise_scale.png", lambda axes: axes.plot(*shown), **labels)


if __name__ == "__main__":
    main()
