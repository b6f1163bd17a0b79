"""A step on the simulated card: every tensor is on its device, and the host waits for nothing."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.device import send, to_device
from eagle3fn.base.rows import plan_rows
from eagle3fn.base.tree import named_leaves
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_packed, tiny_params
from tests.stand_in_card import NAME, Wait, stand_in

pytest.importorskip(
    "triton", reason="the kernels that a card runs are written in Triton, which is not installed"
)


class TwoSteps(NamedTuple):
    """Two updates on the simulated card."""

    state: e3.TrainState
    loss: float
    waits: list[Wait]


def two_steps(
    numerics: str, dtype: str, donate: bool, survival: float = 1.0, packed: bool = False
) -> TwoSteps:
    """Two updates; their batches are moved to the card as training moves them."""
    case = Case(head_dim=8, dtype=dtype, normalization="mask", teacher="compact")  # pyright: ignore
    config = case.config()
    objective = replace(config.objective, numerics=numerics, survival=survival)
    config = replace(config, objective=objective)
    batch = tiny_packed(case) if packed else tiny_batch(case)
    if survival < 1:
        b, _, s = batch.row_mask.shape
        survives = torch.arange(b * s).view(b, s) % case.steps + 1
        batch = batch._replace(survives=survives)
    row_counts = torch.arange(case.steps, 0, -1.0) + 4
    plan = plan_rows(batch.row_mask, batch.survives, batch.starts)
    batch = batch._replace(plan=plan, row_counts=row_counts)
    with stand_in() as waits:
        fns = e3.bind(config, on(NAME, tiny_frozen(case)))
        state = fns.init_state(on(NAME, tiny_params(case)))
        waits.clear()
        for _ in range(2):
            state, metrics = fns.step(state, to_device(batch, NAME), donate=donate)
        during_steps = list(waits)
        return TwoSteps(state, float(metrics["loss"]), during_steps)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("donate", "survival"), [(False, 1.0), (True, 1.0), (True, 0.7)])
def test_a_fast_step_waits_for_nothing(donate: bool, survival: float, packed: bool) -> None:
    """The kernels of its scores: tests/model/test_fast_cuda.py."""
    found = two_steps("fast", "bfloat16", donate, survival, packed)
    assert found.waits == []

    devices = {name: leaf.device.type for name, leaf in named_leaves(found.state).items()}
    assert devices.pop("step") == "cpu"
    assert set(devices.values()) == {NAME}
    plain = two_steps("plain", "bfloat16", donate, survival, packed)
    assert found.loss == pytest.approx(plain.loss, rel=1e-2)


def test_a_fast_step_in_fp32_waits_once_an_unroll_step_for_the_blocks_of_attention() -> None:
    """The flash kernel takes 16 bits alone; blocks are made on the host."""
    updates = 2
    waits = two_steps("fast", "float32", donate=True).waits
    assert len(waits) == updates * Case().steps
    for wait in waits:
        assert "make_blocks" in wait.where[-1] or "tolist" in wait.where[-1]


def test_tensors_of_host_and_card_do_not_mix() -> None:
    with stand_in() as waits:
        there = torch.ones(3, device=NAME)
        assert (there + 1).device.type == NAME
        assert waits == []
        with pytest.raises(RuntimeError, match="on the same device"):
            _ = there + torch.ones(3)

        # A number may come from the host.
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "a copy from meta to cpu"),
        (lambda x: x[x > 1], "an index by a mask"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.ones(3).to(NAME), "a copy from cpu to meta"),
        (lambda x: x.copy_(torch.ones(3)), "a copy between host and device"),
    ],
)
def test_a_wait_of_the_host_is_noted(act, what: str) -> None:
    with stand_in() as waits:
        act(torch.ones(3, device=NAME) + 1)
        assert waits and what in waits[0].what


def test_a_tensor_sent_to_a_card_is_pinned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only from pinned memory is a copy asynchronous."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: seen.append(how) or self)
    send(torch.ones(1), torch.device("cuda"))
    assert seen == ["pinned", {"non_blocking": True}]
    seen.clear()
    send(torch.ones(1), torch.device("cpu"))
    send(torch.ones(1, device="meta"), torch.device("cuda"))  # it is on a device already
    send(torch.ones(1, device="meta"), "cpu")  # the host may read it at once
    assert seen == [{}, {}, {}]
