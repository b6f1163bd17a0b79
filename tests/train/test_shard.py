"""The sharded state: four ranks run the checks of `ranks_job`; the rest is one process."""

import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves
from eagle3fn.train.reduce import _fold, total
from eagle3fn.train.shard import rows_of, specs
from tests.factories import make_frozen
from tests.train.ranks_job import CHECKS
from tests.train.ranks_problem import micro_batches, refused, train, uneven_config
from tests.train.start_ranks import torchrun

NAMES = [f"{check.__name__}-{n}" for check, counts in CHECKS for n in counts]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What went wrong in each check; empty for one that passed."""
    path = tmp_path_factory.mktemp("ranks") / "results.json"
    ended = torchrun(4, "-m", "tests.train.ranks_job", path)
    assert ended.codes == [0], ended.text
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_on_ranks(results, name):
    assert not results[name], results[name]


def test_rows_are_cut_as_torch_chunk_cuts_them():
    for rows in (1, 2, 7, 8, 9):
        for world in (1, 2, 3, 4):
            mine = [list(rows_of(rows, world, rank)) for rank in range(world)]
            expected = [part.tolist() for part in torch.arange(rows).chunk(world)]
            assert [part for part in mine if part] == expected


class NothingAllocated(TorchDispatchMode):
    """Refuses operations that make tensors, but 0-d ones and those of the device "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert not isinstance(made, torch.Tensor) or made.is_meta or not made.ndim, func
        return made


def test_specs_need_no_process_and_no_memory():
    config = uneven_config()
    with NothingAllocated():
        assert e3.state_specs(config).masters == specs(config, 1, 0).masters

    name = "masters.midlayer.self_attn.k_proj.weight"
    found: list[Any] = [named_leaves(specs(config, 3, rank))[name] for rank in range(3)]
    assert [spec.local_shape for spec in found] == [(1, 32), (1, 32), (0, 32)]
    assert {spec.shape for spec in found} == {(2, 32)}


def brackets(count: int, reduce: str) -> str:
    """The brackets in which `total` adds `count` parts: tensors that record the text of a sum."""

    class Recorded(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func is torch.add
            return record(f"({args[0].text}+{args[1].text})")

    def record(text: str) -> torch.Tensor:
        leaf = torch.zeros(()).as_subclass(Recorded)
        leaf.text = text  # pyright: ignore[reportAttributeAccessIssue]
        return leaf

    summed: Any = total((record(str(i)) for i in range(count)), count, reduce)
    return summed.text


def test_tree_reduction_is_fixed_and_a_ranks_block_is_a_subtree():
    assert brackets(4, "tree") == "((0+1)+(2+3))"
    assert brackets(6, "tree") == "(((0+1)+2)+((3+4)+5))"
    assert brackets(4, "sum") == "(((0+1)+2)+3)"
    assert brackets(3, "tree") in brackets(12, "tree")
    assert brackets(6, "tree") in brackets(12, "tree")


def test_row_sums_of_squares_do_not_depend_on_the_number_of_rows():
    x = torch.randn(37, 129, generator=torch.Generator().manual_seed(0))
    whole = _fold(x.square())
    assert torch.allclose(whole, x.square().sum(1))
    for first in range(0, 37, 5):
        for last in range(first, 38, 4):
            assert torch.equal(_fold(x[first:last].square()), whole[first:last])


def addresses(state: Any) -> dict[str, int]:
    """Where the leaves' memory is; all but `step`."""
    leaves = named_leaves(state)
    return {name: leaf.data_ptr() for name, leaf in leaves.items() if name != "step"}


def test_donated_step_reuses_the_buffers():
    config = uneven_config(dtype="bfloat16")
    fns = e3.bind(config, make_frozen(config))
    state = fns.init_state(fns.init(0))
    before = addresses(state)
    after, _ = fns.step(state, micro_batches(0, 1, None), donate=True)
    assert addresses(after) == before
    assert int(after.step) == 1


def test_donated_state_is_refused_wherever_it_is_touched():
    config = uneven_config(dtype="bfloat16")
    fns = e3.bind(config, make_frozen(config))
    state = fns.init_state(fns.init(0))
    leaf = state.params["fc.weight"]
    batches = micro_batches(0, 1, None)
    after, _ = fns.step(state, batches, donate=True)

    touches = (
        lambda: leaf + 1,
        lambda: leaf.shape,
        lambda: int(state.step),
        lambda: equal(state, after),
        lambda: fns.step(state, batches),
        lambda: fns.forward_loss(state.params, batches[0]),
    )
    for touch in touches:
        refused(touch, "donate=True")


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_donated_state_cannot_be_differentiated(numerics):
    config = uneven_config(numerics=numerics)
    fns = e3.bind(config, make_frozen(config))
    batch = micro_batches(0, 1, None)[0]
    state = fns.init_state(fns.init(0))
    params = state.params
    fns.step(state, batch, donate=True)
    compute = e3.value_and_grad(fns.forward_loss, has_aux=True)
    with pytest.raises(e3.UserError, match=r"has shape \(0,\)"):
        compute(params, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce", ["sum", "tree"])
def test_donating_keeps_the_bits(reduce, dtype):
    config = uneven_config(reduce, dtype)
    assert equal(train(config, None), train(config, None, donate=True))


def test_tree_reduction_of_bf16_sums_is_refused():
    train = uneven_config("tree").train
    optimizer = e3.OptimizerConfig(accumulation="params")
    with pytest.raises(e3.UserError, match=r"train\.reduce = 'tree'"):
        e3.Config(uneven_config().draft, optimizer=optimizer, train=train)


def test_gather_leaves_a_plain_state_as_it_is():
    state, _ = train(uneven_config(), None)
    assert equal(e3.gather(state), state)
