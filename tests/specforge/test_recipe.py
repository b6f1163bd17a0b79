"""SpecForge's recipe: start, schedule, mask, orders; old settings are refused by new names."""

import copy
import doctest
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import DataConfig, OptimizerConfig
from eagle3fn.model.table import EMBED, shapes
from eagle3fn.specforge import recipes
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from tests.specforge.script_data import TINY

# The recipe as a value


def test_the_packages_example_runs() -> None:
    result = doctest.testmod(specforge)
    assert result.attempted > 5
    assert result.failed == 0


def test_recipe_takes_settings_over_its_own() -> None:
    config, recipe = specforge.recipe(
        Case().draft(), objective={"teacher": "compact"}, train={"steps": 7}
    )
    assert recipe is specforge.RECIPE
    assert config.objective.teacher == "compact"
    assert config.train.steps == 7

    # The rest is SpecForge's.
    assert config.objective.numerics == "plain"
    assert config.objective.normalization == "rows"
    assert config.optimizer.accumulation == "params"
    assert config.train.init == "random"
    with pytest.raises(UserError, match=r"unknown key train\.stepz"):
        specforge.recipe(Case().draft(), train={"stepz": 7})


def test_recipe_names_its_optimizer_whatever_our_default_is() -> None:
    assert recipes.SETTINGS["optimizer"]["name"] == "adamw"
    assert specforge.recipe(Case().draft()).config.optimizer.name == "adamw"
    own = specforge.recipe(Case().draft(), optimizer={"name": "muon"})
    assert own.config.optimizer.name == "muon"


def test_recipes_are_named() -> None:
    assert list(specforge.RECIPES) == ["specforge", "specforge-dataflow"]
    assert all(recipe.name == name for name, recipe in specforge.RECIPES.items())
    expected = specforge.RECIPE._replace(name="specforge-dataflow", order=specforge.stored_order)
    assert expected == specforge.DATAFLOW_RECIPE


def test_the_loss_is_the_plain_unroll_on_the_cpu() -> None:
    """Whatever `objective.numerics` is."""
    case = Case()
    frozen = tiny_frozen(case)
    params = tiny_params(case)
    batch = tiny_batch(case)
    plain = case.config()
    fast = replace(plain, objective=replace(plain.objective, numerics="fast"))
    expected, _ = e3.forward_loss(params, batch, config=plain, frozen=frozen)
    for config in (plain, fast):
        loss, _ = specforge.forward_loss(params, batch, config=config, frozen=frozen)
        assert torch.equal(loss, expected)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    case = Case()
    batch = tiny_batch(case)._replace(row_mask=torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="row_mask"):
        specforge.forward_loss(
            tiny_params(case), batch, config=case.config(), frozen=tiny_frozen(case)
        )


def test_importing_the_package_loads_neither_triton_nor_specforge() -> None:
    """Nor anything large that `import eagle3fn` does not load."""
    code = """
import sys
import eagle3fn
before = {name.split(".")[0] for name in sys.modules}
from eagle3fn import specforge
after = {name.split(".")[0] for name in sys.modules}
assert specforge.RECIPE.name == "specforge"
print(sorted((after - before) | (after & {"triton", "specforge", "transformers"})))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    extra = set(done.stdout.strip("[]\n").replace("'", "").split(", ")) - {""}
    assert not extra & {"triton", "specforge", "transformers", "hypothesis", "matplotlib"}
    assert extra <= sys.stdlib_module_names


# The start


@pytest.mark.parametrize("target_hidden", [16, 20], ids=["frozen embedding", "own embedding"])
@pytest.mark.parametrize("seed", [0, 7])
def test_start_is_that_of_torchs_layers(seed: int, target_hidden: int) -> None:
    """Of one generator, seeded as SpecForge's script seeds it: embedding, then every matrix."""
    draft = replace(TINY, target_hidden_size=target_hidden)
    config, recipe = specforge.recipe(draft)
    torch.manual_seed(seed)
    embedding = torch.nn.Embedding(draft.vocab_size, draft.hidden_size, 0)
    layers = {}
    for name, shape in shapes(draft).items():
        if len(shape) == 2 and name != EMBED:
            layers[name] = torch.nn.Linear(shape[1], shape[0], bias=False)

    frozen: Any = None  # not read
    params = recipe.start(config, frozen, seed)
    assert list(params) == list(shapes(draft))
    for name, value in params.items():
        assert value.dtype == torch.bfloat16
        if name == EMBED:
            # torch's layer zeroes the padding token's row after the draw.
            assert torch.equal(value[1:], embedding.weight.detach().bfloat16()[1:])
        elif value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            assert torch.equal(value, layers[name].weight.detach().bfloat16()), name


def test_bind_starts_as_the_recipe() -> None:
    case = Case()
    config, recipe = specforge.recipe(case.draft(), train={"steps": 1, "dtype": "float32"})
    frozen = tiny_frozen(case)
    ours = e3.bind(config, frozen, recipe=recipe).init(3)
    expected = specforge.start(config, frozen, 3)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    other = e3.bind(config, frozen).init(3)
    assert not torch.equal(ours["fc.weight"], other["fc.weight"])


# The schedule


def test_schedule_is_the_recursion_above_the_closed_form() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0)
    rate = specforge.schedule(config, 17)
    assert rate(0) == pytest.approx(1.0086, abs=5e-5)
    assert specforge.schedule(config, 1)(0) == 2.0
    assert rate(25) > rate(17)
    with pytest.raises(UserError, match="at least 1 step"):
        specforge.schedule(config, 0)


def test_schedule_can_span_more_than_the_run() -> None:
    config = OptimizerConfig(schedule_steps=100)
    by_run = replace(config, schedule_steps=0)

    def rates(config: OptimizerConfig, total: int) -> list[float]:
        rate = specforge.schedule(config, total)
        return [rate(step) for step in range(20)]

    assert rates(config, 20) == rates(by_run, 100)
    assert rates(by_run, 20) != rates(by_run, 100)
    with pytest.raises(UserError, match="schedule_steps = -1"):
        OptimizerConfig(schedule_steps=-1)


def test_schedule_can_be_shared_by_threads() -> None:
    """Threads that ask for rates past the schedule's end get those of one alone."""
    config = OptimizerConfig(learning_rate=1e-4)
    alone = specforge.schedule(config, 100)
    expected = [alone(step) for step in range(300)]
    shared = specforge.schedule(config, 100)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: [shared(step) for step in range(300)], range(12)))
    finally:
        sys.setswitchinterval(before)
    assert all(rates == expected for rates in found)


# Mask and orders


def test_align_mask_zeroes_the_last_entry() -> None:
    mask = torch.tensor([1, 0, 1, 1])
    assert specforge.align_mask(mask).tolist() == [1, 0, 1, 0]
    assert mask.tolist() == [1, 0, 1, 1]


def config_of(global_batch: int, micro_batch: int) -> Config:
    data = DataConfig(global_batch=global_batch, micro_batch=micro_batch)
    return Config(Case().draft(), data=data)


def torch_stream(n: int, micro: int, shuffle: bool) -> list[int]:
    """Four epochs of `DistributedSampler`, counted from 1, under a loader that drops the rest."""
    places: Any = range(n)
    sampler = DistributedSampler(places, num_replicas=1, rank=0, shuffle=shuffle)
    loader = DataLoader(places, batch_size=micro, sampler=sampler, drop_last=True, collate_fn=list)
    stream = []
    for epoch in range(4):
        sampler.set_epoch(epoch + 1)
        for batch in loader:
            stream += batch
    return stream


@pytest.mark.parametrize(
    ("order", "shuffle"), [(specforge.script_order, True), (specforge.stored_order, False)]
)
@given(n=st.integers(1, 9), micro=st.integers(1, 3), share=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_orders_are_those_of_torchs_sampler_and_loader(order, shuffle, n, micro, share) -> None:
    config = config_of(micro * share, micro)
    if n < micro:
        message = rf"data\.micro_batch = {micro}: {n} samples fill no batch"
        with pytest.raises(UserError, match=message):
            order(n, config, 0)
        return

    stream = torch_stream(n, micro, shuffle)
    assert [order(n, config, place) for place in range(len(stream))] == stream


# Settings of former versions


@pytest.mark.parametrize(
    ("section", "key", "value", "instead"),
    [
        ("objective", "numerics", "legacy", "write objective.numerics=plain"),
        ("optimizer", "schedule", "legacy", "write --recipe specforge"),
        ("optimizer", "accumulation", "legacy", "write optimizer.accumulation=params"),
        ("optimizer", "horizon", 5, "write optimizer.schedule_steps"),
        ("optimizer", "horizon", 0, "write optimizer.schedule_steps"),
        ("train", "init", "legacy", "write --recipe specforge"),
        ("data", "mask_alignment", "legacy", "write --recipe specforge"),
        ("data", "mask_alignment", "serving", "leave it out"),
        ("data", "order", "legacy", "write --recipe specforge"),
        ("data", "order", "stored", "specforge-dataflow"),
        ("data", "order", "seeded", "leave it out"),
    ],
)
def test_old_settings_are_refused_with_their_new_names(section, key, value, instead) -> None:
    with pytest.raises(UserError, match=rf"run.toml: {section}\.{key} = {value!r}.*{instead}"):
        recipes.refuse_old_settings({section: {key: value}}, "run.toml")


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"data": {}},
        {"objective": {"numerics": "plain"}, "train": {"init": "target"}},
        {"optimizer": {"schedule": "cosine", "accumulation": "fp32", "schedule_steps": 5}},
        {"data": 7},
    ],
)
def test_settings_of_now_pass(tree: dict[str, Any]) -> None:
    """What is wrong otherwise is refused where it is read."""
    before = copy.deepcopy(tree)
    assert recipes.refuse_old_settings(tree, "run.toml") is None
    assert tree == before, "the settings are only read"
