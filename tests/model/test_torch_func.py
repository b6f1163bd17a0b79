"""The loss under `torch.func`: per-sample gradients, and derivatives of higher order.

`plain` composes with every transform. `fast` runs once for each entry of a `vmap`, and names
`objective.numerics = 'plain'` where it cannot.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, vjp, vmap

import eagle3fn as e3
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.losses import LOSSES
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import cases
from tests.model.blocks import error

# PyTorch warns of itself when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

BOTH = pytest.mark.parametrize("numerics", ["fast", "plain"])
FEW = settings(max_examples=max(8, settings().max_examples // 8))
SMALL = Case(dtype="float64", lengths=(6, 4, 5), steps=3, mask="full", normalization="mask")


class Problem(NamedTuple):
    config: e3.Config
    frozen: Frozen
    params: Params
    fields: tuple[Tensor, ...]  # the batch's first five, each with the samples as its first axis

    def loss_of_batch(self, params: Params, *fields: Tensor) -> Tensor:
        """The loss of a whole batch of these fields."""
        return self.with_aux(params, *fields)[0]

    def with_aux(self, params: Params, *fields: Tensor) -> tuple[Tensor, Aux]:
        batch = Batch(*fields)  # pyright: ignore[reportArgumentType]
        return e3.forward_loss(params, batch, config=self.config, frozen=self.frozen)

    def loss(self, params: Params, *sample: Tensor) -> Tensor:
        """The loss of one sample, whose fields have no batch axis."""
        return self.loss_of_batch(params, *(field[None] for field in sample))


def make_problem(case: Case, numerics: Any) -> Problem:
    config = case.config()
    config = replace(config, objective=replace(config.objective, numerics=numerics))
    return Problem(config, tiny_frozen(case), tiny_params(case), tuple(tiny_batch(case)[:5]))


def same(numerics: str, found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit under fast, which makes one call for each entry; to rounding under plain."""
    if numerics == "fast":
        return torch.equal(found, wanted)
    return error(found, wanted) < 1e-12


def seeds(case: Case, count: int) -> Params:
    """Parameters of several seeds, stacked along a first axis."""
    drawn = [tiny_params(replace(case, seed=seed)) for seed in range(count)]
    return {name: torch.stack([params[name] for params in drawn]) for name in drawn[0]}


def entry(params: Params, index: int) -> Params:
    return {name: leaf[index] for name, leaf in params.items()}


# Per-sample gradients.


@BOTH
@FEW
@given(data=st.data())
def test_per_sample_gradients_are_those_of_single_samples(
    numerics: str, data: st.DataObject
) -> None:
    case = data.draw(cases(dtype="float64", mask="drawn", own_positions=False))
    problem = make_problem(case, numerics)
    in_dims = (None, *[0] * 5)
    gradients = vmap(grad(problem.loss), in_dims=in_dims)(problem.params, *problem.fields)
    for sample in range(len(case.lengths)):
        fields = (field[sample] for field in problem.fields)
        wanted = grad(problem.loss)(problem.params, *fields)
        for name, gradient in wanted.items():
            assert same(numerics, gradients[name][sample], gradient), name


@BOTH
def test_per_sample_gradients_add_up_to_that_of_the_batch(numerics: str) -> None:
    """Under "rows" a sample's loss is a mean over its own rows."""
    case = replace(SMALL, normalization="rows")
    problem = make_problem(case, numerics)
    in_dims = (None, *[0] * 5)
    gradients = vmap(grad(problem.loss), in_dims=in_dims)(problem.params, *problem.fields)
    whole = grad(problem.loss_of_batch)(problem.params, *problem.fields)
    for name, gradient in whole.items():
        assert gradient.abs().sum() > 0
        assert error(gradients[name].mean(0), gradient) < 1e-12, name


@BOTH
@pytest.mark.parametrize("both", [False, True])
def test_vmap_over_parameters_alone_and_with_samples(numerics: str, both: bool) -> None:
    """Parameters of three seeds, on one sample or each on its own."""
    problem = make_problem(SMALL, numerics)
    stacked = seeds(SMALL, 3)
    fields = problem.fields
    if not both:
        fields = tuple(field[0] for field in fields)
    in_dims = (0, *[0 if both else None] * 5)
    gradients = vmap(grad(problem.loss), in_dims=in_dims)(stacked, *fields)
    for i in range(3):
        sample = [field[i] for field in fields] if both else fields
        wanted = grad(problem.loss)(entry(stacked, i), *sample)
        for name, gradient in wanted.items():
            assert same(numerics, gradients[name][i], gradient), name


@BOTH
def test_nested_vmap_is_every_pair_of_parameters_and_samples(numerics: str) -> None:
    problem = make_problem(SMALL, numerics)
    stacked = seeds(SMALL, 2)
    over_samples = vmap(grad(problem.loss), in_dims=(None, *[0] * 5))
    gradients = vmap(over_samples, in_dims=(0, *[None] * 5))(stacked, *problem.fields)
    for i in range(2):
        for sample in range(3):
            fields = (field[sample] for field in problem.fields)
            wanted = grad(problem.loss)(entry(stacked, i), *fields)
            for name, gradient in wanted.items():
                assert same(numerics, gradients[name][i, sample], gradient), name


@BOTH
def test_metrics_come_with_per_sample_gradients(numerics: str) -> None:
    """By `has_aux`; they are those of single samples."""
    problem = make_problem(SMALL, numerics)

    def with_aux(params: Params, *sample: Tensor) -> tuple[Tensor, Aux]:
        return problem.with_aux(params, *(field[None] for field in sample))

    function = grad(with_aux, has_aux=True)
    gradients, aux = vmap(function, in_dims=(None, *[0] * 5))(problem.params, *problem.fields)
    for sample in range(3):
        fields = [field[sample] for field in problem.fields]
        wanted, wanted_aux = function(problem.params, *fields)
        for name, gradient in wanted.items():
            assert same(numerics, gradients[name][sample], gradient), name
        for name, value in wanted_aux._asdict().items():
            found = getattr(aux, name)[sample]
            assert found.dtype == value.dtype
            assert same(numerics, found, value), name


@BOTH
def test_values_under_vmap_without_a_gradient(numerics: str) -> None:
    problem = make_problem(SMALL, numerics)
    found = vmap(problem.loss, in_dims=(None, *[0] * 5))(problem.params, *problem.fields)
    for sample in range(3):
        wanted = problem.loss(problem.params, *(field[sample] for field in problem.fields))
        assert same(numerics, found[sample], wanted)


@BOTH
def test_gradients_by_features_under_vmap(numerics: str) -> None:
    """The batch may be what is differentiated."""
    problem = make_problem(SMALL, numerics)
    by_features = grad(problem.loss, argnums=4)  # aux_hidden
    found = vmap(by_features, in_dims=(None, *[0] * 5))(problem.params, *problem.fields)
    for sample in range(3):
        wanted = by_features(problem.params, *(field[sample] for field in problem.fields))
        assert wanted.abs().sum() > 0
        assert same(numerics, found[sample], wanted)


# Higher orders.


def direction(params: Params) -> Params:
    """A direction in the parameters."""
    source = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(x.shape, generator=source, dtype=x.dtype) for name, x in params.items()
    }


def dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def moved(params: Params, along: Params, length: float) -> Params:
    return {name: x + length * along[name] for name, x in params.items()}


def of_parameters(numerics: str) -> tuple[Callable[[Params], Tensor], Params]:
    """The batch's loss as a function of the parameters, and parameters."""
    problem = make_problem(SMALL, numerics)
    return lambda params: problem.loss_of_batch(params, *problem.fields), problem.params


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_of_plain_is_the_slope(loss: str) -> None:
    # Under lk a constant weight: differences see no other.
    constant_weight: Any = {"kl_scale": 0.5, "kl_decay": 0.0} if loss == "lk" else {}
    problem = make_problem(replace(SMALL, loss=loss, **constant_weight), "plain")

    def loss_of(params: Params) -> Tensor:
        return problem.loss_of_batch(params, *problem.fields)

    along = direction(problem.params)
    value, slope, *_ = jvp(loss_of, (problem.params,), (along,))
    assert torch.equal(value, loss_of(problem.params))
    assert error(slope, dot(grad(loss_of)(problem.params), along)) < 1e-10

    # And that of differences.
    step = 1e-6
    above = loss_of(moved(problem.params, along, step))
    below = loss_of(moved(problem.params, along, -step))
    assert float(slope) == pytest.approx(float(above - below) / (2 * step), rel=1e-5)


def test_hessian_vector_products_of_plain() -> None:
    """Forward over reverse, reverse over reverse, and differences of gradients."""
    loss, params = of_parameters("plain")
    along = direction(params)
    _, forward_over_reverse, *_ = jvp(grad(loss), (params,), (along,))
    reverse_over_reverse = grad(lambda p: dot(grad(loss)(p), along))(params)

    step = 1e-6
    above = grad(loss)(moved(params, along, step))
    below = grad(loss)(moved(params, along, -step))
    for name, product in forward_over_reverse.items():
        assert product.abs().sum() > 0
        assert error(product, reverse_over_reverse[name]) < 1e-10, name
        assert error(product, (above[name] - below[name]) / (2 * step)) < 1e-4, name


def test_the_hessian_of_plain_is_symmetric_and_that_of_double_backward() -> None:
    """By one norm's weight."""
    loss, params = of_parameters("plain")
    name = "norm.weight"

    def of_norm(weight: Tensor) -> Tensor:
        return loss(params | {name: weight})

    found = hessian(of_norm)(params[name])
    wanted = torch.autograd.functional.hessian(of_norm, params[name])
    assert found.abs().sum() > 0
    assert error(found, found.T) < 1e-10
    assert error(found, torch.as_tensor(wanted)) < 1e-10


def test_per_sample_products_of_plain() -> None:
    """`vmap` of `jvp(grad)`: transforms nest."""
    problem = make_problem(SMALL, "plain")
    along = direction(problem.params)

    def product(*sample: Tensor) -> Params:
        def loss(params: Params) -> Tensor:
            return problem.loss(params, *sample)

        return jvp(grad(loss), (problem.params,), (along,))[1]

    found = vmap(product)(*problem.fields)
    for sample in range(3):
        wanted = product(*(field[sample] for field in problem.fields))
        for name, leaf in wanted.items():
            assert error(found[name][sample], leaf) < 1e-10, name


def second_backward(loss: Callable[[Params], Tensor], params: Params) -> Any:
    """The second derivative by PyTorch's tape."""
    leaves = {name: x.clone().requires_grad_() for name, x in params.items()}
    first = torch.autograd.grad(loss(leaves), [*leaves.values()], create_graph=True)
    return torch.autograd.grad(torch.stack([x.sum() for x in first]).sum(), [*leaves.values()])


REFUSED: dict[str, Callable[[Callable[[Params], Tensor], Params], Any]] = {
    "jvp": lambda loss, params: jvp(loss, (params,), (params,)),
    "jacfwd": lambda loss, params: jacfwd(lambda x: loss(params | {"norm.weight": x}))(
        params["norm.weight"]
    ),
    "jvp of grad": lambda loss, params: jvp(grad(loss), (params,), (params,)),
    "grad of grad": lambda loss, params: grad(lambda p: dot(grad(loss)(p), params))(params),
    "vjp of grad": lambda loss, params: vjp(grad(loss), params)[1](params),
    "hessian": lambda loss, params: hessian(lambda x: loss(params | {"norm.weight": x}))(
        params["norm.weight"]
    ),
    "backward of backward": second_backward,
}


@pytest.mark.parametrize("name", REFUSED)
def test_fast_refuses_in_one_sentence_that_names_plain(name: str) -> None:
    loss, params = of_parameters("fast")
    with pytest.raises(RuntimeError) as refused:
        REFUSED[name](loss, params)
    lines = str(refused.value).splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("use objective.numerics = 'plain'")

    plain, _ = of_parameters("plain")
    REFUSED[name](plain, params)


@pytest.mark.parametrize("name", ["jvp of grad", "grad of grad"])
def test_fast_refuses_higher_orders_under_vmap_too(name: str) -> None:
    problem = make_problem(SMALL, "fast")

    def higher(*sample: Tensor) -> Any:
        return REFUSED[name](lambda params: problem.loss(params, *sample), problem.params)

    with pytest.raises(e3.UserError, match=r"use objective\.numerics = 'plain'"):
        vmap(higher)(*problem.fields)
