"""What four ranks do in one start for `test_shard.py`: each check runs on the first `n` of them.

The check's mesh has `n` ranks. Rank 0 writes `{check: "" or what went wrong on any rank}` to the
file named on the command line:

    torchrun --nproc-per-node 4 -m tests.train.ranks_job RESULTS.json
"""

import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_gather_object
from torch.distributed.device_mesh import DeviceMesh

import eagle3fn as e3
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.table import Role
from eagle3fn.testing.strategies import LOSS_SUMS
from eagle3fn.train.checkpoint import load_checkpoint, save_checkpoint
from eagle3fn.train.finite import watched
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.optimizer import OPTIMIZERS, Leaf, Optimizer
from eagle3fn.train.recipe import OURS
from eagle3fn.train.shard import (
    empty_state,
    is_sharded,
    local,
    on_whole,
    own_rows,
    place,
    rows_of,
)
from tests.factories import make_frozen
from tests.reference import Draft
from tests.train.ranks_problem import (
    BOUND,
    LENGTHS,
    alone,
    gap,
    micro_batches,
    refused,
    train,
    uneven_config,
)
from tests.train.run_problem import held_out_run

WAIT_S = 20.0


def shards_of_any_size_gather_to_the_whole(mesh: DeviceMesh, world: World) -> None:
    tree = {
        "seven": torch.arange(21.0).view(7, 3),
        "two": torch.arange(10).view(2, 5),
        "one": torch.ones(1),
    }
    own = own_rows(tree, mesh.size(), world.rank)
    tree["none"] = own["none"] = torch.tensor(3)
    parts = place(own, tree, mesh)
    rows = rows_of(7, mesh.size(), world.rank)
    assert parts["seven"].shape == (7, 3)
    assert torch.equal(parts["seven"].to_local(), tree["seven"][rows.start : rows.stop])
    assert torch.equal(parts["seven"].full_tensor(), tree["seven"])
    assert not is_sharded(parts["none"])

    back = e3.gather(parts)
    assert equal(back, tree)
    assert not any(map(is_sharded, back.values()))


def every_optimizer() -> list[e3.Config]:
    """The uneven draft under each optimizer, its sums by the tree."""
    configs = []
    for name in OPTIMIZERS:
        optimizer = e3.OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
        configs.append(replace(uneven_config("tree"), optimizer=optimizer))
    return configs


def every_optimizer_has_the_bits_of_one_process(mesh: DeviceMesh, world: World) -> None:
    for config in every_optimizer():
        whole, _ = alone(config)
        for donate in (False, True):
            state, _ = train(config, mesh, donate=donate)
            assert equal(state, whole), (config.optimizer.name, donate, gap(state, whole))


def losses_and_sums_have_the_bits_of_one_process(mesh: DeviceMesh, world: World) -> None:
    for loss in ("jsd", *LOSS_SUMS):
        config = uneven_config("tree", loss=loss)
        whole, _ = alone(config)
        state, _ = train(config, mesh)
        assert equal(state, whole), (loss, gap(state, whole))


def each_whole_leaf_is_computed_by_one_rank(mesh: DeviceMesh, world: World) -> None:
    source = torch.Generator().manual_seed(0)
    whole = {}
    for name, rows, columns in (("a", 7, 3), ("b", 2, 5), ("c", 8, 8), ("d", 1, 4), ("e", 9, 2)):
        whole[name] = torch.randn(rows, columns, generator=source)
    leaves = {name: Leaf("matrix", tuple(leaf.shape)) for name, leaf in whole.items()}
    calls = []

    def function(leaf: Tensor) -> Tensor:
        calls.append(tuple(leaf.shape))
        return leaf.cumsum(0)

    own = own_rows(whole, mesh.size(), world.rank)
    before = tree_map(torch.clone, own)
    found = on_whole(function, own, leaves, mesh)
    expected = own_rows(tree_map(partial(torch.cumsum, dim=0), whole), mesh.size(), world.rank)
    assert equal(found, expected)
    assert equal(own, before)

    # The largest is a rank's only one, where there are ranks enough.
    every = gathered(calls, mesh)
    computed = [shape for shapes in every for shape in shapes]
    assert sorted(computed) == sorted(leaf.shape for leaf in leaves.values())
    assert [(8, 8)] in every or mesh.size() == 1


def state_that_one_rank_makes_infinite_is_seen_by_all(mesh: DeviceMesh, world: World) -> None:
    """And dropped by all."""
    name = "lm_head.weight"
    mine = world.rank == mesh.size() - 1

    def update(grads: Params, state: Any, params: Params, info: Any) -> Any:
        params = {leaf: value + 1 for leaf, value in params.items()}
        if mine:
            params[name][-1] = torch.nan
        return params, state

    optimizer = Optimizer(lambda params, roles: {}, update)
    for on_nonfinite in ("stop", "skip"):
        made = uneven_config()
        config = replace(made, train=replace(made.train, on_nonfinite=on_nonfinite))
        fns = e3.bind(config, make_frozen(config), mesh, optimizer=optimizer)
        state = fns.init_state(fns.init(0))
        before = tree_map(torch.clone, e3.gather(state))
        after, metrics = fns.step(state, micro_batches(0, 1, mesh), donate=True)

        flags = metrics["finite"].tolist()
        bad = [leaf for leaf, good in zip(watched(before), flags, strict=True) if not good]
        assert gathered(bad, mesh) == [bad] * mesh.size()
        assert bad == ["params.lm_head.weight"], bad
        if on_nonfinite == "skip":
            assert metrics["skipped"] == 1
            assert equal(e3.gather(after), before._replace(step=before.step + 1))


def own_optimizer_may_have_leaves_without_axes(mesh: DeviceMesh, world: World) -> None:
    """But none of another shape than a parameter's rows."""

    def counting(init: Callable[[Params, dict[str, Role]], Any]) -> Optimizer:
        return Optimizer(init, lambda grads, state, params, info: (params, state))

    config = uneven_config()
    count = counting(lambda params, roles: {"count": torch.zeros(())})
    fns = e3.bind(config, make_frozen(config), mesh, optimizer=count)
    state = fns.init_state(fns.init(0))
    after, _ = fns.step(state, micro_batches(0, 1, mesh), donate=True)
    assert not is_sharded(after.opt["count"])
    assert equal(e3.gather(after.masters), dict(fns.init(0)))

    columns = counting(lambda params, roles: {"columns": torch.zeros(params["fc.weight"].shape[1])})
    fns = e3.bind(config, make_frozen(config), mesh, optimizer=columns)
    refused(lambda: fns.init_state(fns.init(0)), "it must have a parameter's rows")


def specs_are_those_of_the_state(mesh: DeviceMesh, world: World) -> None:
    for config in every_optimizer():
        check_specs(config, mesh)


def check_specs(config: e3.Config, mesh: DeviceMesh) -> None:
    fns = e3.bind(config, make_frozen(config), mesh)
    specs = named_leaves(e3.state_specs(config, mesh))
    state = fns.init_state(fns.init(0))
    own = named_leaves(local(state))
    assert specs.keys() == own.keys()
    for name, leaf in named_leaves(state).items():
        spec: Any = specs[name]
        assert (spec.shape, spec.dtype) == (tuple(leaf.shape), leaf.dtype), name
        assert spec.local_shape == tuple(own[name].shape), name
        assert spec.placement == ("Replicate()" if name == "step" else "Shard(0)"), name
        assert is_sharded(leaf) == (name != "step")


def empty_state_is_placed_as_the_state(mesh: DeviceMesh, world: World) -> None:
    for config in every_optimizer():
        check_empty_state(config, mesh)


def check_empty_state(config: e3.Config, mesh: DeviceMesh) -> None:
    fns = e3.bind(config, make_frozen(config), mesh)
    state = named_leaves(fns.init_state(fns.init(0)))
    empty = named_leaves(empty_state(config, "cpu", mesh))
    assert empty.keys() == state.keys()
    for name, leaf in empty.items():
        expected: Any = state[name]
        found: Any = leaf
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        assert is_sharded(found) == is_sharded(expected), name
        if is_sharded(found):
            assert found.placements == expected.placements, name
            assert found.to_local().shape == expected.to_local().shape, name
            assert found.stride() == expected.stride(), name


def sum_reduction_is_near_one_process(mesh: DeviceMesh, world: World) -> None:
    for size, normalization in ((1, "mask"), (2 if mesh.size() == 3 else 3, "rows")):
        config = uneven_config(normalization=normalization)
        state, rows = train(config, mesh, size)
        whole, expected = alone(config, size)
        assert gap(state, whole) < BOUND, (normalization, gap(state, whole))
        assert gap(rows, expected) < 20 * BOUND, (normalization, gap(rows, expected))
        if mesh.size() == 1:
            assert equal(state, whole)
            assert equal(rows, expected)


def any_split_is_near_another(mesh: DeviceMesh, world: World) -> None:
    first, *others = [train(uneven_config(), mesh, size)[0] for size in (1, 2, 3)]
    for other in others:
        assert gap(first, other) < BOUND


def tree_reduction_has_the_bits_of_one_process(mesh: DeviceMesh, world: World) -> None:
    for dtype, normalization in (("float32", "mask"), ("bfloat16", "rows")):
        config = uneven_config("tree", dtype, normalization=normalization)
        whole, expected = alone(config)
        for donate in (False, True):
            state, rows = train(config, mesh, donate=donate)
            assert equal(state, whole), (dtype, donate, gap(state, whole))
            assert equal(rows, expected), dtype


def plain_numerics_have_the_bits_of_one_process(mesh: DeviceMesh, world: World) -> None:
    reductions = ("tree", "sum") if mesh.size() == 1 else ("tree",)
    for reduce in reductions:
        config = uneven_config(reduce, "bfloat16", numerics="plain")
        assert equal(train(config, mesh)[0], alone(config)[0]), reduce


class HoldsBack:
    """A loss that lets one rank get to its last micro-batch while the others wait at their first.

    The rank ahead writes a note at its last micro-batch; the others wait for that note at their
    first one. `in_order` has an entry a call: whether the note was there when it had to be.
    """

    def __init__(self, count: int, ahead: bool, note: Path) -> None:
        self.count = count
        self.ahead = ahead
        self.note = note
        self.in_order: list[bool] = []

    def __call__(
        self, params: Params, batch: Batch, *, config: e3.Config, frozen: Frozen
    ) -> tuple[Tensor, Aux]:
        number = len(self.in_order) + 1
        if self.ahead and number == self.count:
            self.note.touch()
        if not self.ahead and number == 1:
            end = time.monotonic() + WAIT_S
            while not self.note.exists() and time.monotonic() < end:
                time.sleep(0.01)
        self.in_order.append(self.ahead or self.note.exists())
        return e3.forward_loss(params, batch, config=config, frozen=frozen)


def no_rank_waits_before_its_last_micro_batch(mesh: DeviceMesh, world: World) -> None:
    """Each rank in turn is ahead of the others."""
    config = uneven_config()
    frozen = make_frozen(config)
    own = micro_batches(0, 1, mesh)
    fns = e3.bind(config, frozen, mesh)
    state = fns.init_state(fns.init(0))
    folder = Path(gathered(tempfile.mkdtemp() if world.main else None, mesh)[0])

    for ahead in range(mesh.size()):
        loss = HoldsBack(len(own), world.rank == ahead, folder / f"{ahead}")
        e3.bind(config, frozen, mesh, OURS._replace(loss=loss)).step(state, own)
        assert len(loss.in_order) == len(own)
        assert all(loss.in_order)

    gathered(None, mesh)
    if world.main:
        shutil.rmtree(folder)


def gathered(value: Any, mesh: DeviceMesh) -> list[Any]:
    """The objects that the ranks of a mesh give, in their order."""
    every: list[Any] = [None] * mesh.size()
    all_gather_object(every, value, group=mesh.get_group())
    return every


def donating_keeps_the_bits(mesh: DeviceMesh, world: World) -> None:
    config = uneven_config()
    kept, _ = train(config, mesh)
    donated, _ = train(config, mesh, donate=True)
    assert equal(kept, donated)


def donated_state_is_refused_wherever_it_is_touched(mesh: DeviceMesh, world: World) -> None:
    config = uneven_config()
    fns = e3.bind(config, make_frozen(config), mesh)
    state = fns.init_state(fns.init(0))
    fns.step(state, micro_batches(0, 1, mesh), donate=True)

    leaf: Any = state.masters["fc.weight"]
    touches = (
        lambda: leaf + 1,
        leaf.to_local,
        lambda: e3.gather(state),
        lambda: int(state.step),
        lambda: torch.func.vjp(lambda x: x * 2, leaf),
        lambda: fns.step(state, micro_batches(0, 1, mesh)),
    )
    for touch in touches:
        refused(touch, "donate=True")


def metrics_are_the_same_on_all_ranks(mesh: DeviceMesh, world: World) -> None:
    _, rows = train(uneven_config(), mesh)
    last = rows[-1]
    assert int(last["tokens"]) == sum(LENGTHS)
    every = gathered(tree_map(lambda x: x.tolist(), last), mesh)
    assert all(other == every[0] for other in every)


def what_does_not_fit_is_refused(mesh: DeviceMesh, world: World) -> None:
    config = uneven_config()
    frozen = make_frozen(config)
    fns = e3.bind(config, frozen, mesh)
    params = fns.init(0)
    state = fns.init_state(params)
    own = micro_batches(0, 1, mesh)

    # States that are not placed as the step's mesh says.
    plain = e3.init_state(params, config=config)
    moved = state._replace(params=replicated(state.params))
    refused(lambda: fns.forward_loss(state.params, own[0]), r"e3.gather(state)")
    refused(lambda: e3.step(state, own, config=config, frozen=frozen), "another mesh")
    refused(lambda: fns.step(plain, own), "plain tensor")
    refused(lambda: fns.step(moved, own), "it must be Shard(0)")

    # Micro-batches that cannot be summed.
    uncounted = own[0]._replace(row_counts=None)
    refused(lambda: fns.step(state, own[: 1 + world.rank]), "give every rank as many")
    refused(lambda: fns.step(state, uncounted), "batch.row_counts is missing")
    means = OURS._replace(batch_means={"kl": ()})
    refused(
        lambda: e3.step(state, own[0], config=config, frozen=frozen, mesh=mesh, recipe=means),
        f"on {mesh.size()} ranks under",
    )

    if mesh.size() == 3:
        tree = uneven_config("tree")
        refused(
            lambda: e3.step(state, own, config=tree, frozen=frozen, mesh=mesh), "'tree' on 3 ranks"
        )


def replicated(params: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return {name: leaf.redistribute(placements=[Replicate()]) for name, leaf in params.items()}


def fully_sharded_module_takes_the_state_by_name(mesh: DeviceMesh, world: World) -> None:
    from torch.distributed.fsdp import fully_shard

    config = uneven_config()
    frozen = make_frozen(config)
    fns = e3.bind(config, frozen, mesh)
    params = fns.init(0)
    state = fns.init_state(params)

    # Into the module.
    module: Any = Draft(config.draft, frozen.embed_tokens, frozen.t2d, frozen.d2t)
    fully_shard(module, mesh=mesh)
    result = module.load_state_dict(state.params, strict=False)
    assert not result.unexpected_keys
    held = module.state_dict()
    assert equal(e3.gather({name: held[name] for name in params}), params)

    # And back: the next step has the same bits.
    back = state._replace(params={name: held[name] for name in params})
    own = micro_batches(0, 1, mesh)
    after, _ = fns.step(state, own)
    after_back, _ = fns.step(back, own)
    assert equal(e3.gather(after), e3.gather(after_back))


def checkpoint_of_all_ranks_is_read_by_one_and_by_all(mesh: DeviceMesh, world: World) -> None:
    config = uneven_config()
    fns = e3.bind(config, make_frozen(config), mesh)
    state, _ = fns.step(fns.init_state(fns.init(0)), micro_batches(0, 1, mesh))
    whole = e3.gather(state)
    folder = world.shared(tempfile.mkdtemp() if world.main else None)
    path = save_checkpoint(folder, state, config, {}, {}, 1, world)

    into = e3.init_state(fns.init(1), config=config)
    assert equal(load_checkpoint(path, into, config, {}).state, whole)
    again = load_checkpoint(path, empty_state(config, "cpu", mesh), config, {}, world).state
    assert equal(local(again), local(state))

    world.barrier()
    if world.main:
        shutil.rmtree(folder)


def held_out_row_is_that_of_one_process(mesh: DeviceMesh, world: World) -> None:
    """Five held-out samples: the last of four ranks has none."""
    folder = world.shared(tempfile.mkdtemp() if world.main else None)
    objectives: list[dict[str, Any]] = [{"normalization": "mask"}, {"normalization": "rows"}]
    for objective in objectives:
        alone = held_out_run(Path(folder) / str(world.rank), **objective)
        params = alone.fns.init(3)
        expected = evaluate_held_out(alone, params)
        assert expected.keys() >= {"loss", "losses", "rows", "accepted_length"}
        assert evaluate_held_out(alone._replace(world=world), params) == expected

    world.barrier()
    if world.main:
        shutil.rmtree(folder)


Check = Callable[[DeviceMesh, World], None]

CHECKS: list[tuple[Check, tuple[int, ...]]] = [
    (shards_of_any_size_gather_to_the_whole, (1, 2, 3, 4)),
    (specs_are_those_of_the_state, (1, 3, 4)),
    (empty_state_is_placed_as_the_state, (1, 3, 4)),
    (sum_reduction_is_near_one_process, (1, 2, 3, 4)),
    (any_split_is_near_another, (2,)),
    (tree_reduction_has_the_bits_of_one_process, (1, 2, 4)),
    (every_optimizer_has_the_bits_of_one_process, (1, 2, 4)),
    (losses_and_sums_have_the_bits_of_one_process, (2,)),
    (each_whole_leaf_is_computed_by_one_rank, (1, 2, 3, 4)),
    (own_optimizer_may_have_leaves_without_axes, (2,)),
    (state_that_one_rank_makes_infinite_is_seen_by_all, (2, 3)),
    (plain_numerics_have_the_bits_of_one_process, (1, 2)),
    (no_rank_waits_before_its_last_micro_batch, (3,)),
    (donating_keeps_the_bits, (2,)),
    (donated_state_is_refused_wherever_it_is_touched, (2,)),
    (metrics_are_the_same_on_all_ranks, (3,)),
    (what_does_not_fit_is_refused, (2, 3)),
    (fully_sharded_module_takes_the_state_by_name, (2,)),
    (checkpoint_of_all_ranks_is_read_by_one_and_by_all, (4,)),
    (held_out_row_is_that_of_one_process, (4,)),
]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    with ranks() as world:
        meshes = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, world.size + 1)}
        for check, counts in CHECKS:
            for n in counts:
                wrong = ""
                try:
                    if world.rank < n:
                        check(meshes[n], world)
                except BaseException:
                    wrong = traceback.format_exc()
                    print(f"{check.__name__}-{n}, rank {world.rank}: {wrong}", flush=True)
                results[f"{check.__name__}-{n}"] = "\n".join(filter(None, world.every(wrong)))
    if world.main:
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
