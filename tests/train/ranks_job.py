"""What four ranks do in one start for `test_shard.py`: each check runs on the first `n` of them, as a mesh of `n`.

Rank 0 writes `{check: "" or what went wrong on any rank}` to the file named on the command line.
"""

import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import all_gather_object
from torch.distributed.device_mesh import DeviceMesh

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.train import step as step_file
from eagle3fn.train.checkpoint import load_checkpoint, save_checkpoint
from eagle3fn.train.launch import World, ranks
from eagle3fn.train.shard import is_sharded, local, rows_of, shard
from tests.reference import Draft
from tests.small import batch_of, frozen_of
from tests.train.ranks_small import (
    BOUND,
    SAMPLES,
    STEPS,
    alone,
    config_of,
    gap,
    micro_batches,
    refused,
    train,
)


def leaves_of_any_size_come_back(mesh: DeviceMesh, world: World) -> None:
    tree = {"seven": torch.arange(21.0).view(7, 3), "two": torch.arange(10).view(2, 5), "one": torch.ones(1),
            "none": torch.tensor(3)}  # fmt: skip
    parts = shard(tree, mesh)
    assert parts["seven"].shape == (7, 3)
    rows = rows_of(7, mesh.size(), world.rank)
    assert torch.equal(parts["seven"].to_local(), tree["seven"][rows.start : rows.stop])
    assert torch.equal(parts["seven"].full_tensor(), tree["seven"])
    assert not is_sharded(parts["none"])
    back = e3.gather(parts)
    assert equal(back, tree)
    assert not any(map(is_sharded, back.values()))


def specs_are_the_state(mesh: DeviceMesh, world: World) -> None:
    config = config_of()
    fns = e3.bind(config, frozen_of(config), mesh)
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


def sum_is_near_one_process(mesh: DeviceMesh, world: World) -> None:
    for size, normalization in ((1, "mask"), (2 if mesh.size() == 3 else 3, "rows")):
        config = config_of(normalization=normalization)
        state, rows = train(config, mesh, size)
        whole, wanted = alone(config, size)
        assert gap(state, whole) < BOUND, (normalization, gap(state, whole))
        assert gap(rows, wanted) < 20 * BOUND, (normalization, gap(rows, wanted))
        if mesh.size() == 1:
            assert equal(state, whole)
            assert equal(rows, wanted)


def any_split_is_near(mesh: DeviceMesh, world: World) -> None:
    states = [train(config_of(), mesh, size)[0] for size in (1, 2, 3)]
    assert max(gap(states[0], state) for state in states[1:]) < BOUND


def tree_is_one_process(mesh: DeviceMesh, world: World) -> None:
    for dtype in ("float32", "bfloat16"):
        config = config_of("tree", dtype, normalization="rows" if dtype == "bfloat16" else "mask")
        whole, wanted = alone(config)
        for donate in (False, True):
            state, rows = train(config, mesh, donate=donate)
            assert equal(state, whole), (dtype, donate, gap(state, whole))
            assert equal(rows, wanted), dtype


def plain_numerics_too(mesh: DeviceMesh, world: World) -> None:
    for how in ("tree",) if mesh.size() > 1 else ("tree", "sum"):
        config = config_of(how, "bfloat16", numerics="plain")
        assert equal(train(config, mesh)[0], alone(config)[0]), how


def no_rank_waits_before_its_last_micro_batch(mesh: DeviceMesh, world: World) -> None:
    """One rank gets to its last micro-batch while the others hold back their first; each rank in turn."""
    config, plain = config_of(), step_file.forward_loss
    fns, own = e3.bind(config, frozen_of(config), mesh), micro_batches(0, 1, mesh)
    state = fns.init_state(fns.init(0))
    folder = Path(gathered(tempfile.mkdtemp() if world.main else None, mesh)[0])
    for ahead in range(mesh.size()):
        calls: list[bool] = []
        step_file.forward_loss = partial(
            held_back, plain, calls, len(own), world.rank == ahead, folder / f"{ahead}"
        )
        try:
            fns.step(state, own)
        finally:
            step_file.forward_loss = plain
        assert all(calls)
    gathered(None, mesh)
    if world.main:
        shutil.rmtree(folder)


def held_back(
    plain: Any, calls: list[bool], count: int, ahead: bool, note: Path, *args: Any, **kwargs: Any
) -> Any:
    """`plain`, called once a micro-batch: who is ahead leaves a note at the last one, the rest wait for it first."""
    calls.append(True)
    if ahead and len(calls) == count:
        note.touch()
    end = time.monotonic() + 20
    while not ahead and len(calls) == 1 and not note.exists() and time.monotonic() < end:
        time.sleep(0.01)
    calls[-1] = ahead or note.exists()
    return plain(*args, **kwargs)


def gathered(value: Any, mesh: DeviceMesh) -> list[Any]:
    """The objects that the ranks of a mesh give."""
    every: list[Any] = [None] * mesh.size()
    all_gather_object(every, value, group=mesh.get_group())
    return every


def donating_keeps_the_bits(mesh: DeviceMesh, world: World) -> None:
    config = config_of()
    plain, given = train(config, mesh), train(config, mesh, donate=True)
    assert equal(plain[0], given[0])
    fns = e3.bind(config, frozen_of(config), mesh)
    state = fns.init_state(fns.init(0))
    fns.step(state, micro_batches(0, 1, mesh), donate=True)
    leaf: Any = state.masters["fc.weight"]
    behind = lambda: torch.func.vjp(lambda x: x * 2, leaf)  # noqa: E731
    for touch in (
        lambda: leaf + 1,
        leaf.to_local,
        lambda: e3.gather(state),
        lambda: int(state.step),
        behind,
    ):
        refused(touch, "donate=True")
    refused(lambda: fns.step(state, micro_batches(0, 1, mesh)), "donate=True")


def metrics_are_everyones(mesh: DeviceMesh, world: World) -> None:
    _, rows = train(config_of(), mesh)
    row = rows[-1]
    assert int(row["tokens"]) == int(
        batch_of(STEPS - 1, tuple(4 + (5 * i) % 7 for i in range(SAMPLES)))[1].sum()
    )
    every = gathered(tree_map(lambda x: x.tolist(), row), mesh)
    assert all(other == every[0] for other in every)


def what_does_not_fit_is_refused(mesh: DeviceMesh, world: World) -> None:
    config = config_of()
    frozen = frozen_of(config)
    fns = e3.bind(config, frozen, mesh)
    params = fns.init(0)
    state = fns.init_state(params)
    own = micro_batches(0, 1, mesh)
    refused(lambda: fns.forward_loss(state.params, own[0]), r"e3.gather(state)")
    refused(lambda: e3.step(state, own, config=config, frozen=frozen), "another mesh")
    refused(lambda: fns.step(e3.init_state(params, config=config), own), "plain tensor")
    refused(
        lambda: fns.step(state._replace(params=replicated(state.params)), own),
        "it must be Shard(0)",
    )
    refused(lambda: fns.step(state, own[: 1 + world.rank]), "give every rank as many")
    refused(
        lambda: fns.step(state, own[0]._replace(row_counts=None)), "batch.row_counts is missing"
    )
    lk = config_of(loss="lk_alpha", numerics="plain")
    refused(
        lambda: e3.step(state, own[0], config=lk, frozen=frozen, mesh=mesh),
        f"on {mesh.size()} ranks under",
    )
    if mesh.size() == 3:
        refused(
            lambda: e3.step(state, own, config=config_of("tree"), frozen=frozen, mesh=mesh),
            "'tree' on 3 ranks",
        )


def replicated(params: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return {name: leaf.redistribute(placements=[Replicate()]) for name, leaf in params.items()}


def a_fully_sharded_module_takes_the_state_by_name(mesh: DeviceMesh, world: World) -> None:
    from torch.distributed.fsdp import fully_shard

    config = config_of()
    frozen = frozen_of(config)
    fns = e3.bind(config, frozen, mesh)
    params = fns.init(0)
    state = fns.init_state(params)
    module: Any = Draft(config.draft, frozen.embed_tokens, frozen.t2d, frozen.d2t)
    fully_shard(module, mesh=mesh)
    result = module.load_state_dict(state.params, strict=False)
    assert not result.unexpected_keys
    held = module.state_dict()
    assert equal(e3.gather({name: held[name] for name in params}), params)
    back = state._replace(params={name: held[name] for name in params})
    one, other = (fns.step(s, micro_batches(0, 1, mesh))[0] for s in (state, back))
    assert equal(e3.gather(one), e3.gather(other))


def a_checkpoint_of_all_ranks_is_read_by_one(mesh: DeviceMesh, world: World) -> None:
    config = config_of()
    fns = e3.bind(config, frozen_of(config), mesh)
    state, _ = fns.step(fns.init_state(fns.init(0)), micro_batches(0, 1, mesh))
    whole, folder = e3.gather(state), world.shared(tempfile.mkdtemp() if world.main else None)
    path = save_checkpoint(folder, state, config, {}, {}, 1, world)
    alone = e3.init_state(fns.init(1), config=config)
    assert equal(load_checkpoint(path, alone, config, {}).state, whole)
    again = load_checkpoint(path, fns.init_state(fns.init(1)), config, {}, world).state
    assert equal(local(again), local(state))
    world.barrier()
    if world.main:
        shutil.rmtree(folder)


CHECKS: list[tuple[Callable[[DeviceMesh, World], None], tuple[int, ...]]] = [
    (leaves_of_any_size_come_back, (1, 2, 3, 4)),
    (specs_are_the_state, (1, 3, 4)),
    (sum_is_near_one_process, (1, 2, 3, 4)),
    (any_split_is_near, (2,)),
    (tree_is_one_process, (1, 2, 4)),
    (plain_numerics_too, (1, 2)),
    (no_rank_waits_before_its_last_micro_batch, (3,)),
    (donating_keeps_the_bits, (2,)),
    (metrics_are_everyones, (3,)),
    (what_does_not_fit_is_refused, (2, 3)),
    (a_fully_sharded_module_takes_the_state_by_name, (2,)),
    (a_checkpoint_of_all_ranks_is_read_by_one, (4,)),
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
