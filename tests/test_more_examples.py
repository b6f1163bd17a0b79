"""What the examples on sweeps, noise, sharpness, ensembles and ranks print is right."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

import eagle3fn as e3
from eagle3fn.model.plain import PLAIN, logits
from eagle3fn.model.teacher import make_teacher
from eagle3fn.model.unroll import unroll
from eagle3fn.testing import Case, tiny_batch, tiny_frozen, tiny_params, write_tiny_run
from tests.train.start_ranks import torchrun

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny run, as `open_problem` makes it."""
    return write_tiny_run(tmp_path_factory.mktemp("run"), conversations=32, spread=0.3)


@pytest.fixture(autouse=True)
def _examples_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def names_of(example: str) -> dict[str, Any]:
    """An example's functions."""
    return runpy.run_path(str(EXAMPLES / example))


def printed(example: str, folder: Path, monkeypatch: Any, capsys: Any) -> str:
    """What an example prints of a run."""
    monkeypatch.setattr(sys, "argv", [example, str(folder)])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return capsys.readouterr().out


def opened(folder: Path, **sections: Any) -> Any:
    """The problem that the examples open."""
    return names_of("problem.py")["open_problem"]([str(folder)], **sections)


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in gradient.values()])


# sweep.py


def test_sweep_has_the_losses_of_trainings_one_by_one(folder, monkeypatch, capsys) -> None:
    text = printed("sweep.py", folder, monkeypatch, capsys)
    found = dict(re.findall(r"learning rate (\S+): held-out loss (\S+)", text))
    rates = names_of("sweep.py")["RATES"].tolist()
    assert list(found) == [f"{rate:.0e}" for rate in rates]
    assert "same bits as one after another: True" in text
    best = min(found, key=lambda rate: float(found[rate]))
    assert f"best learning rate: {best}\n" in text
    assert (folder / "sweep.png").stat().st_size > 1000

    # By a loop whose schedule has that rate itself.
    config, frozen, features, kept, held_out, _ = opened(
        folder,
        objective=e3.ObjectiveConfig(ttt_length=3),
        optimizer=e3.OptimizerConfig(learning_rate=float(best)),
        data=e3.DataConfig(max_length=128, held_out=4),
        train=e3.TrainConfig(steps=16),
    )
    fns = e3.bind(config, frozen)
    state = fns.init_state(fns.init(0))
    for micro_batches in e3.batches(features, kept, config, 0, 16):
        state, _ = fns.step(state, micro_batches)
    batch = e3.collate([e3.read_sample(features, number) for number in held_out], config)
    loss = float(fns.forward_loss(state.params, batch)[0])
    assert float(found[best]) == pytest.approx(loss, abs=2e-3)


# noise_scale.py


def test_noise_scale_is_that_of_the_per_sample_covariance(folder) -> None:
    """Of one batch: `tr Σ` of the samples' gradients, and `|G|² = |mean|² - tr Σ / N`."""
    config, frozen, features, kept, _, _ = opened(
        folder,
        objective=e3.ObjectiveConfig(ttt_length=2, numerics="plain"),
        data=e3.DataConfig(global_batch=5),
        train=e3.TrainConfig(steps=1, dtype="float64"),
    )
    fns = e3.bind(config, frozen)
    params = fns.init(0)
    (micro_batches,) = e3.batches(features, kept, config, 0, 1)

    def loss(params: dict[str, Tensor], batch: e3.Batch) -> Tensor:
        return fns.forward_loss(params, batch)[0]

    shares = [grad(loss)(params, one) for one in micro_batches]
    signal, noise = names_of("noise_scale.py")["signal_and_noise"](shares)

    # `|mean|²` from `step`, which adds the micro-batches up by itself.
    samples = torch.stack([5 * flat(share) for share in shares])
    covariance = samples.var(0).sum()
    _, metrics = fns.step(fns.init_state(params), micro_batches)
    square = metrics["grad_norm"] ** 2
    assert noise == pytest.approx(float(covariance), rel=1e-9)
    assert signal == pytest.approx(float(square - covariance / 5), rel=1e-6)
    assert noise > 0


def test_noise_scale_estimates_are_unbiased() -> None:
    """Drawn gradients of a known mean and covariance: the estimates' means are these."""
    torch.manual_seed(0)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    spread = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    signal_and_noise = names_of("noise_scale.py")["signal_and_noise"]
    found = []
    for _ in range(2000):
        drawn = mean + spread * torch.randn(3, 3, dtype=torch.float64)
        found.append(signal_and_noise([{"weight": one / 3} for one in drawn]))
    signal, noise = torch.tensor(found).mean(0).tolist()
    assert signal == pytest.approx(float(mean.square().sum()), rel=0.05)
    assert noise == pytest.approx(float(spread.square().sum()), rel=0.05)


def test_noise_scale_suggests_the_last_ratio(folder, monkeypatch, capsys) -> None:
    text = printed("noise_scale.py", folder, monkeypatch, capsys)
    rows = re.findall(r"\|G\|² (\S+), tr Σ (\S+), noise scale (\S+) samples", text)
    assert len(rows) == 4
    for signal, noise, scale in rows:
        assert float(scale) == pytest.approx(float(noise) / float(signal), rel=0.02, abs=0.06)
    assert f"suggested data.global_batch: {max(1, round(float(rows[-1][2])))}\n" in text


# sharpness.py


def test_sharpness_is_the_explicit_hessians_largest_eigenvalue() -> None:
    case = Case(
        heads=(2, 1), head_dim=2, hidden=4, target_hidden=4, intermediate=4, vocab=8, draft_vocab=6,
        dtype="float64", steps=2, mask="full",
    )  # fmt: skip
    params = tiny_params(case)
    batch, config, frozen = tiny_batch(case), case.config(), tiny_frozen(case)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return e3.forward_loss(params, batch, config=config, frozen=frozen)[0]

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([leaf.numel() for leaf in params.values()])
        leaves = zip(params.items(), parts, strict=True)
        return loss({name: part.view_as(leaf) for (name, leaf), part in leaves})

    explicit = jacrev(grad(of_vector))(flat(params))
    eigenvalues = torch.linalg.eigvalsh(explicit)
    largest = max(eigenvalues.tolist(), key=abs)
    sharpest = names_of("sharpness.py")["sharpest"]
    found, direction = sharpest(loss, params, grad(loss)(params), rounds=200)
    assert found == pytest.approx(largest, rel=1e-6)

    # The direction is its eigenvector.
    vector = flat(direction)
    assert torch.allclose(explicit @ vector, found * vector, rtol=1e-3, atol=1e-4 * abs(found))


def test_sharpness_passes_the_limit_in_gradient_descent(folder, monkeypatch, capsys) -> None:
    text = printed("sharpness.py", folder, monkeypatch, capsys)
    rows = re.findall(r"loss (\S+), sharpness (\S+), (\S+) of the limit", text)
    assert len(rows) == 10
    assert float(rows[0][2]) < 1 < float(rows[3][2])
    assert float(rows[-1][0]) < float(rows[0][0])  # the descent goes on all the same


# ensemble.py


def test_acceptance_of_an_ensemble_is_that_of_its_average() -> None:
    case = Case(steps=3, normalization="mask", lengths=(9, 7, 8))
    config, frozen, batch = case.config(), tiny_frozen(case), tiny_batch(case)
    drafts = [tiny_params(replace(case, seed=seed)) for seed in range(3)]
    acceptance = names_of("ensemble.py")["acceptance"]

    # Of one draft: what its loss counts.
    for params in drafts:
        _, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
        found = acceptance([params], batch, config, frozen)
        torch.testing.assert_close(found, aux.accept / aux.accept_rows)

    # Of several: from the draft's logits, row by row.
    teacher = make_teacher(batch.label_hidden, frozen, config.objective)
    states = [list(unroll(params, batch, None, config, frozen, PLAIN)) for params in drafts]
    for step, rate in enumerate(acceptance(drafts, batch, config, frozen).tolist()):
        rates = []
        for row in range(9):
            for sample in range(3):
                label = row + step
                if not batch.row_mask[sample, step, row] or not teacher.known[sample, label]:
                    continue
                each = [
                    logits(params, config.draft, hidden[step])[sample, row].softmax(-1)
                    for params, hidden in zip(drafts, states, strict=True)
                ]
                average = torch.stack(each).mean(0)
                rates.append(torch.minimum(average, teacher.p_full[sample, label]).sum())
        assert rate == pytest.approx(float(torch.stack(rates).mean()), rel=1e-5)


def test_ensemble_is_no_worse_than_its_drafts_on_average(folder, monkeypatch, capsys) -> None:
    """`min(p, ·)` is concave."""
    text = printed("ensemble.py", folder, monkeypatch, capsys)
    rows = [line.rsplit(": ", 1) for line in text.splitlines()]
    assert len(rows) == 5
    rates = torch.tensor([[float(x) for x in row[1].strip("[]").split(", ")] for row in rows])
    single, average, longer = rates[:3], rates[3], rates[4]
    assert len({tuple(row) for row in single.tolist()}) == 3  # of other seeds
    assert (average >= single.mean(0)).all()
    assert (longer > average).all()  # here; as examples/README.md says


# two_ranks.py


def test_two_ranks_print_the_loss_and_digest_of_one(folder, monkeypatch, capsys) -> None:
    alone = printed("two_ranks.py", folder, monkeypatch, capsys).splitlines()
    ended = torchrun(2, EXAMPLES / "two_ranks.py", folder)
    assert ended.codes == [0], ended.text
    last = [line for line in ended.text.splitlines() if line.startswith("loss ")]
    assert last == [alone[-1]]
    assert re.fullmatch(r"loss 0x1\.[0-9a-f]+p[+-]\d+ digest [0-9a-f]{16}", alone[-1])

    # Each holds half of the state and reads half of each batch.
    shares = dict(re.findall(r"rank (\d): (\d+ rows of the state and \d samples)", ended.text))
    rows, samples = re.findall(r"\d+", alone[0].removeprefix("rank 0:"))
    half = f"{int(rows) // 2} rows of the state and {int(samples) // 2} samples"
    assert shares == {"0": half, "1": half}


def test_digest_sees_every_bit() -> None:
    digest = names_of("two_ranks.py")["digest"]
    leaves = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    assert digest(leaves) == digest(dict(reversed(leaves.items())))
    assert digest(leaves) != digest(leaves | {"a": torch.tensor([0.0, -0.0, 0.0])})
