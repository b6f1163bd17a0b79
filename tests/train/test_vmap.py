"""`torch.func.vmap` over states, rates and batches of `step`: the bits of one after another."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap

import eagle3fn as e3
from eagle3fn.base.entries import entry_by_entry
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.base.types import Batch, TrainState
from eagle3fn.train.bind import Functions
from eagle3fn.train.optimizer import OPTIMIZERS
from tests.factories import make_batch, make_config, make_frozen

RATES = torch.tensor([1e-3, 1e-2, 3e-2], dtype=torch.float64)


def bound(name: str = "adamw", numerics: str = "fast", dtype: str = "float32") -> Functions:
    config = make_config(dtype, numerics=numerics)
    optimizer = e3.OptimizerConfig(name=name, warmup_ratio=0.3)
    config = replace(config, optimizer=optimizer)
    return e3.bind(config, make_frozen(config))


def stacked(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def entry(tree: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index], tree)


def states_of(fns: Functions) -> list[TrainState]:
    """Three states of other seeds, the last one an update further."""
    states = [fns.init_state(fns.init(seed)) for seed in range(3)]
    states[2], _ = fns.step(states[2], make_batch(9, (6, 5)))
    return states


def as_tensors(metrics: dict[str, Any]) -> dict[str, Any]:
    """A plain call's metrics, its numbers as the tensors that they are under `vmap`."""
    return metrics | {
        "learning_rate": torch.tensor(metrics["learning_rate"], dtype=torch.float64),
        "skipped": torch.tensor(metrics["skipped"]),
    }


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_and_rates_have_the_bits_of_one_after_another(name: str, numerics: str) -> None:
    fns = bound(name, numerics)
    batch = make_batch(0, (7, 5))
    states = states_of(fns)

    def update(state: TrainState, rate: torch.Tensor) -> Any:
        return fns.step(state, batch, rate=rate)

    found, metrics = vmap(update)(stacked(states), RATES)
    for i, state in enumerate(states):
        expected, expected_metrics = fns.step(state, batch, rate=RATES[i])
        assert equal(entry(found, i), expected)
        assert equal(entry(metrics, i), as_tensors(expected_metrics))
    assert torch.equal(metrics["learning_rate"], RATES)


def test_rates_alone_and_the_schedules_rate_of_each_states_step() -> None:
    fns = bound()
    batch = make_batch(0, (7, 5))
    states = states_of(fns)

    found, _ = vmap(lambda rate: fns.step(states[0], batch, rate=rate))(RATES)
    for i, rate in enumerate(RATES):
        assert equal(entry(found, i), fns.step(states[0], batch, rate=float(rate))[0])

    found, metrics = vmap(lambda state: fns.step(state, batch))(stacked(states))
    assert metrics["learning_rate"][2] == 2 * metrics["learning_rate"][0]
    for i, state in enumerate(states):
        assert equal(entry(found, i), fns.step(state, batch)[0])


def test_axes_inside_axes_and_micro_batches() -> None:
    fns = bound("muon")
    states = states_of(fns)
    counts = torch.full((4,), 12.0)
    micro = tuple(make_batch(i, (7, 5))._replace(row_counts=counts) for i in range(2))

    def row(state: TrainState) -> Any:
        return vmap(lambda rate: fns.step(state, micro, rate=rate))(RATES)

    found, _ = vmap(row)(stacked(states))
    for i, state in enumerate(states):
        for j, rate in enumerate(RATES):
            expected, _ = fns.step(state, micro, rate=rate)
            assert equal(entry(entry(found, i), j), expected)


def test_batches_may_be_the_mapped_axis() -> None:
    fns = bound()
    state = states_of(fns)[0]
    batches = [make_batch(seed, (7, 5)) for seed in range(2)]
    fields = [torch.stack(column) for column in zip(*(b[:5] for b in batches), strict=True)]

    def update(*fields: torch.Tensor) -> Any:
        return fns.step(state, Batch(*fields))  # pyright: ignore

    found, _ = vmap(update)(*fields)
    for i, batch in enumerate(batches):
        assert equal(entry(found, i), fns.step(state, batch)[0])


def test_an_update_that_is_not_finite_is_dropped_alone() -> None:
    config = make_config(train={"on_nonfinite": "skip"})
    fns = e3.bind(config, make_frozen(config))
    state = fns.init_state(fns.init(0))
    batch = make_batch(0, (7, 5))
    scales = torch.tensor([1.0, torch.inf])

    def update(scale: torch.Tensor) -> Any:
        return fns.step(state, batch._replace(aux_hidden=batch.aux_hidden * scale))

    found, metrics = vmap(update)(scales)
    assert metrics["skipped"].tolist() == [0, 1]
    assert equal(entry(found, 0), fns.step(state, batch)[0])
    assert equal(entry(found, 1), state._replace(step=state.step + 1))


def test_arguments_stay_as_they_are() -> None:
    fns = bound()
    states = stacked(states_of(fns))
    before = tree_map(torch.clone, states)
    batch = make_batch(0, (7, 5))
    vmap(lambda state: fns.step(state, batch))(states)
    assert equal(states, before)


def test_frozen_parameters_of_a_module_leave_results_without_a_gradient() -> None:
    config = make_config()
    frozen = make_frozen(config)
    module = torch.nn.Parameter(frozen.target_head)
    fns = e3.bind(config, frozen._replace(target_head=module))
    state = fns.init_state(fns.init(0))
    batch = make_batch(0, (7, 5))
    after, metrics = vmap(lambda rate: fns.step(state, batch, rate=rate))(RATES)
    assert not any(leaf.requires_grad for leaf in named_leaves((after, metrics)).values())
    assert equal(entry(after, 1), fns.step(state, batch, rate=RATES[1])[0])


def test_rate_replaces_the_schedules() -> None:
    fns = bound()
    state = states_of(fns)[0]
    batch = make_batch(0, (7, 5))
    after, metrics = fns.step(state, batch, rate=0.25)
    assert metrics["learning_rate"] == 0.25
    again, _ = fns.step(state, batch, rate=torch.tensor(0.25))
    assert equal(after, again)
    with pytest.raises(e3.UserError, match=r"rate has shape \(3,\); .*torch\.func\.vmap"):
        fns.step(state, batch, rate=RATES)


def test_donation_under_vmap_is_refused() -> None:
    fns = bound()
    batch = make_batch(0, (7, 5))
    states = stacked(states_of(fns))
    with pytest.raises(
        e3.UserError, match=r"donate=True does not go under torch\.func; leave it out"
    ):
        vmap(lambda state: fns.step(state, batch, donate=True))(states)


def loss_after(fns: Functions, state: TrainState) -> Callable[..., torch.Tensor]:
    """The loss of a second update as a function of the first one's rate."""

    batches = [make_batch(seed, (7, 5)) for seed in range(2)]

    def function(rate: torch.Tensor) -> torch.Tensor:
        after, _ = fns.step(state, batches[0], rate=rate)
        return fns.step(after, batches[1])[1]["loss"]

    return function


# torch's own jvp warns at its first call.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivative_of_a_step_is_refused_with_a_remedy() -> None:
    fns = bound()
    function = loss_after(fns, states_of(fns)[0])
    rate = torch.tensor(1e-2)
    calls = (
        lambda: grad(function)(rate),
        lambda: grad(lambda rates: vmap(function)(rates).sum())(RATES),
        lambda: vmap(grad(function))(RATES),
        lambda: jvp(function, (rate,), (rate,)),
        lambda: function(rate.clone().requires_grad_()),
    )
    for call in calls:
        with pytest.raises(e3.UserError, match="no derivative; differentiate") as e:
            call()
        assert len(str(e.value).splitlines()) == 1


def test_entry_by_entry_keeps_structure_and_numbers() -> None:
    def function(tree: dict[str, Any], factor: float) -> Any:
        assert tree["x"].shape == (2,)
        return {"sum": tree["x"].sum() * factor, "count": 2, "none": tree["none"]}

    x = torch.arange(6.0).view(3, 2)
    loop = entry_by_entry(function, "do without")
    assert loop({"x": x[0], "none": None}, 2.0) == {"sum": 2.0, "count": 2, "none": None}

    found = vmap(lambda x: loop({"x": x, "none": None}, 0.5)["sum"])(x)
    assert torch.equal(found, x.sum(1) / 2)
    counts = vmap(lambda x: loop({"x": x, "none": None}, 0.5)["count"])(x)
    assert torch.equal(counts, torch.tensor([2, 2, 2]))
