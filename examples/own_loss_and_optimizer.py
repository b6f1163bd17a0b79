"""A loss and an optimizer of one's own: two functions, for `bind` or for the command line.

    functions = e3.bind(config, frozen, loss=total_variation, optimizer=momentum(config.optimizer))

    PYTHONPATH=examples eagle3fn train … \\
      --set objective.loss=own_loss_and_optimizer:total_variation \\
      --set optimizer.name=own_loss_and_optimizer:momentum --set optimizer.learning_rate=0.1
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
