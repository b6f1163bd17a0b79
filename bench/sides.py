"""The sides of a comparison: each a call that makes one update of its own state from the same batch."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import eagle3fn as e3
from bench.problem import Problem
from eagle3fn.base.types import Frozen, Params
from eagle3fn.specforge.oracle import (
    Oracle,
    OracleMissingError,
    eager_loss,
    load_oracle,
    specforge_draft,
)

DECAY, STEPS = 0.8, 1000
OURS = ("plain", "fast")
ONE_RANK = "the old tool is measured on one rank only"
ON_CPU = (
    "the old side's Triton loss is replaced by the equal eager expression (interpreted it takes 4.5 ms a row)",
    "dynamo is off on all sides",
)
ON_CUDA = ("the old side: flex_attention, its Triton loss, dynamo on",)

Update = Callable[[], torch.Tensor]


def find_oracle(device: str) -> tuple[Oracle | None, str | None]:
    """The old tool, or why there is none."""
    try:
        return load_oracle(native=device != "cpu"), None
    except OracleMissingError as error:
        return None, str(error)


def describe(oracle: Oracle | None, reason: str | None, device: str) -> dict[str, Any]:
    """Which old tool, by hash, and what was changed about it; or why there is none."""
    if oracle is None:
        return {"old_tool": None, "old_tool_missing": reason}
    told = {
        "name": "SpecForge",
        "kind": oracle.kind,
        "digest": oracle.digest,
        "hashes": oracle.hashes,
    }
    return {"old_tool": told, "notes": list(ON_CPU if device == "cpu" else ON_CUDA)}


def config_of(problem: Problem, params: Params, numerics: str, k: int) -> e3.Config:
    """Our settings: those that reproduce the old tool, but for the numerics."""
    leaf = next(iter(params.values()))
    return e3.Config(
        problem.draft,
        e3.ObjectiveConfig(ttt_length=k, numerics=numerics, normalization="rows", teacher="full"),  # pyright: ignore
        e3.OptimizerConfig(schedule="legacy", accumulation="params"),
        train=e3.TrainConfig(
            steps=STEPS, dtype=str(leaf.dtype).split(".")[1], device=str(leaf.device)
        ),  # pyright: ignore
    )


def our_side(
    problem: Problem, params: Params, numerics: str, k: int, mesh: DeviceMesh | None
) -> Update:
    """Our `step` under these numerics; the old state's buffers are donated, as the old tool updates in place."""
    fns = e3.bind(config_of(problem, params, numerics, k), problem.frozen, mesh=mesh)
    state = fns.init_state(params)

    def update() -> torch.Tensor:
        nonlocal state
        state, metrics = fns.step(state, problem.batch, donate=True)
        return metrics["loss"]

    return update


def old_side(problem: Problem, params: Params, oracle: Oracle, k: int) -> Update:
    """The old tool's model, target head, backward and optimizer, as its script calls them; all target logits."""
    plan, batch = e3.OptimizerConfig(), problem.batch
    attention = "sdpa" if batch.input_ids.device.type == "cpu" else "flex_attention"
    draft: Any = specforge_draft(oracle, problem.draft, params, problem.frozen, attention).train()
    draft.embed_tokens.weight.data = problem.frozen.embed_tokens  # not a second time in memory
    model = oracle.eagle3.OnlineEagle3Model(draft, length=k, attention_backend=attention)
    head = old_head(oracle, problem.frozen)
    schedule = {"lr": plan.learning_rate, "warmup_ratio": plan.warmup_ratio, "total_steps": STEPS}
    optimizer = oracle.optimizer.BF16Optimizer(draft, max_grad_norm=plan.max_grad_norm, **schedule)

    def update() -> torch.Tensor:
        ids, target, mask = head.preprocess(batch.input_ids, batch.last_hidden, batch.row_mask)
        losses = model(
            input_ids=ids,
            attention_mask=batch.attention_mask,
            loss_mask=mask,
            target=head(target),
            hidden_states=batch.aux_hidden,
        )[0]
        loss = sum(
            (DECAY**i * value for i, value in enumerate(losses)),
            start=torch.zeros((), device=ids.device),
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return update


def old_head(oracle: Oracle, frozen: Frozen) -> Any:
    """The old tool's target head around our tensor; it is made without a checkpoint's configuration."""
    kind = importlib.import_module("specforge.modeling.target.target_head").TargetHead
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    head.fc = torch.nn.Linear(1, 1, bias=False)
    head.fc.weight = torch.nn.Parameter(frozen.target_head, requires_grad=False)
    return head


def make_side(
    name: str,
    problem: Problem,
    params: Params,
    oracle: Oracle | None,
    k: int,
    mesh: DeviceMesh | None = None,
) -> Update:
    """The side of this name: "legacy", "fast", "mesh" (fast, on a mesh of this rank alone), or "old"."""
    if name == "mesh":
        return our_side(
            problem, params, "fast", k, one_rank_mesh(problem.batch.input_ids.device.type)
        )
    if name in OURS:
        return our_side(problem, params, name, k, mesh)
    assert name == "old" and oracle is not None
    return old_side(problem, params, oracle, k)


def one_rank_mesh(device: str) -> DeviceMesh:
    """A mesh of this process alone."""
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return init_device_mesh(device, (1,))


@contextlib.contextmanager
def old_loss(oracle: Oracle | None, device: str) -> Iterator[None]:
    """While open, the old side computes its loss eagerly on CPU; on CUDA its own kernel stays."""
    with eager_loss(oracle) if oracle is not None and device == "cpu" else contextlib.nullcontext():
        yield
