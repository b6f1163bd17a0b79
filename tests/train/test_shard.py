"""The sharded state: one start of four ranks does the checks of `ranks_job`, the rest needs no second process."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves
from eagle3fn.train.reduce import _fold, total
from eagle3fn.train.shard import rows_of, specs
from tests.small import frozen_of
from tests.train.ranks_job import CHECKS
from tests.train.ranks_small import config_of, micro_batches, refused, train
from tests.train.start_ranks import torchrun

NAMES = [f"{check.__name__}-{n}" for check, counts in CHECKS for n in counts]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("ranks") / "results.json"
    ended = torchrun(4, "-m", "tests.train.ranks_job", path)
    assert ended.codes == [0], ended.text
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_on_ranks(results, name):
    assert not results[name], results[name]


def test_rows_are_cut_as_chunk_cuts_them():
    for rows in (1, 2, 7, 8, 9):
        for world in (1, 2, 3, 4):
            mine = [list(rows_of(rows, world, rank)) for rank in range(world)]
            wanted = [part.tolist() for part in torch.arange(rows).chunk(world)]
            assert [part for part in mine if part] == wanted


class OnlyTypes(TorchDispatchMode):
    """Refuses every operation but the promotion of dtypes, so that nothing can be allocated."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.promote_types.default, func
        return func(*args)


def test_specs_need_no_process_and_no_memory():
    with OnlyTypes():
        assert e3.state_specs(config_of()).masters == specs(config_of(), 1, 0).masters
    parts = [named_leaves(specs(config_of(), 3, rank)) for rank in range(3)]
    name = "masters.midlayer.self_attn.k_proj.weight"
    assert [part[name].local_shape for part in parts] == [(1, 32), (1, 32), (0, 32)]  # pyright: ignore
    assert {part[name].shape for part in parts} == {(2, 32)}


def as_text(count: int, how: str) -> str:
    """How `total` brackets its parts, by adding up a tensor of a subclass that only writes down its name."""
    written: list[str] = [str(i) for i in range(count)]

    class Written(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func is torch.add
            return name(f"({args[0].text}+{args[1].text})")

    def name(text: str) -> torch.Tensor:
        leaf = torch.zeros(()).as_subclass(Written)
        leaf.text = text  # pyright: ignore[reportAttributeAccessIssue]
        return leaf

    return total((name(text) for text in written), count, how).text


def test_the_tree_is_fixed_and_blocks_are_subtrees():
    assert as_text(4, "tree") == "((0+1)+(2+3))"
    assert as_text(6, "tree") == "(((0+1)+2)+((3+4)+5))"
    assert as_text(4, "sum") == "(((0+1)+2)+3)"
    assert as_text(3, "tree") in as_text(12, "tree")
    assert as_text(6, "tree") in as_text(12, "tree")


def test_sums_of_squares_by_rows_do_not_depend_on_how_many_rows_there_are():
    x = torch.randn(37, 129, generator=torch.Generator().manual_seed(0))
    whole = _fold(x.square())
    assert torch.allclose(whole, x.square().sum(1))
    for first in range(0, 37, 5):
        for last in range(first, 38, 4):
            assert torch.equal(_fold(x[first:last].square()), whole[first:last])


def test_donating_reuses_the_buffers_and_touching_the_old_state_raises():
    config = config_of(dtype="bfloat16")
    fns = e3.bind(config, frozen_of(config))
    state = fns.init_state(fns.init(0))
    held = {name: leaf.data_ptr() for name, leaf in named_leaves(state).items() if name != "step"}
    leaf = state.params["fc.weight"]
    after, _ = fns.step(state, micro_batches(0, 1, None), donate=True)
    assert {
        name: leaf.data_ptr() for name, leaf in named_leaves(after).items() if name != "step"
    } == held
    assert int(after.step) == 1
    for touch in (
        lambda: leaf + 1,
        lambda: leaf.shape,
        lambda: int(state.step),
        lambda: equal(state, after),
    ):
        refused(touch, "donate=True")
    refused(lambda: fns.step(state, micro_batches(0, 1, None)), "donate=True")
    refused(lambda: fns.forward_loss(state.params, micro_batches(0, 1, None)[0]), "donate=True")


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_a_donated_state_cannot_be_differentiated(numerics):
    config = config_of(numerics=numerics)
    fns, batch = e3.bind(config, frozen_of(config)), micro_batches(0, 1, None)[0]
    params = (state := fns.init_state(fns.init(0))).params
    fns.step(state, batch, donate=True)
    refused(
        lambda: e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch), "has shape (0,)"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce", ["sum", "tree"])
def test_donating_keeps_the_bits(reduce, dtype):
    config = config_of(reduce, dtype)
    assert equal(train(config, None), train(config, None, donate=True))


def test_a_tree_of_bf16_sums_is_refused():
    config = config_of()
    with pytest.raises(e3.UserError, match=r"train\.reduce = 'tree'"):
        e3.Config(
            config.draft,
            optimizer=e3.OptimizerConfig(accumulation="params"),
            train=config_of("tree").train,
        )


def test_gather_leaves_a_plain_state_as_it_is():
    state = train(config_of(), None)[0]
    assert equal(e3.gather(state), state)
