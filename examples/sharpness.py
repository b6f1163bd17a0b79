"""The sharpness of the loss along gradient descent, against the stability limit 2 / learning rate.

Sharpness is the largest eigenvalue of the Hessian. On a batch that stays the same it tends to rise
to the limit; from there on the descent overshoots, which makes it fall (Cohen et al. 2021).
"""

from problem import draw, open_problem
from torch.func import grad, vjp

import eagle3fn as e3

STEPS, EVERY = 40, 4


def dot(left, right):
    """`Σ left · right` over all leaves."""
    return sum((left[name] * right[name]).sum() for name in left)


def sharpest(loss, params, direction, rounds):
    """The Hessian's eigenvalue of largest size and its eigenvector, by power iteration."""
    times_hessian = vjp(grad(loss), params)[1]
    for _ in range(rounds):
        length = dot(direction, direction) ** 0.5
        unit = {name: leaf / length for name, leaf in direction.items()}
        (direction,) = times_hessian(unit)
    return float(dot(unit, direction)), direction


def main() -> None:
    """Descend on two samples; from time to time measure."""
    config, frozen, features, kept, _, folder = open_problem(
        objective=e3.ObjectiveConfig(ttt_length=2, numerics="plain"),  # has second derivatives
        optimizer=e3.OptimizerConfig(name="sgd", momentum=0.0, max_grad_norm=1e6),
        data=e3.DataConfig(max_length=64),
        train=e3.TrainConfig(steps=STEPS, dtype="float32"),
    )
    fns = e3.bind(config, frozen)
    batch = e3.collate([e3.read_sample(features, number) for number in kept[:2]], config)
    state = fns.init_state(fns.init(config.train.seed))

    def loss(params):
        return fns.forward_loss(params, batch)[0]

    # The rate's limit is twice the first sharpness. Later ones begin at the last eigenvector.
    first, direction = sharpest(loss, state.params, grad(loss)(state.params), rounds=20)
    limit, found = 2 * first, {0: first}
    for step in range(1, STEPS + 1):
        state, metrics = fns.step(state, batch, rate=2 / limit)
        if step % EVERY == 0:
            found[step], direction = sharpest(loss, state.params, direction, rounds=5)
            text = f"sharpness {found[step]:.4g}, {found[step] / limit:.2f} of the limit"
            print(f"step {step}: loss {float(metrics['loss']):.3f}, {text}")
    shown = ([*found], [*found.values()], "o-", [0, STEPS], [limit, limit], "--")
    draw(folder / "sharpness.png", lambda axes: axes.plot(*shown), xlabel="step", title="sharpness")


if __name__ == "__main__":
    main()
