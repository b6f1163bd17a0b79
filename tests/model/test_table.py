"""The table of weights: its order, and that all that is made from it agrees, under every switch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.model import table
from eagle3fn.specforge import bisect
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import VALUES
from eagle3fn.train.memory import plan_memory
from eagle3fn.train.shard import state_specs

ORDER = [
    "embed_tokens.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.post_attention_layernorm.weight",
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
]
"""Of a draft without switches: the bits of the gradient norm depend on it."""

CASES = [
    Case(target_hidden=width, lengths=(8, 6), mask="full", switches=switches, taps=taps)
    for switches in VALUES["switches"]
    for width, taps in ((16, 3), (20, 2))
]
"""Drafts with and without an embedding of their own, of three and two taps, under every switch."""


def test_order_is_that_of_the_gradient_norm():
    assert list(table.shapes(Case(target_hidden=20).draft())) == ORDER
    assert list(table.shapes(Case().draft())) == ORDER[1:]


def test_shapes_are_in_the_drafts_sizes():
    draft = Case(target_hidden=20).draft()
    shapes = table.shapes(draft)
    assert shapes["embed_tokens.weight"] == (40, 16)
    assert shapes["midlayer.self_attn.q_proj.weight"] == (4 * 6, 2 * 16)
    assert shapes["midlayer.self_attn.k_proj.weight"] == (2 * 6, 2 * 16)
    assert shapes["midlayer.self_attn.o_proj.weight"] == (16, 4 * 6)
    assert shapes["midlayer.mlp.down_proj.weight"] == (16, 24)
    assert shapes["fc.weight"] == (16, 3 * 20)
    assert shapes["lm_head.weight"] == (24, 16)


def test_roles():
    found: dict[str, set[str]] = {}
    for name, role in table.roles(Case(target_hidden=20).draft()).items():
        found.setdefault(role, set()).add(name)
    assert found["norm"] == {name for name in ORDER if "norm" in name}
    assert found["embedding"] == {"embed_tokens.weight"}
    assert found["head"] == {"lm_head.weight"}
    assert found["attention"] == {name for name in ORDER if "self_attn" in name}
    assert set(found) == {"attention", "matrix", "norm", "embedding", "head"}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_weight_has_one_row_and_its_shape_everywhere(case: Case) -> None:
    draft = case.draft()
    shapes = table.shapes(draft)
    assert len({weight.name for weight in table.TABLE}) == len(table.TABLE)
    assert list(table.roles(draft)) == list(shapes)

    state = state_specs(case.config())
    for params in (e3.init_params(draft, 0), tiny_params(case), state.params, state.masters):
        assert {name: tuple(leaf.shape) for name, leaf in params.items()} == shapes
    for name, role in table.roles(draft).items():
        assert len(shapes[name]) == (1 if role in ("norm", "bias") else 2), name
    values = sum(leaf.numel() for leaf in tiny_params(case).values())
    assert plan_memory(case.config()).params == values


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_first_values_are_drawn_in_the_tables_order(case: Case) -> None:
    draft = replace(case.draft(), initializer_range=0.5)
    generator = torch.Generator().manual_seed(3)
    for name, value in e3.init_params(draft, 3, torch.float32).items():
        if table.roles(draft)[name] == "norm":
            assert torch.equal(value, torch.ones_like(value)), name
        elif table.roles(draft)[name] == "bias":
            assert torch.equal(value, torch.zeros_like(value)), name
        else:
            assert torch.equal(value, 0.5 * torch.randn(value.shape, generator=generator)), name


@pytest.mark.parametrize("numerics", ["plain", "fast"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_weight_has_a_gradient(case: Case, numerics: Any) -> None:
    config = case.config()
    config = replace(config, objective=replace(config.objective, numerics=numerics))
    loss = e3.bind(config, tiny_frozen(case)).forward_loss
    _, gradients = e3.value_and_grad(loss, has_aux=True)(tiny_params(case), tiny_batch(case))
    for name, gradient in gradients.items():
        assert gradient.count_nonzero() > 0, name


@pytest.mark.parametrize("width", [16, 20])
def test_the_search_for_a_difference_sees_every_weight(width: int) -> None:
    """Of drafts without switches: SpecForge, whose side is searched beside ours, has none."""
    case = Case(target_hidden=width, lengths=(8, 6), mask="full")
    seen = {name for name, _ in bisect.ours().trace(case).events}
    assert seen == {table.EMBED, *table.shapes(case.draft())}
    for name, _ in bisect.ours().trace(case).events:
        assert bisect.ROWS[name].before


def test_parameters_of_another_draft_are_refused_by_name():
    case = Case()
    params = tiny_params(case)
    with pytest.raises(e3.UserError, match=r"here: embed_tokens\.weight is missing"):
        table.check_params(params, replace(case.draft(), target_hidden_size=20), "here")
    own = params | {"embed_tokens.weight": torch.zeros(40, 16)}
    with pytest.raises(e3.UserError, match=r"embed_tokens\.weight is not a parameter"):
        table.check_params(own, case.draft())
    with pytest.raises(e3.UserError, match=r"lm_head\.weight has shape \(24, 16\).*\(30, 16\)"):
        table.check_params(params, replace(case.draft(), draft_vocab_size=30))
    mixed = params | {"norm.weight": params["norm.weight"].double()}
    with pytest.raises(e3.UserError, match=r"several dtypes.*float32.*float64"):
        table.check_params(mixed, case.draft())
