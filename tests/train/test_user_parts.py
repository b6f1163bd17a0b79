"""What a user's own loss or optimizer returns is checked where it would go wrong silently."""

import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.named import find
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from tests.train.run_problem import make_problem, train_in

CASE = Case(lengths=(9, 6), steps=3, mask="full", normalization="mask")
NUMERICS = pytest.mark.parametrize("numerics", ["plain", "fast"])


def config_of(numerics: Any) -> e3.Config:
    config = CASE.config()
    return replace(config, objective=replace(config.objective, numerics=numerics))


def loss_and_gradient(numerics: str, loss: Any, scale: float = 1.0) -> tuple[Any, Any]:
    batch = tiny_batch(CASE)
    batch = batch._replace(label_hidden=batch.label_hidden * scale)
    fns = e3.bind(config_of(numerics), tiny_frozen(CASE), loss=loss)
    return e3.value_and_grad(fns.forward_loss, has_aux=True)(tiny_params(CASE), batch)


UPDATES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda params: ({name: leaf[:1] for name, leaf in params.items()}, ()),
    "dtype": lambda params: ({name: leaf.half() for name, leaf in params.items()}, ()),
    "is missing": lambda params: ({}, ()),
    "was not before": lambda params: (params | {"more": torch.zeros(1)}, ()),
    "returned NoneType; it must": lambda params: None,
}


@pytest.mark.parametrize("message", UPDATES)
@pytest.mark.parametrize("donate", [False, True])
def test_an_optimizer_returns_the_parameters_as_they_were(message: str, donate: bool) -> None:
    optimizer = e3.Optimizer(
        init=lambda params, roles: (),
        update=lambda grads, state, params, info: UPDATES[message](params),
    )
    fns = e3.bind(config_of("fast"), tiny_frozen(CASE), optimizer=optimizer)
    state = fns.init_state(tiny_params(CASE))
    with pytest.raises(e3.UserError, match=f"optimizer.*{message}"):
        fns.step(state, tiny_batch(CASE), donate=donate)


STATES: dict[str, tuple[Any, Any]] = {
    "n was not before": ({}, {"n": torch.zeros(())}),
    "n is missing": ({"n": torch.zeros(())}, {}),
    "n is a tensor of shape (2,)": ({"n": torch.zeros(3)}, {"n": torch.zeros(2)}),
    "n is a tensor of shape () and dtype torch.int64": (
        {"n": torch.zeros(())},
        {"n": torch.tensor(0)},
    ),
    "n is 1; it must be a tensor of shape ()": ({"n": torch.zeros(())}, {"n": 1}),
    "the whole is a tensor of shape (2,)": (torch.zeros(3), torch.zeros(2)),
    "of another structure": ((torch.zeros(3),), [torch.zeros(3)]),
}


@pytest.mark.parametrize("message", STATES)
@pytest.mark.parametrize("donate", [False, True])
def test_an_optimizer_returns_a_state_of_the_leaves_that_it_was_given(message: str, donate: bool):
    """A checkpoint is read into the state that `init` makes: another could not be gone on from."""
    first, after = STATES[message]
    optimizer = e3.Optimizer(
        init=lambda params, roles: first,
        update=lambda grads, state, params, info: (params, after),
    )
    fns = e3.bind(config_of("fast"), tiny_frozen(CASE), optimizer=optimizer)
    state = fns.init_state(tiny_params(CASE))
    with pytest.raises(e3.UserError, match=f"optimizer: update .*{re.escape(message)}"):
        fns.step(state, tiny_batch(CASE), donate=donate)


def test_parameters_in_another_order_or_kind_of_dict_are_put_in_theirs() -> None:
    """On it the bits of the norm depend, and a resumed run has it."""
    optimizer = e3.Optimizer(
        init=lambda params, roles: (),
        update=lambda grads, state, params, info: (OrderedDict(reversed(params.items())), state),
    )
    fns = e3.bind(config_of("fast"), tiny_frozen(CASE), optimizer=optimizer)
    state = fns.init_state(tiny_params(CASE))
    after, _ = fns.step(state, tiny_batch(CASE))
    assert type(after.masters) is dict
    assert [*after.masters] == [*state.masters]


def raises(*arguments: Any) -> Any:
    """A part that fails."""
    raise KeyError("one\ntwo")


def fails_in_init(config: e3.OptimizerConfig) -> e3.Optimizer:
    return e3.Optimizer(raises, raises)


def fails_in_update(config: e3.OptimizerConfig) -> e3.Optimizer:
    return e3.Optimizer(lambda params, roles: {}, raises)


def has_a_number(config: e3.OptimizerConfig) -> e3.Optimizer:
    return e3.Optimizer(lambda params, roles: {"n": 0}, raises)


def ends_the_program(config: e3.OptimizerConfig) -> e3.Optimizer:
    return e3.Optimizer(lambda params, roles: sys.exit(3), raises)


def with_optimizer(name: str) -> e3.Config:
    config = config_of("fast")
    return replace(config, optimizer=replace(config.optimizer, name=f"{__name__}:{name}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_in_init", "init raised KeyError: 'one\\ntwo'; it must take (params, roles), of"),
        ("has_a_number", "init returned a state in which n is 0; it must be a tensor, as torch."),
        ("ends_the_program", "init raised SystemExit: 3; it must take (params, roles), of"),
    ],
)
def test_an_optimizer_without_a_first_state_is_refused_before_anything_is_written(
    name: str, message: str, tmp_path: Path
) -> None:
    problem = make_problem(tmp_path / "features")
    optimizer = with_optimizer(name).optimizer
    problem = problem._replace(config=replace(problem.config, optimizer=optimizer))
    message = re.escape(f"optimizer.name = '{__name__}:{name}': {message}")
    with pytest.raises(e3.UserError, match=message) as refused:
        train_in(tmp_path / "run", problem)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "run").rglob("*.*"))


def test_an_optimizer_whose_update_fails_is_named() -> None:
    fns = e3.bind(with_optimizer("fails_in_update"), tiny_frozen(CASE))
    state = fns.init_state(tiny_params(CASE))
    message = (
        "fails_in_update': update raised KeyError: 'one.*'; it must take .grads, state, params"
    )
    with pytest.raises(e3.UserError, match=message) as refused:
        fns.step(state, tiny_batch(CASE))
    assert isinstance(refused.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no room")])
def test_an_interrupt_and_too_little_memory_stay_what_they_are(error: BaseException) -> None:
    def fails(*arguments: Any) -> Any:
        raise error

    optimizer = e3.Optimizer(lambda params, roles: {}, fails)
    fns = e3.bind(config_of("fast"), tiny_frozen(CASE), optimizer=optimizer)
    with pytest.raises(type(error)):
        fns.step(fns.init_state(tiny_params(CASE)), tiny_batch(CASE))


def nla_of_division(logits: torch.Tensor, draft: torch.Tensor, p_full: torch.Tensor) -> Any:
    """Not finite where no token is accepted, as in rows that do not count."""
    accept = torch.minimum(p_full, draft).sum(-1)
    below = (draft < p_full) * draft
    gradient = -(below - draft * below.sum(-1, keepdim=True)) / accept[..., None]
    return -accept.log(), gradient


def test_a_closed_form_that_is_not_finite_where_no_pair_counts() -> None:
    """Rows whose label is outside the draft vocabulary have no part in the gradient."""
    nla = e3.LOSSES["nla"]
    _, wanted = loss_and_gradient("fast", nla, scale=300)
    _, found = loss_and_gradient("fast", nla._replace(closed=nla_of_division), scale=300)
    for name, grad in found.items():
        assert torch.isfinite(grad).all(), name
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_closed_form_is_a_pair_of_the_right_shapes() -> None:
    def loss(closed: Callable[..., Any]) -> e3.RowLoss:
        return e3.LOSSES["kl"]._replace(closed=closed, kernel=None)

    kl = e3.LOSSES["kl"].closed
    assert kl is not None
    for closed in (
        lambda *inputs: kl(*inputs)[0],
        lambda *inputs: (kl(*inputs)[0], kl(*inputs)[1][..., :1]),
        lambda *inputs: (kl(*inputs)[0].sum(), kl(*inputs)[1]),
    ):
        with pytest.raises(e3.UserError, match="must be"):
            loss_and_gradient("fast", loss(closed))


def writes_later(logits: torch.Tensor) -> torch.Tensor:
    """Over what its own gradient is computed from."""
    weights = logits.exp()
    rows = (weights * weights).sum(-1)
    weights.mul_(2)
    return rows


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "writes into p": (
        lambda logits, p, q: (p.mul_(0.5) - logits).sum(-1),
        "wrote into p_draft or p_full, which others read; copy them",
    ),
    "writes into the logits": (
        lambda logits, p, q: logits.mul_(2).sum(-1),
        "the function raised RuntimeError: .*in-place operation.*; it must be torch operations",
    ),
    "writes over its gradient's": (
        lambda logits, p, q: writes_later(logits),
        "the gradient of the function raised RuntimeError: .*modified by an inplace operation",
    ),
    "raises": (raises, r"the function raised KeyError: 'one.*two'; it must be torch operations"),
    "ends": (lambda logits, p, q: sys.exit(3), "the function raised SystemExit: 3; it must be"),
    "leaves torch": (lambda logits, p, q: logits.numpy().sum(-1), "the function raised Runtime"),
    "mean": (lambda logits, p, q: logits.mean(), r"returned shape \(\), .*, one value a row"),
    "word": (lambda logits, p, q: "0.5", "the function returned str; it must be a floating-point"),
    "number": (lambda logits, p, q: 1, "the function returned int; it must be a floating-point"),
    "whole numbers": (lambda logits, p, q: logits.argmax(-1), "int64; it must be a floating-point"),
    "complex": (lambda logits, p, q: logits.sum(-1) * 1j, "complex64; it must be a floating-point"),
    "detached": (lambda logits, p, q: logits.detach().sum(-1), "has no gradient by the logits, so"),
    "zero": (lambda logits, p, q: torch.zeros(logits.shape[:-1]), "has no gradient by the logits"),
}


@NUMERICS
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_cannot_train_is_refused_before_any_work(name: str, numerics: str) -> None:
    loss, message = LOSSES[name]
    with pytest.raises(e3.UserError, match=f"^the loss that was given: .*{message}") as refused:
        e3.bind(config_of(numerics), tiny_frozen(CASE), loss=loss)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("loss", [f"{__name__}:raises", {f"{__name__}:raises": 0.9, "ce": 0.1}])
def test_a_named_loss_that_fails_is_refused_before_anything_is_written(
    loss: Any, tmp_path: Path
) -> None:
    """In a sum too, where the others train."""
    problem = make_problem(tmp_path / "features", loss=loss)
    message = f"objective.loss = '{__name__}:raises': the function raised KeyError"
    with pytest.raises(e3.UserError, match=message) as refused:
        train_in(tmp_path / "run", problem)
    assert isinstance(refused.value.__cause__, KeyError)
    assert not list((tmp_path / "run").rglob("*.*"))


@NUMERICS
def test_a_loss_that_fails_at_a_later_batch_is_named(numerics: str) -> None:
    """Under the fast numerics from inside of their own derivative, under `vmap` too."""
    allowed = [2]

    def fails(logits: torch.Tensor, p_draft: torch.Tensor, p_full: torch.Tensor) -> torch.Tensor:
        if not allowed:
            raise ValueError("no more")
        return logits.sum(-1)

    fns = e3.bind(config_of(numerics), tiny_frozen(CASE), loss=fails)
    params, batch = tiny_params(CASE), tiny_batch(CASE)
    allowed.clear()
    message = "^the loss that was given: the function raised ValueError: no more; it must be torch"
    with pytest.raises(e3.UserError, match=message):
        fns.step(fns.init_state(params), batch)
    stacked = {name: leaf.expand(2, *leaf.shape) for name, leaf in params.items()}
    with pytest.raises(e3.UserError, match=message):
        torch.func.vmap(lambda params: fns.forward_loss(params, batch)[0])(stacked)


def test_a_trial_leaves_the_random_numbers_as_they_are() -> None:
    before = torch.get_rng_state()
    e3.bind(config_of("fast"), tiny_frozen(CASE), loss=lambda logits, p, q: logits.sum(-1))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_are_settings_and_needs_are_known() -> None:
    frozen = tiny_frozen(CASE)
    with pytest.raises(e3.UserError, match=r"loss = 'kl' is a name; .*ObjectiveConfig.loss='kl'"):
        e3.bind(config_of("fast"), frozen, loss="kl")  # pyright: ignore[reportArgumentType]
    with pytest.raises(e3.UserError, match="optimizer is function; it must be"):
        e3.bind(config_of("fast"), frozen, optimizer=e3.OPTIMIZERS["muon"])  # pyright: ignore
    with pytest.raises(e3.UserError, match="needs 'temperature'"):
        e3.bind(config_of("fast"), frozen, loss=e3.RowLoss(torch.sum, needs=("temperature",)))


@pytest.mark.parametrize("body", ["import sys; sys.exit(3)", "raise ValueError('one\\ntwo')"])
def test_a_module_that_ends_or_fails_is_one_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    name = f"fails_{len(body)}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(e3.UserError, match="cannot be imported") as refused:
        find(f"{name}:f", {}, "objective.loss", ())
    assert "\n" not in str(refused.value)


def test_a_factory_that_raises_is_one_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_factory.py").write_text("def make(config):\n    raise KeyError('lr')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("fast")
    config = replace(config, optimizer=replace(config.optimizer, name="bad_factory:make"))
    with pytest.raises(e3.UserError, match="the function raised KeyError"):
        e3.bind(config, tiny_frozen(CASE)).init_state(tiny_params(CASE))


def test_a_label_past_the_end_belongs_to_no_other_sample() -> None:
    """A row mask that trains one, which `collate` never makes, does not reach the next sample."""
    batch = tiny_batch(CASE)
    mask = torch.zeros_like(batch.row_mask)
    mask[0, 2, 8] = 1
    mask[1, 0, 1] = 1
    params, frozen = tiny_params(CASE), tiny_frozen(CASE)
    found = [
        e3.forward_loss(params, batch._replace(row_mask=mask), config=config_of(n), frozen=frozen)
        for n in ("plain", "fast")
    ]
    torch.testing.assert_close(found[0][1].accept, found[1][1].accept)
