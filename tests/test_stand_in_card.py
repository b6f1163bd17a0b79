"""A step on the stand-in for a card: nothing lies on the wrong device, and the host waits for nothing."""

from dataclasses import replace

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.device import send
from eagle3fn.base.rows import both_rows
from eagle3fn.base.tree import named_leaves
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.train.run import to_device
from tests.stand_in_card import NAME, Wait, stand_in

pytest.importorskip(
    "triton", reason="the kernels that a card runs are written in Triton, which is not installed"
)


def two_steps(numerics: str, dtype: str, donate: bool) -> tuple[e3.TrainState, float, list[Wait]]:
    """Two updates on the card, the batches brought there as training brings them, and what the host waited for."""
    case = Case(head_dim=8, dtype=dtype, normalization="mask", teacher="compact")  # pyright: ignore
    config = case.config()
    config = replace(config, objective=replace(config.objective, numerics=numerics))
    batch = tiny_batch(case)
    n = torch.arange(case.steps, 0, -1.0) + 4
    batch = batch._replace(**both_rows(batch.row_mask, case.steps), row_counts=n)
    with stand_in() as waits:
        fns = e3.bind(config, on(NAME, tiny_frozen(case)))
        state = fns.init_state(on(NAME, tiny_params(case)))
        waits.clear()
        for _ in range(2):
            state, metrics = fns.step(state, to_device(batch, NAME), donate=donate)
        found = list(waits)
        return state, float(metrics["loss"]), found


@pytest.mark.parametrize("donate", [False, True])
def test_a_fast_step_waits_for_nothing(donate: bool) -> None:
    state, loss, waits = two_steps(
        "fast", "bfloat16", donate
    )  # its scores' kernels: tests/model/test_fast_cuda.py
    assert waits == []
    devices = {name: leaf.device.type for name, leaf in named_leaves(state).items()}
    assert devices.pop("step") == "cpu" and set(devices.values()) == {NAME}
    assert loss == pytest.approx(two_steps("plain", "bfloat16", donate)[1], rel=1e-2)


def test_outside_bf16_blocks_of_attention_are_cut_on_the_host() -> None:
    """Once a step, and it is known: the flash kernel takes 16 bits alone."""
    _, _, waits = two_steps("fast", "float32", True)
    assert len(waits) == 2 and all(
        "make_blocks" in line or "tolist" in line for w in waits for line in w.where[-1:]
    )


def test_the_stand_in_refuses_what_a_card_refuses() -> None:
    with stand_in() as waits:
        there = torch.ones(3, device=NAME)
        assert (there + 1).device.type == NAME and waits == []
        with pytest.raises(RuntimeError, match="on the same device"):
            _ = there + torch.ones(3)
        assert (there + torch.tensor(1.0)).tolist() == [
            2.0,
            2.0,
            2.0,
        ]  # a number may come from the host


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
def test_the_stand_in_sees_the_host_wait(act, what: str) -> None:
    with stand_in() as waits:
        act(torch.ones(3, device=NAME) + 1)
        assert waits and what in waits[0].what


def test_what_is_sent_to_a_card_is_pinned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then is the copy queued behind the device's work; the host goes on."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: seen.append(how) or self)
    send(torch.ones(1), torch.device("cuda"))
    assert seen == ["pinned", {"non_blocking": True}]
    seen.clear()
    send(torch.ones(1), torch.device("cpu"))
    send(torch.ones(1, device="meta"), torch.device("cuda"))  # it lies on a device already
    send(torch.ones(1, device="meta"), "cpu")  # the host may read it at once
    assert seen == [{}, {}, {}]
