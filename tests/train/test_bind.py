"""`bind`: the first parameters that `train.init` chooses, and frozen tensors that don't fit."""

from dataclasses import replace

import pytest
import torch

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Frozen
from eagle3fn.train.recipe import OURS
from tests.factories import make_config, make_draft, make_frozen

SEED = 3


def with_norm(config: e3.Config) -> Frozen:
    """Frozen tensors with the weight of the target's final norm, `(Ht,)`."""
    width = config.draft.target_hidden_size
    norm = torch.linspace(1.0, 2.0, width, dtype=getattr(torch, config.train.dtype))
    return make_frozen(config)._replace(target_norm=norm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_starts_from_the_target_by_default(dtype):
    assert e3.TrainConfig().init == "target"
    config = make_config(dtype, train={"init": "target"})
    frozen = with_norm(config)
    assert frozen.target_norm is not None
    h = config.draft.hidden_size

    params = e3.bind(config, frozen).init(SEED)
    assert torch.equal(params["lm_head.weight"], frozen.target_head[frozen.t2d])
    assert torch.equal(params["norm.weight"], frozen.target_norm * 0.5)

    # The projection passes the last of the three taps through.
    taps = torch.randn(1, 4, 3 * h).to(frozen.target_head)
    assert torch.equal(taps @ params["fc.weight"].T, taps[..., 2 * h :])

    # All else is drawn from the seed.
    drawn = e3.init_params(config.draft, SEED, getattr(torch, dtype))
    taken = {"lm_head.weight", "norm.weight", "fc.weight"}
    for name in params.keys() - taken:
        assert torch.equal(params[name], drawn[name]), name


def test_init_from_the_target_needs_its_norm():
    config = make_config(train={"init": "target"})
    fns = e3.bind(config, make_frozen(config))
    with pytest.raises(e3.UserError, match=r"frozen\.target_norm is None.*train\.init='random'"):
        fns.init(SEED)


def test_init_from_a_target_of_another_width_is_refused():
    draft = make_draft(target_hidden_size=12)
    config = make_config(draft=draft, train={"init": "target"})
    frozen = make_frozen(config)._replace(embed_tokens=None, target_norm=torch.ones(12))
    with pytest.raises(e3.UserError, match=r"hidden size 16 is not the target's 12.*init=random"):
        e3.bind(config, frozen).init(SEED)


@pytest.mark.parametrize("target_norm", [True, False])
def test_random_init_draws_everything(target_norm):
    config = make_config(train={"init": "random"})
    frozen = with_norm(config) if target_norm else make_frozen(config)
    drawn = e3.init_params(config.draft, SEED, torch.float32)
    assert equal(e3.bind(config, frozen).init(SEED), drawn)


def test_init_is_the_recipes_start():
    config = make_config(train={"init": "target"})
    frozen = make_frozen(config)
    ones = {"seed": torch.ones(())}
    recipe = OURS._replace(start=lambda config, frozen, seed: {"seed": ones["seed"] * seed})
    assert e3.bind(config, frozen, recipe=recipe).init(SEED) == {"seed": torch.tensor(3.0)}


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize(
    ("t2d", "d2t"),
    [
        pytest.param(torch.arange(40) < 16, torch.arange(16), id="d2t of ids, not offsets"),
        pytest.param(torch.arange(40) < 15, torch.zeros(16).long(), id="t2d of 15 tokens"),
        pytest.param(torch.arange(40) >= 24, torch.zeros(16).long(), id="t2d of other tokens"),
    ],
)
def test_map_whose_halves_disagree_is_refused(numerics, t2d, d2t):
    config = make_config(draft=make_draft(draft_vocab_size=16), numerics=numerics)
    good = make_frozen(config)._replace(t2d=torch.arange(40) < 16, d2t=torch.zeros(16).long())
    e3.bind(config, good)
    with pytest.raises(e3.UserError, match="frozen: t2d and d2t name different tokens"):
        e3.bind(config, good._replace(t2d=t2d, d2t=d2t))


def test_frozen_tensors_of_other_sizes_are_refused():
    config = make_config()
    frozen = make_frozen(config)
    with pytest.raises(e3.UserError, match=r"frozen\.t2d has shape \(39,\); it must be \(40,\)"):
        e3.bind(config, frozen._replace(t2d=frozen.t2d[:-1]))
    with pytest.raises(e3.UserError, match=r"frozen\.target_norm has shape"):
        e3.bind(config, frozen._replace(target_norm=torch.ones(3)))
    other = replace(config, draft=make_draft(target_hidden_size=12))
    with pytest.raises(e3.UserError, match=r"frozen\.embed_tokens must be None"):
        e3.bind(other, frozen)


def test_tensors_without_values_and_another_default_device_are_bound():
    config = make_config(train={"init": "random"})
    frozen = make_frozen(config)
    with torch.device("meta"):
        bound = e3.bind(config, frozen)
    params = bound.init(0)
    assert bound.init_state(params).step == 0

    shapes = Frozen(*(None if x is None else x.to("meta") for x in frozen))  # pyright: ignore
    assert e3.bind(config, shapes).step.keywords["frozen"] is shapes  # pyright: ignore


@pytest.mark.parametrize("name", ["target_head", "t2d", "d2t"])
def test_a_missing_frozen_tensor_is_named(name):
    config = make_config(train={"init": "random"})
    with pytest.raises(e3.UserError, match=rf"frozen\.{name} is None"):
        e3.bind(config, make_frozen(config)._replace(**{name: None}))


@pytest.fixture
def draft(tmp_path):
    """An exported draft of `make_config`'s shape, with the vocabulary of `make_frozen`."""
    config = make_config()
    params = e3.init_params(config.draft, 8, torch.float32)
    e3.export(params, make_frozen(config), config.draft, tmp_path / "draft", 8, torch.float32)
    return tmp_path / "draft"


@pytest.mark.parametrize("recipe", [OURS, specforge.RECIPE], ids=["ours", "specforge"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_from_a_draft_takes_all_of_it(draft, dtype, recipe):
    config = make_config(dtype, train={"init": str(draft)})
    params = e3.bind(config, make_frozen(config), recipe=recipe).init(SEED)
    expected = e3.load_draft(draft, getattr(torch, dtype)).params
    assert equal(params, expected)
    assert list(params) == list(expected)


def test_init_from_a_draft_compares_rope_as_it_is_written(tmp_path):
    """A target's setting that the draft does not follow is not in its file."""
    rope = {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}
    config = make_config(draft=make_draft(rope_scaling=rope))
    params = e3.init_params(config.draft, 8, torch.float32)
    folder = tmp_path / "draft"
    frozen = make_frozen(config)
    e3.export(params, frozen, config.draft, folder, 8, torch.float32, any_rope=True)
    again = replace(config, train=replace(config.train, init=str(folder)))
    assert equal(e3.bind(again, frozen).init(SEED), params)

    other = replace(again.draft, rope_scaling=rope | {"factor": 2.0})
    with pytest.raises(e3.UserError, match="its rope_scaling is"):
        e3.bind(replace(again, draft=other), frozen).init(SEED)


def test_init_from_a_draft_of_another_shape_is_refused(draft):
    config = make_config(draft=make_draft(intermediate_size=28), train={"init": str(draft)})
    with pytest.raises(e3.UserError, match=r"its intermediate_size is 24.*is 28.*--draft-config"):
        e3.bind(config, make_frozen(config)).init(SEED)


def test_init_from_a_draft_that_is_not_there_is_refused():
    config = make_config(train={"init": "rnadom"})
    with pytest.raises(e3.UserError, match=r"train\.init = 'rnadom': must be 'target' or 'random'"):
        e3.bind(config, make_frozen(config)).init(SEED)


@pytest.mark.parametrize("role", ["bias", "embedding"])
def test_decay_of_parameters_that_the_draft_has_not_is_refused(role):
    """Its embedding is the target's, and nothing of it has a bias."""
    config = make_config()
    frozen = make_frozen(config)
    names = ("matrix", role)
    decays = e3.OptimizerConfig(weight_decay=0.1, decay_roles=names)
    message = rf"decay_roles has '{role}', and no .*; name some of 'attention', 'head', "
    with pytest.raises(e3.UserError, match=message):
        e3.bind(replace(config, optimizer=decays), frozen)
    assert e3.bind(replace(config, optimizer=replace(decays, decay_roles=names[:1])), frozen)
