"""The sides of a comparison: each a call that makes one update of its own state from one batch.

| side | what it is |
|---|---|
| `plain` | our step under the plain numerics; on CUDA with our copy of SpecForge's Triton loss |
| `fast` | our step under the fast numerics |
| `survivors` | as `fast`, but a row goes on to the next unroll step by chance |
| `mesh` | as `fast`, on a device mesh of this process alone |
| `specforge` | SpecForge's model, target head, backward and optimizer |

All take SpecForge's schedule, its sums of gradients and its teacher, so that they compute the same
loss, the survivors in expectation. Other projects' sides are in `bench.peers`.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import eagle3fn as e3
from bench.problem import Problem, with_survival
from eagle3fn.base.types import Frozen, Params
from eagle3fn.specforge import RECIPE, recipe
from eagle3fn.specforge.oracle import (
    Oracle,
    OracleMissingError,
    eager_loss,
    load_oracle,
    specforge_draft,
    unaligned,
)

DECAY = 0.8  # SpecForge's, of the losses over unroll steps
STEPS = 1000  # of the schedule, which spans more updates than are made here
OURS = ("plain", "fast", "survivors")
MEASURED = (*OURS, "specforge")  # the sides whose memory is measured
ONE_RANK = "SpecForge is measured on one rank only"
ON_CPU = (
    "SpecForge's Triton loss is replaced by the equal eager expression "
    "(interpreted it takes 4.5 ms a row)",
    "dynamo is off on all sides",
)
ON_CUDA = ("SpecForge's side: flex_attention, its Triton loss, dynamo on",)

Update = Callable[[], Tensor]
"""Makes one update and returns its loss."""


def find_oracle(device: str) -> tuple[Oracle | None, str | None]:
    """SpecForge, or why there is none."""
    try:
        return load_oracle(native=device != "cpu"), None
    except OracleMissingError as error:
        return None, str(error)


def describe(oracle: Oracle | None, reason: str | None, device: str) -> dict[str, Any]:
    """Which SpecForge, by hash, and what was changed about it; or why there is none."""
    if oracle is None:
        return {"specforge": None, "specforge_missing": reason}

    found = {
        "name": "SpecForge",
        "kind": oracle.kind,
        "digest": oracle.digest,
        "hashes": oracle.hashes,
    }
    return {"specforge": found, "notes": list(ON_CPU if device == "cpu" else ON_CUDA)}


def make_side(
    name: str,
    problem: Problem,
    params: Params,
    oracle: Oracle | None,
    k: int,
    mesh: DeviceMesh | None = None,
    survival: float = 1.0,
) -> Update:
    """The side of this name.

    Args:
        name: "plain", "fast", "survivors", "mesh" or "specforge".
        problem: draft, frozen tensors and the batch of every update.
        params: the first parameters.
        oracle: SpecForge; only its own side needs it.
        k: unroll steps.
        mesh: what our sides but "mesh" shard their state over.
        survival: the chance that a row of "survivors" goes on to the next unroll step.
    """
    if name == "mesh":
        own_mesh = one_rank_mesh(problem.batch.next_ids.device.type)
        return our_side(problem, params, "fast", k, own_mesh)
    if name == "survivors":
        return our_side(problem, params, "fast", k, mesh, survival)
    if name in OURS:
        return our_side(problem, params, name, k, mesh)

    assert name == "specforge" and oracle is not None
    return specforge_side(problem, params, oracle, k)


def our_side(
    problem: Problem,
    params: Params,
    numerics: str,
    k: int,
    mesh: DeviceMesh | None,
    survival: float = 1.0,
) -> Update:
    """Our `step` under these numerics; its state is donated, as SpecForge updates in place."""
    leaf = next(iter(params.values()))
    config, _ = recipe(
        problem.draft,
        objective={"ttt_length": k, "numerics": numerics, "survival": survival},
        train={
            "steps": STEPS,
            "dtype": str(leaf.dtype).removeprefix("torch."),
            "device": str(leaf.device),
        },
    )
    own = RECIPE if numerics == "plain" else RECIPE._replace(loss=e3.forward_loss)
    fns = e3.bind(config, problem.frozen, mesh=mesh, recipe=own)
    state = fns.init_state(params)
    batch = with_survival(problem, survival, k).batch

    def update() -> Tensor:
        nonlocal state
        state, metrics = fns.step(state, batch, donate=True)
        return metrics["loss"]

    return update


def specforge_side(problem: Problem, params: Params, oracle: Oracle, k: int) -> Update:
    """SpecForge's model, target head, backward and optimizer, called as its script calls them.

    The teacher comes of all target logits (no compact teacher).
    """
    plan = e3.OptimizerConfig()
    batch = problem.batch
    attention = "sdpa" if batch.next_ids.device.type == "cpu" else "flex_attention"

    draft: Any = specforge_draft(oracle, problem.draft, params, problem.frozen, attention).train()
    draft.embed_tokens.weight.data = problem.frozen.embed_tokens  # not a second time in memory
    model = oracle.eagle3.OnlineEagle3Model(draft, length=k, attention_backend=attention)
    head = specforge_head(problem.frozen)
    optimizer = oracle.optimizer.BF16Optimizer(
        draft,
        max_grad_norm=plan.max_grad_norm,
        lr=plan.learning_rate,
        warmup_ratio=plan.warmup_ratio,
        total_steps=STEPS,
    )

    def update() -> Tensor:
        raw = unaligned(batch)
        ids, target, mask = head.preprocess(raw.input_ids, raw.target, raw.loss_mask)
        losses = model(
            input_ids=ids,
            attention_mask=batch.attention_mask,
            loss_mask=mask,
            target=head(target),
            hidden_states=batch.aux_hidden,
        )[0]
        loss = weighted_sum(losses)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return update


def specforge_head(frozen: Frozen) -> Any:
    """SpecForge's target head around our tensor, made without a checkpoint's configuration."""
    kind = importlib.import_module("specforge.modeling.target.target_head").TargetHead
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    head.fc = torch.nn.Linear(1, 1, bias=False)
    head.fc.weight = torch.nn.Parameter(frozen.target_head, requires_grad=False)
    return head


def weighted_sum(losses: Sequence[Tensor]) -> Tensor:
    """`Σ_i 0.8^i · losses[i]`, in order and from zero, as SpecForge's scripts sum them."""
    total: Any = 0
    for step, loss in enumerate(losses):
        total = total + DECAY**step * loss
    return total


def one_rank_mesh(device: str) -> DeviceMesh:
    """A mesh of this process alone."""
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return init_device_mesh(device, (1,))


@contextlib.contextmanager
def specforge_loss(oracle: Oracle | None, device: str) -> Iterator[None]:
    """While open, SpecForge computes its loss eagerly on the CPU; on CUDA its own kernel stays."""
    if oracle is None or device != "cpu":
        yield
        return
    with eager_loss(oracle):
        yield
