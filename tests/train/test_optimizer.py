"""Every optimizer of the table under the same laws; AdamW, Muon and SGD beside torch's, Lion by its
formula.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eagle3fn as e3
from eagle3fn.base.sections import READERS, OptimizerConfig, Role
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.base.types import Params, TrainState
from eagle3fn.model.table import roles
from eagle3fn.train.checkpoint import load_checkpoint, save_checkpoint
from eagle3fn.train.optimizer import (
    OPTIMIZERS,
    Leaf,
    Optimizer,
    UpdateInfo,
    adamw,
    lion,
    muon,
    sgd,
)
from eagle3fn.train.orthogonal import newton_schulz
from eagle3fn.train.shard import empty_state, on_whole
from tests.factories import make_batch, make_config, make_frozen


def settings(name: str, dtype: str = "bfloat16") -> e3.Config:
    """A tiny draft under an optimizer, with weight decay."""
    config = make_config(dtype)
    choice = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
    return replace(config, optimizer=choice)


def updated(state: TrainState, config: e3.Config, count: int, donate: bool = False) -> TrainState:
    """The state some updates later; each update has a batch of its own."""
    fns = e3.bind(config, make_frozen(config))
    for _ in range(count):
        state, _ = fns.step(state, make_batch(int(state.step), (7, 5)), donate=donate)
    return state


def first_state(config: e3.Config) -> TrainState:
    fns = e3.bind(config, make_frozen(config))
    return fns.init_state(fns.init(0))


def info_of(params: Params, step: int = 0, donate: bool = False) -> UpdateInfo:
    """One rank's; a leaf with two axes is a matrix."""
    leaves = {}
    for name, leaf in params.items():
        role = "matrix" if leaf.ndim == 2 else "norm"
        leaves[name] = Leaf(role, tuple(leaf.shape))
    return UpdateInfo(step, 1e-2, leaves, partial(on_whole, leaves=leaves, mesh=None), donate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_donated_state_gives_the_same_bits(name: str) -> None:
    config = settings(name)
    kept = updated(first_state(config), config, 3)
    assert equal(updated(first_state(config), config, 3, donate=True), kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_and_update_leave_their_arguments_as_they_are(name: str) -> None:
    config = settings(name)
    optimizer = OPTIMIZERS[name](config.optimizer)
    params = e3.init_params(config.draft, 0, torch.float32)
    grads = e3.init_params(config.draft, 1, torch.float32)
    state = optimizer.init(params, roles(config.draft))

    given = (grads, state, params)
    before = tree_map(torch.clone, given)
    after, _ = optimizer.update(*given, info_of(params))
    assert equal(given, before)
    assert list(after) == list(params)
    assert not any(torch.equal(after[name], params[name]) for name in params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_its_specs_say(name: str) -> None:
    config = settings(name)
    specs: dict[str, Any] = named_leaves(e3.state_specs(config))
    state = named_leaves(first_state(config))
    assert specs.keys() == state.keys()
    for leaf, spec in specs.items():
        assert (spec.local_shape, spec.dtype) == (tuple(state[leaf].shape), state[leaf].dtype), leaf


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_read_from_a_checkpoint_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    config = settings(name)
    state = updated(first_state(config), config, 2)
    path = save_checkpoint(tmp_path, state, config, {}, {}, keep=1)
    found = load_checkpoint(path, empty_state(config, "cpu"), config, {}).state
    assert equal(updated(found, config, 2), updated(state, config, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls(name: str) -> None:
    config = settings(name, "float32")
    fns = e3.bind(config, make_frozen(config))
    state = fns.init_state(fns.init(0))
    batch = make_batch(0, (9, 7))
    losses = []
    rate = {"sgd": 0.3, "lion": 3e-3}.get(name)
    for _ in range(12):
        state, metrics = fns.step(state, batch, rate=rate)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    config = settings("adamw")
    path = save_checkpoint(tmp_path, first_state(config), config, {}, {}, keep=1)
    other = settings("muon")
    with pytest.raises(e3.UserError, match=r"optimizer\.name was 'adamw', is 'muon'"):
        load_checkpoint(path, empty_state(other, "cpu"), other, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"matrices": "all"},
            r"matrices = 'all': optimizer\.name = 'adamw' does not read it",
        ),
        (
            {"matrix_factor": 3.0},
            r"matrix_factor = 3\.0: optimizer\.name = 'adamw' does not read it",
        ),
        (
            {"momentum": 0.9},
            r"momentum = 0\.9: optimizer\.name = 'adamw' does not read it; set "
            r"optimizer\.momentum=0\.95, its default, or optimizer\.name = 'muon' or 'sgd' or "
            r"'lion'",
        ),
        (
            {"name": "lion", "eps": 1e-6},
            r"eps = 1e-06: optimizer\.name = 'lion' does not read it; set optimizer\.eps=1e-08, "
            r"its default, or optimizer\.name = 'adamw' or 'muon'",
        ),
        ({"name": "sgd", "beta1": 0.5}, r"beta1 = 0\.5: optimizer\.name = 'sgd' does not read it"),
        (
            {"cooldown_ratio": 0.5},
            r"cooldown_ratio = 0\.5: optimizer\.schedule = 'cosine' does not read it; set "
            r"optimizer\.cooldown_ratio=0\.2, its default, or optimizer\.schedule = 'wsd'",
        ),
        (
            {"schedule": "wsd", "warmup_ratio": 0.5, "cooldown_ratio": 0.6},
            r"cooldown_ratio = 0\.6: must be at most 1 - optimizer\.warmup_ratio = 0\.5",
        ),
        ({"schedule": "wsd", "cooldown_ratio": 0.0}, r"cooldown_ratio = 0\.0: must be above 0"),
        (
            {"weight_decay": 0.1, "decay_roles": ()},
            r"decay_roles = \(\): must be one or several of",
        ),
        (
            {"weight_decay": 0.1, "decay_roles": ("norms",)},
            r"decay_roles = \('norms',\): must be one or several of 'attention', 'matrix'",
        ),
        ({"weight_decay": 0.1, "decay_roles": "norm"}, r"decay_roles = 'norm': must be one or"),
        (
            {"decay_roles": ("norm",)},
            r"decay_roles = \('norm',\): nothing decays with optimizer\.weight_decay = 0; set "
            r"'optimizer\.decay_roles=\[\"attention\", .* \"bias\"\]', its default, or ",
        ),
        ({"name": "muon", "momentum": 1.0}, r"momentum = 1\.0: must be in \[0, 1\)"),
        ({"name": "muon", "matrix_factor": 0.0}, r"matrix_factor = 0\.0: must be above 0"),
        ({"name": "muon", "matrix_factor": torch.inf}, r"matrix_factor = inf: must be .*finite"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(e3.UserError, match=rf"optimizer\.{message}"):
        OptimizerConfig(**settings)


CHANGED: dict[str, Any] = {
    "beta1": 0.5,
    "beta2": 0.9,
    "eps": 0.1,
    "momentum": 0.5,
    "matrices": "all",
    "matrix_factor": 3.0,
}
"""Another value of every setting that some optimizers do not read."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_settings_of_an_optimizer_are_those_that_the_table_says(name: str) -> None:
    """What it reads changes the update, the rest is refused; a user's own may read any."""
    assert {setting for setting, row in READERS.items() if row.choice == "name"} == {*CHANGED}
    config = settings(name)
    expected = updated(first_state(config), config, 2).masters
    for setting, value in CHANGED.items():
        OptimizerConfig(**{"name": "module:function", setting: value})
        if name not in READERS[setting].values:
            with pytest.raises(e3.UserError, match=rf"optimizer\.{setting} = .*does not read it"):
                replace(config.optimizer, **{setting: value})
            continue
        changed = replace(config, optimizer=replace(config.optimizer, **{setting: value}))
        assert not equal(updated(first_state(changed), changed, 2).masters, expected), setting


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("role", get_args(Role))
def test_weight_decay_applies_to_the_roles_that_are_named(role: Role, name: str) -> None:
    """A leaf of the role has the bits of decay for all, every other leaf those of none."""
    # It has an embedding of its own, and biases; none of them is zero, of which nothing decays.
    draft = replace(make_config().draft, target_hidden_size=8, attention_bias=True)
    params = {leaf: x + 0.1 for leaf, x in e3.init_params(draft, 0, torch.float32).items()}
    grads = {leaf: x + 0.1 for leaf, x in e3.init_params(draft, 1, torch.float32).items()}
    kinds = roles(draft)
    assert {*kinds.values()} == {*get_args(Role)}
    leaves = {leaf: Leaf(kinds[leaf], tuple(value.shape)) for leaf, value in params.items()}
    info = info_of(params)._replace(leaves=leaves)
    info = info._replace(on_whole=partial(on_whole, leaves=leaves, mesh=None))

    after = []
    without = OptimizerConfig(name=name, learning_rate=1e-2)
    decayed = replace(without, weight_decay=0.5)
    for choice in (without, decayed, replace(decayed, decay_roles=(role,))):
        optimizer = OPTIMIZERS[name](choice)
        after.append(optimizer.update(grads, optimizer.init(params, kinds), params, info)[0])
    for leaf, kind in kinds.items():
        assert not torch.equal(after[0][leaf], after[1][leaf])
        assert torch.equal(after[2][leaf], after[kind == role][leaf]), leaf


# A user's own.


def descent(config: OptimizerConfig) -> Optimizer:
    """Gradient descent that counts its updates."""

    def update(grads: Params, state: Any, params: Params, info: UpdateInfo) -> Any:
        after = {name: params[name] - info.rate * grad for name, grad in grads.items()}
        return after, state + 1

    return Optimizer(lambda params, roles: torch.zeros((), dtype=torch.int64), update)


def not_an_optimizer(config: OptimizerConfig) -> float:
    return config.learning_rate


def test_own_optimizer_is_taken_as_a_value_and_by_name() -> None:
    config = settings(f"{__name__}:descent")
    named = updated(first_state(config), config, 2)
    assert named.opt == 2

    fns = e3.bind(make_config("bfloat16"), make_frozen(config), optimizer=descent(config.optimizer))
    state = fns.init_state(fns.init(0))
    for step in range(2):
        state, _ = fns.step(state, make_batch(step, (7, 5)))
    assert equal(state, named)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", r"must be one of 'adamw', .*or a function as 'module:function'"),
        ("no_such_module:f", "cannot be imported"),
        (f"{__name__}:not_an_optimizer", r"returned float; it must take an OptimizerConfig and"),
    ],
)
def test_name_of_no_optimizer_is_refused(name: str, message: str) -> None:
    config = settings(name)
    with pytest.raises(e3.UserError, match=rf"optimizer\.name = '{name}': .*{message}"):
        first_state(config)


# Beside torch's.


class ListOperations(TorchDispatchMode):
    """Records the operations on lists of tensors: name, and the arguments that are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in str(func):
            numbers = [part for part in args if not _is_list_of_tensors(part)]
            self.calls.append((str(func), numbers))
        return func(*args, **(kwargs or {}))


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and torch.is_tensor(value[0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("donate", [False, True])
def test_adamw_calls_the_list_operations_of_torch_adamw(decay: float, donate: bool) -> None:
    """On CUDA torch's own runs over lists of leaves, where a division is not by a reciprocal."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=decay)
    torch.manual_seed(0)
    leaf = torch.randn(6, 4)
    grad = torch.randn(6, 4)

    reference = torch.optim.AdamW([leaf.clone()], lr=1e-2, weight_decay=decay, foreach=True)
    (reference_leaf,) = reference.param_groups[0]["params"]

    optimizer = adamw(config)
    masters = {"a": leaf.clone()}
    state = optimizer.init(masters, {})

    for step in range(3):
        grads = {"a": grad * (step + 1)}
        reference_leaf.grad = grads["a"].clone()
        with ListOperations() as expected:
            reference.step()
        info = info_of(masters, step, donate)
        with ListOperations() as found:
            masters, state = optimizer.update(grads, state, masters, info)

        assert found.calls == expected.calls[1:]  # the first one counts torch's steps
        assert torch.equal(masters["a"], reference_leaf)
        assert torch.equal(state.nu["a"], reference.state[reference_leaf]["exp_avg_sq"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("donate", [False, True])
def test_sgd_has_the_bits_and_list_operations_of_torch_sgd(
    decay: float, donate: bool, momentum: float
) -> None:
    config = OptimizerConfig("sgd", learning_rate=1e-2, weight_decay=decay, momentum=momentum)
    optimizer = sgd(config)
    torch.manual_seed(0)
    leaf = torch.randn(6, 4)
    reference = torch.optim.SGD(
        [leaf.clone()], lr=1e-2, momentum=momentum, weight_decay=decay, foreach=True
    )
    (reference_leaf,) = reference.param_groups[0]["params"]

    masters = {"a": leaf.clone()}
    state = optimizer.init(masters, {})
    assert bool(state) == bool(momentum)
    for step in range(3):
        grads = {"a": torch.randn(6, 4)}
        reference_leaf.grad = grads["a"].clone()
        with ListOperations() as expected:
            reference.step()
        with ListOperations() as found:
            masters, state = optimizer.update(grads, state, masters, info_of(masters, step, donate))

        assert torch.equal(masters["a"], reference_leaf)
        if step:  # torch's first sum is the gradient itself
            assert found.calls == expected.calls
        if momentum:
            assert torch.equal(state["a"], reference.state[reference_leaf]["momentum_buffer"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("donate", [False, True])
def test_lion_is_its_formula_entry_by_entry(decay: float, donate: bool) -> None:
    """Beside plain numbers, in fp64: the sign of `β m + (1 - β) g`, then the running mean."""
    config = OptimizerConfig(
        name="lion", learning_rate=1e-2, weight_decay=decay, beta1=0.8, momentum=0.9
    )
    optimizer = lion(config)
    source = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(5, 3, generator=source, dtype=torch.float64)}
    state = optimizer.init(params, {})
    numbers = params["a"].flatten().tolist()
    means = [0.0] * len(numbers)
    for step in range(4):
        grads = {"a": torch.randn(5, 3, generator=source, dtype=torch.float64)}
        params, state = optimizer.update(grads, state, params, info_of(params, step, donate))
        for i, g in enumerate(grads["a"].flatten().tolist()):
            direction = 0.8 * means[i] + 0.2 * g
            numbers[i] = numbers[i] * (1 - 1e-2 * decay) - 1e-2 * math.copysign(1.0, direction)
            means[i] += 0.1 * (g - means[i])
        assert params["a"].flatten().tolist() == pytest.approx(numbers, rel=1e-13)
        assert state["a"].flatten().tolist() == pytest.approx(means, rel=1e-13)

    # An entry that never had a gradient stays where it is.
    none = {"a": torch.zeros(2, 2)}
    after, _ = lion(replace(config, weight_decay=0.0)).update(none, none, none, info_of(none))
    assert after["a"].count_nonzero() == 0


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_has_the_bits_of_torch_muon(shape: tuple[int, int], donate: bool) -> None:
    """For a matrix; a vector's update is AdamW's."""
    config = OptimizerConfig(
        name="muon", learning_rate=1e-2, weight_decay=0.1, momentum=0.9, matrix_factor=1.0
    )
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=source)
    vector = torch.randn(6, generator=source)

    reference = torch.optim.Muon(
        [matrix.clone()], lr=1e-2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    (reference_matrix,) = reference.param_groups[0]["params"]
    rest = adamw(config)
    rest_vector = {"b": vector}
    rest_state = rest.init(rest_vector, {})

    optimizer = muon(config, newton_schulz)
    params = {"a": matrix.clone(), "b": vector.clone()}
    state = optimizer.init(params, {"a": "attention", "b": "norm"})
    for step in range(3):
        grads = {"a": torch.randn(shape, generator=source), "b": torch.randn(6, generator=source)}
        reference_matrix.grad = grads["a"].clone()
        reference.step()
        rest_grads = {"b": grads["b"].clone()}
        rest_vector, rest_state = rest.update(
            rest_grads, rest_state, rest_vector, info_of(rest_vector, step)
        )

        params, state = optimizer.update(grads, state, params, info_of(params, step, donate))
        assert torch.equal(params["a"], reference_matrix)
        assert torch.equal(
            state.momentum["a"], reference.state[reference_matrix]["momentum_buffer"]
        )
        assert torch.equal(params["b"], rest_vector["b"])


@pytest.mark.parametrize(("matrices", "own"), [("attention", 4), ("all", 8)])
def test_muon_takes_the_matrices_that_are_named(matrices: Any, own: int) -> None:
    """Its own have a momentum; every other leaf moves as AdamW moves it."""
    config = settings("muon")
    config = replace(config, optimizer=replace(config.optimizer, matrices=matrices))
    params = e3.init_params(config.draft, 0, torch.float32)
    grads = e3.init_params(config.draft, 1, torch.float32)
    kinds = roles(config.draft)

    found = {}
    for name in ("muon", "adamw"):
        optimizer = OPTIMIZERS[name](config.optimizer)
        state = optimizer.init(params, kinds)
        found[name], _ = optimizer.update(grads, state, params, info_of(params))
        if name == "muon":
            assert len(state.momentum) == own
            assert {kinds[leaf] for leaf in state.momentum} <= {"attention", "matrix"}
            moved = set(state.momentum)
    for leaf in params:
        same = torch.equal(found["muon"][leaf], found["adamw"][leaf])
        assert same == (leaf not in moved), leaf
