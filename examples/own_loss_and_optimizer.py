"""A loss and an optimizer of one's own: two functions, for `bind` or for the command line.

    functions = e3.bind(config, frozen, loss=total_variation, optimizer=momentum(config.optimizer))

    PYTHONPATH=examples eagle3fn train … \\
      --set objective.loss=own_loss_and_optimizer:total_variation \\
      --set optimizer.name=own_loss_and_optimizer:momentum --set optimizer.learning_rate=0.1

As a program, `python examples/own_loss_and_optimizer.py [RUN [TARGET]]`, it trains for 20 steps.
"""

import torch

import eagle3fn as e3


def total_variation(logits, p_draft, p_full):
    """`½ Σ |p - softmax(logits)|` of each row: `(…,)` of `(…, D)`."""
    return (p_draft - logits.softmax(-1)).abs().sum(-1) / 2


def momentum(config):
    """Gradient descent with momentum `beta1`: `m ← β m + g`, `p ← p - rate · m`."""

    def init(params, roles):
        return {name: torch.zeros_like(param) for name, param in params.items()}

    def update(grads, state, params, info):
        state = {name: config.beta1 * state[name] + grad for name, grad in grads.items()}
        return {name: params[name] - info.rate * state[name] for name in params}, state

    return e3.Optimizer(init, update)


def main() -> None:
    """Train with both, and print the loss of samples that are held out."""
    from problem import open_problem

    objective = e3.ObjectiveConfig(ttt_length=3)
    problem = open_problem(objective=objective, data=e3.DataConfig(global_batch=2, held_out=8))
    own = {"loss": total_variation, "optimizer": momentum(problem.config.optimizer)}
    functions = e3.bind(problem.config, problem.frozen, **own)
    state = functions.init_state(functions.init(problem.config.train.seed))
    held_out = [e3.read_sample(problem.features, number) for number in problem.held_out]

    def loss_of(params):
        return float(functions.forward_loss(params, e3.collate(held_out, problem.config))[0])

    print("held-out loss before", loss_of(state.params))
    for micro_batches in e3.batches(problem.features, problem.kept, problem.config, 0, 20):
        state, _ = functions.step(state, micro_batches, rate=0.1, donate=True)
    print("held-out loss after", loss_of(state.params))


if __name__ == "__main__":
    main()
