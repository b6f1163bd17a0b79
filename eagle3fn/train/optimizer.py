"""Optimizers as `(init, update)` pairs of pure functions."""

# pyright: reportPrivateImportUsage=false
# torch names its operations on lists, `_foreach_…`, as private.

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import optree
import torch
from torch import Tensor

from eagle3fn.base.errors import UserError, shown
from eagle3fn.base.named import call_own, find
from eagle3fn.base.sections import OptimizerConfig, Role
from eagle3fn.base.tree import named_leaves, tree_map
from eagle3fn.base.types import Params
from eagle3fn.train.orthogonal import orthogonal

T = TypeVar("T")

_BLOCK_BYTES = 16 << 20  # of a leaf, updated at once


class Leaf(NamedTuple):
    """What an update can ask about a leaf."""

    role: Role  # of `model.table`
    shape: tuple[int, ...]  # of all ranks' rows


class UpdateInfo(NamedTuple):
    """What an update reads besides tensors.

    `on_whole(function, parts)` is for an update that needs whole leaves: `parts` are this rank's
    rows of some leaves, all ranks of the same ones; what is returned are its rows of
    `function(whole)`, which has the whole leaf's shape and dtype. One rank computes each of them,
    so that the ranks share the work.
    """

    step: int  # updates before this one
    rate: float  # the learning rate
    leaves: dict[str, Leaf]
    on_whole: Callable[[Callable[[Tensor], Tensor], Params], Params]
    donate: bool  # whether gradients, state and parameters may be written into


class Optimizer(NamedTuple):
    """An optimizer, as in optax; `params`, `grads` and the state are trees of this rank's rows.

    `init(params, roles) → state`: any pytree of tensors, which have a parameter's rows or are 0-d.
    It is called with tensors of the device "meta" too, where only shapes are asked for. `update`
    returns a state of the same names, shapes and dtypes.

    `update(grads, state, params, info) → (params, state)`: `params` are the fp32 masters, `grads`
    the clipped gradients. It returns the next parameters, and not an increment to add as in optax:
    the last multiplication and the addition are then one operation with one rounding (`addcdiv` on
    CUDA), as in `torch.optim`. Arguments stay as they are unless `info.donate`, under which the
    bits must be the same. Gradient descent on the sign, as a function that `optimizer.name` may
    name:

        def sign_descent(config: OptimizerConfig) -> Optimizer:
            def update(grads, state, params, info):
                after = {name: params[name] - info.rate * g.sign() for name, g in grads.items()}
                return after, state

            return Optimizer(init=lambda params, roles: {}, update=update)
    """

    init: Callable[[Params, dict[str, Role]], Any]
    update: Callable[[Params, Any, Params, UpdateInfo], tuple[Params, Any]]


class Moments(NamedTuple):
    """AdamW's running means of gradients and of squared gradients."""

    mu: Params
    nu: Params


class MuonState(NamedTuple):
    """Muon's running means of the matrices' gradients, and AdamW's moments of the other leaves."""

    momentum: Params
    rest: Moments


def zeros(params: Params) -> Params:
    """A tensor of zeros for each parameter."""
    return {name: torch.zeros_like(leaf) for name, leaf in params.items()}


def writable(tree: T, info: UpdateInfo) -> T:
    """A tree that an update may write into: copies, unless it was donated."""
    return tree if info.donate else tree_map(torch.clone, tree)


def decay_of(config: OptimizerConfig, leaf: Leaf) -> float:
    """A leaf's weight decay: `weight_decay` for the roles of `decay_roles`, else 0."""
    return config.weight_decay if leaf.role in config.decay_roles else 0.0


def adamw(config: OptimizerConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101). At step `n`, counted from 0:

        m ← m + (1 - β₁)(g - m),  v ← β₂ v + (1 - β₂) g²
        p ← p · (1 - rate · decay) - rate / (1 - β₁ⁿ⁺¹) · m / (√v / √(1 - β₂ⁿ⁺¹) + ε)

    The bits of `torch.optim.AdamW` on every device. On CUDA that one runs over lists of leaves, and
    a list divided by a number is a true division, where a tensor is multiplied by the reciprocal:
    so the operations on lists are used, with one leaf each. On a CPU both are the same.
    """

    def init(params: Params, roles: dict[str, Role]) -> Moments:
        return Moments(zeros(params), zeros(params))

    def update(grads: Params, state: Moments, params: Params, info: UpdateInfo) -> Any:
        step_size = info.rate / (1 - config.beta1 ** (info.step + 1))
        root = (1 - config.beta2 ** (info.step + 1)) ** 0.5
        params, state = writable((params, state), info)

        for name, whole_grad in grads.items():
            decay = decay_of(config, info.leaves[name])
            leaves = whole_grad, state.mu[name], state.nu[name], params[name]
            for grad, mu, nu, param in _blocks(*leaves):
                if decay:
                    torch._foreach_mul_([param], 1 - info.rate * decay)

                # The running means.
                torch._foreach_lerp_([mu], [grad], 1 - config.beta1)
                torch._foreach_mul_([nu], config.beta2)
                torch._foreach_addcmul_([nu], [grad], [grad], 1 - config.beta2)

                # The update, with both means' bias removed.
                denominator = torch._foreach_sqrt([nu])
                torch._foreach_div_(denominator, [root])
                torch._foreach_add_(denominator, config.eps)
                torch._foreach_addcdiv_([param], [mu], denominator, [-step_size])
        return params, state

    return Optimizer(init, update)


def _blocks(*leaves: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the leaves' rows, block by block: the update of one needs no more memory than a
    block.
    """
    first = leaves[0]
    rows = max(1, _BLOCK_BYTES * len(first) // first.nbytes) if first.numel() else 1
    return zip(*(leaf.split(rows) for leaf in leaves), strict=True)


def muon(config: OptimizerConfig, orthogonal: Callable[[Tensor], Tensor] = orthogonal) -> Optimizer:
    """Muon (Jordan et al., 2024; arXiv 2502.16982) for matrices `(A, B)`, AdamW for other leaves:

        m ← m + (1 - μ)(g - m)
        p ← p · (1 - rate · decay) - 0.2 · √max(A, B) · rate · c · orthogonal(g + μ (m - g))

    Matrices are those that `matrices` names, `μ` is `momentum` and `c` is `matrix_factor`; at 1, an
    update of which all singular values are 1 has the size of AdamW's. On several ranks each matrix
    is made orthogonal by one of them.

    Args:
        config: its settings.
        orthogonal: a matrix to about `U Vᵀ`, of its shape and dtype; with `newton_schulz` the
            update has the bits of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` at `c = 1`.
    """
    others = adamw(config)
    chosen = ("attention",) if config.matrices == "attention" else ("attention", "matrix")

    def init(params: Params, roles: dict[str, Role]) -> MuonState:
        matrices = {name: leaf for name, leaf in params.items() if roles[name] in chosen}
        rest = {name: leaf for name, leaf in params.items() if name not in matrices}
        return MuonState(zeros(matrices), others.init(rest, roles))

    def update(grads: Params, state: MuonState, params: Params, info: UpdateInfo) -> Any:
        rest = {name: grad for name, grad in grads.items() if name not in state.momentum}
        after, moments = others.update(rest, state.rest, {n: params[n] for n in rest}, info)
        means = writable(state.momentum, info)
        matrices = writable({name: params[name] for name in means}, info)

        # The running means, and from them and the gradients the directions, whole by whole.
        directions = {}
        for name, mean in means.items():
            mean.lerp_(grads[name], 1 - config.momentum)
            directions[name] = grads[name].lerp(mean, config.momentum)
        directions = info.on_whole(orthogonal, directions)

        for name, matrix in matrices.items():
            longest = max(info.leaves[name].shape)
            size = 0.2 * math.sqrt(longest) * info.rate * config.matrix_factor
            matrix.mul_(1 - info.rate * decay_of(config, info.leaves[name]))
            matrix.add_(directions[name], alpha=-size)

        after |= matrices
        return {name: after[name] for name in params}, MuonState(means, moments)

    return Optimizer(init, update)


def sgd(config: OptimizerConfig) -> Optimizer:
    """Gradient descent with momentum (Polyak, 1964), `μ` is `momentum`:

        g ← g + decay · p
        m ← μ m + g
        p ← p - rate · m

    The bits of `torch.optim.SGD` of the same momentum and weight decay, by its operations on lists
    as in `adamw`. With `momentum = 0` there is no `m`, and no state.
    """

    def init(params: Params, roles: dict[str, Role]) -> Params:
        return zeros(params) if config.momentum else {}

    def update(grads: Params, state: Params, params: Params, info: UpdateInfo) -> Any:
        params, state = writable((params, state), info)
        for name, whole_grad in grads.items():
            decay = decay_of(config, info.leaves[name])
            sums = state.get(name, whole_grad)
            for grad, running, param in _blocks(whole_grad, sums, params[name]):
                direction = [grad]
                if decay:
                    direction = torch._foreach_add(direction, [param], alpha=decay)
                if config.momentum:
                    torch._foreach_mul_([running], config.momentum)
                    torch._foreach_add_([running], direction, alpha=1)
                    direction = [running]
                torch._foreach_add_([param], direction, alpha=-info.rate)
        return params, state

    return Optimizer(init, update)


def lion(config: OptimizerConfig) -> Optimizer:
    """Lion (arXiv 2302.06675), `β` is `beta1` and `μ` is `momentum`, there called `β₂`:

        p ← p · (1 - rate · decay) - rate · sign(β m + (1 - β) g)
        m ← m + (1 - μ)(g - m)

    Every entry moves by the rate, whatever its gradient: so the rate is a fraction of AdamW's.
    """

    def init(params: Params, roles: dict[str, Role]) -> Params:
        return zeros(params)

    def update(grads: Params, state: Params, params: Params, info: UpdateInfo) -> Any:
        params, state = writable((params, state), info)
        for name, whole_grad in grads.items():
            decay = decay_of(config, info.leaves[name])
            for grad, mean, param in _blocks(whole_grad, state[name], params[name]):
                if decay:
                    param.mul_(1 - info.rate * decay)
                direction = mean.lerp(grad, 1 - config.beta1).sign_()
                param.add_(direction, alpha=-info.rate)
                mean.lerp_(grad, 1 - config.momentum)
        return params, state

    return Optimizer(init, update)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
    "sgd": sgd,
    "lion": lion,
}
"""What `optimizer.name` can be, beside a user's own function of `OptimizerConfig`. Which settings
each of them reads is in `base.sections.READERS`."""


@lru_cache(maxsize=16)
def named_optimizer(config: OptimizerConfig) -> Optimizer:
    """The optimizer that `optimizer.name` names: of `OPTIMIZERS`, or "module:function".

    Raises:
        UserError: neither, or the function returns something else than an `Optimizer`.
    """
    make = find(config.name, OPTIMIZERS, "optimizer.name", ("config",))
    if config.name in OPTIMIZERS:
        return make(config)

    given = f"optimizer.name = {config.name!r}"
    wanted = "it must take an OptimizerConfig and return an Optimizer(init, update)"
    made = call_own(make, (config,), f"{given}: the function", wanted)
    if not isinstance(made, Optimizer):
        raise UserError(f"{given}: the function returned {type(made).__name__}; {wanted}")
    return own_optimizer(made, given)


def own_optimizer(optimizer: Optimizer, given: str) -> Optimizer:
    """A user's optimizer, which refuses what would go wrong later: a run goes on from a state of
    the leaves that `init` makes.

    Its functions raise `UserError`: one fails, or a leaf is no tensor or not what it was. `given`
    names the optimizer in errors.
    """

    def init(params: Params, roles: dict[str, Role]) -> Any:
        wanted = "it must take (params, roles), of device 'meta' too, and return a tree of tensors"
        state = call_own(optimizer.init, (params, roles), f"{given}: init", wanted)
        for name, leaf in named_leaves(state).items():
            if not isinstance(leaf, Tensor):
                raise UserError(
                    f"{given}: init returned a state in which {name or 'the whole'} is "
                    f"{shown(leaf)}; it must be a tensor, as torch.tensor(0)"
                )
        return state

    def update(grads: Params, state: Any, params: Params, info: UpdateInfo) -> tuple[Params, Any]:
        # What the leaves are, before any is written into.
        params_were, state_was = _form_of(params), _form_of(state)
        wanted = "it must take (grads, state, params, info) and return (params, state)"
        updated = call_own(
            optimizer.update, (grads, state, params, info), f"{given}: update", wanted
        )
        if not isinstance(updated, tuple) or len(updated) != 2:
            raise UserError(f"{given}: update returned {type(updated).__name__}; {wanted}")

        found, after = updated
        found = dict(found) if isinstance(found, dict) else found
        _check_form(found, params_were, f"{given}: update returned params")
        _check_form(after, state_was, f"{given}: update returned a state")
        # In their order: the bits of the norm depend on it.
        return {name: found[name] for name in params}, after

    return Optimizer(init, update)


class _Form(NamedTuple):
    """What stays of a tree when it is updated."""

    structure: Any  # optree's
    leaves: dict[str, str]  # by name, as `_kind_of`


def _form_of(tree: Any) -> _Form:
    leaves = {name: _kind_of(leaf) for name, leaf in named_leaves(tree).items()}
    return _Form(optree.tree_structure(tree), leaves)


def _kind_of(leaf: Any) -> str:
    """A tensor's shape and dtype, or what else it is."""
    if not isinstance(leaf, Tensor):
        return shown(leaf)
    return f"a tensor of shape {tuple(leaf.shape)} and dtype {leaf.dtype}"


def _check_form(tree: Any, form: _Form, returned: str) -> None:
    """Refuse a tree of another form.

    Raises:
        UserError: names the first leaf that is not as it was; the message begins with `returned`.
    """
    found = _form_of(tree)
    for name in sorted(found.leaves.keys() ^ form.leaves.keys()):
        fault = "is missing" if name in form.leaves else "was not before"
        raise UserError(f"{returned} in which {name} {fault}; return the leaves that it was given")
    for name, kind in form.leaves.items():
        if found.leaves[name] != kind:
            raise UserError(
                f"{returned} in which {name or 'the whole'} is {found.leaves[name]}; it must be "
                f"{kind}, as it was given"
            )
    if found.structure != form.structure:
        raise UserError(
            f"{returned} of another structure, {shown(found.structure)}; return that which it was "
            "given"
        )


def clip(grads: Params, norm: Tensor, max_norm: float, donate: bool = False) -> Params:
    """Scale gradients, whose global norm is `norm`, by `max_norm / (norm + 1e-6)`, at most 1.

    `donate`: in place.
    """
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: torch.mul(g, scale, out=g if donate else None) for name, g in grads.items()}
