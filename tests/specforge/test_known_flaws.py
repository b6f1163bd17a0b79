"""Where the old tool is wrong, its behaviour and ours; parity's domain leaves these cases out, for the reasons here.

All but the ignored RoPE base are in the wheel too.
"""

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.collate import collate
from eagle3fn.model.losses import step_loss
from eagle3fn.model.rope import rope_table
from eagle3fn.specforge.oracle import Oracle, eager_loss, old_draft, old_forward
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from tests.factories import underflow

CPU = torch.device("cpu")


def old_losses(oracle: Oracle, draft: torch.nn.Module, case: Case, batch: Batch) -> Tensor:
    """The old tool's losses of every unroll step."""
    with eager_loss(oracle), torch.no_grad():
        return torch.stack(
            old_forward(oracle, draft, tiny_frozen(case), batch, case.config().objective).losses
        )


def our_losses(case: Case, batch: Batch) -> Tensor:
    return e3.forward_loss(
        tiny_params(case), batch, config=case.config(), frozen=tiny_frozen(case)
    )[1].losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_long_batch_spoils_the_old_rope_table(oracle: Oracle, dtype: Any) -> None:
    """A sequence past `max_position_embeddings + 20` makes the old module build its table anew, in bf16.

    From then on every batch has other losses than before; fp32 alone is spared. Ours refuses the sequence, and holds
    no table between calls. Outside parity: lengths above `max_position_embeddings`.
    """
    case = Case(dtype=dtype, head_dim=8)
    short, long = tiny_batch(case), tiny_batch(replace(case, lengths=(90,)))
    draft = old_draft(oracle, case.draft(), tiny_params(case), tiny_frozen(case))
    before = old_losses(oracle, draft, case, short)
    assert torch.equal(before, our_losses(case, short))
    old_losses(oracle, draft, case, long)
    assert torch.equal(before, old_losses(oracle, draft, case, short)) == (dtype == "float32")
    with pytest.raises(
        e3.UserError, match="sequence length 90 is beyond max_position_embeddings = 64; lower"
    ):
        our_losses(case, long)
    assert torch.equal(before, our_losses(case, short))


def test_how_far_off_the_spoilt_table_is(oracle: Oracle) -> None:
    """Below position 1,024: bf16 holds whole numbers up to 256 alone, and cosines come out up to 2 away."""
    draft = replace(Case(head_dim=64).draft(), max_position_embeddings=512)
    module = oracle.draft.LlamaRotaryEmbedding(64, max_position_embeddings=512).to(torch.bfloat16)
    here = torch.zeros(1, dtype=torch.bfloat16)
    ours = rope_table(draft, 1024, torch.bfloat16, CPU)
    fresh = [table[0, 0] for table in module(here, seq_len=532)]
    assert all(torch.equal(old, exact[:532]) for old, exact in zip(fresh, ours, strict=True))
    module(here, seq_len=1024)
    spoilt = [table[0, 0] for table in module(here, seq_len=1024)]
    distance = torch.stack(
        [(old - exact).abs().amax(-1) for old, exact in zip(spoilt, ours, strict=True)]
    ).amax(0)
    assert float(distance[3:532].median()) > 0.1 and float(distance.max()) > 1.9
    exact = rope_table(draft, 1024, torch.float32, CPU)
    assert all(
        float((cast - wide).abs().max()) <= 2**-8 for cast, wide in zip(ours, exact, strict=True)
    )


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_the_old_rope_base_is_ignored_with_scaling(oracle: Oracle, name: str) -> None:
    """At the commit its tables are those of base 10,000 whatever the configuration says, but for llama3.

    The wheel has the base right. Ours has it for every variant (`tests/model/test_rope.py`). The old dynamic variant is
    stretched for the length of its own table, 20 more than the limit, whatever the sequence: wrong in the wheel too.
    """
    scaling = {"rope_type": name, "factor": 2.0, "original_max_position_embeddings": 64}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if name == "llama3" else {}
    scaling |= (
        {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
        if name == "yarn"
        else {}
    )
    config = SimpleNamespace(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
        attention_bias=False, rope_scaling=scaling, rope_theta=500_000.0,
    )  # fmt: skip
    cos = oracle.draft.LlamaAttention(config).rotary_emb(torch.zeros(1), seq_len=200)[0][0, 0]
    draft = replace(Case(head_dim=64).draft(), max_position_embeddings=256, rope_scaling=scaling)

    def distance(theta: float, length: int = 256 + 20) -> float:
        ours = rope_table(replace(draft, rope_theta=theta), length, torch.float32, CPU)[0]
        return float((ours[:200] - cos).abs().max())

    right = name == "llama3" or oracle.kind == "wheel"
    assert (distance(500_000.0) < 1e-4) == right
    assert (distance(10_000.0) < 1e-4) == (not right)
    if right:
        assert (distance(500_000.0, 200) < 1e-4) == (name != "dynamic")


def padded(batch: Batch, more: int) -> Batch:
    """The batch with `more` padded places."""
    return Batch(
        *(
            torch.nn.functional.pad(x, (0, 0, 0, more) if x.ndim == 3 else (0, more))
            for x in batch[:5]
        )
    )


def test_padding_moves_the_old_lambda_loss(oracle: Oracle) -> None:
    """Its KL part is divided by all rows, its acceptance part by trained ones: padding alone halves the loss.

    Ours does the same under the old setting, `normalization = "rows"`, bit for bit, and under "mask" does not.
    """
    case = Case(loss="lk_lambda", lengths=(8,), steps=2)
    draft = old_draft(oracle, case.draft(), tiny_params(case), tiny_frozen(case))
    short, long = (tiny_batch(case), padded(tiny_batch(case), 40))
    old = [old_losses(oracle, draft, case, batch) for batch in (short, long)]
    assert all(
        torch.equal(left, our_losses(case, batch))
        for left, batch in zip(old, (short, long), strict=True)
    )
    assert all(old[1] < 0.7 * old[0])
    better = replace(case, normalization="mask")
    torch.testing.assert_close(
        our_losses(better, short), our_losses(better, long), rtol=1e-5, atol=1e-6
    )


def test_alpha_has_no_gradient_beside_one_masked_row(oracle: Oracle) -> None:
    """A draft probability of zero where the teacher has its mass: NaN, though the row is masked and the loss finite.

    Ours has zero there and the old tool's bits in the other rows. Outside parity: underflow under LK losses.
    """
    logits, p, q, _ = underflow()
    mask = torch.tensor([[0, 1, 0, 1]])[..., None]
    old, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with eager_loss(oracle):
        loss = oracle.eagle3._compute_loss_and_acceptance_rate(
            logits=old, target_p=p, target_p_on_draft=q, position_mask=mask, lk_loss_type="alpha", kl_scale=1.0,
            kl_decay=3.0,
        )[1]  # fmt: skip
    mine = step_loss(
        ours, p, q, mask, None, e3.ObjectiveConfig(loss="lk_alpha", numerics="legacy")
    )[0]
    loss.backward()
    mine.backward()
    assert torch.isfinite(loss) and torch.equal(loss, mine)
    assert old.grad is not None and ours.grad is not None
    assert old.grad[0, [0, 2]].isnan().all()
    assert not ours.grad[0, [0, 2]].any() and ours.grad[0, [1, 3]].all()
    assert torch.equal(ours.grad[0, [1, 3]], old.grad[0, [1, 3]])


CASE = Case(vocab=40, draft_vocab=40, steps=1)
SPOKEN = (3, 4, 5)  # the assistant's tokens of nine


def spoken_sample() -> Sample:
    batch = tiny_batch(replace(CASE, lengths=(9,)))
    mask = torch.tensor([int(token in SPOKEN) for token in range(9)])
    return Sample(batch.input_ids[0], mask, batch.aux_hidden[0], batch.last_hidden[0])


def labels(loss_of, batch: Batch) -> list[int]:
    """Tokens whose distribution the loss learns: it changes when the target's state before the token does."""
    base = loss_of(batch)
    found = []
    for token in range(1, 9):
        other = batch.last_hidden.clone()
        other[0, token - 1] += 1.0
        found += (
            [token] if not torch.equal(loss_of(batch._replace(last_hidden=other)), base) else []
        )
    return found


def test_the_old_mask_lies_one_row_late(oracle: Oracle) -> None:
    """SpecForge issue 885: the row of a server's first draft in a turn is not trained, two behind the turn are.

    Of assistant tokens 3, 4, 5 a server's draft says 4 and 5 (the target says 3 as it reads the prompt). The old tool
    learns 5, and 6 and 7 behind the end.
    """
    draft = old_draft(oracle, CASE.draft(), tiny_params(CASE), tiny_frozen(CASE))
    batch = collate([spoken_sample()], "legacy", 64)
    assert labels(lambda one: old_losses(oracle, draft, CASE, one), batch) == [5, 6, 7]


@pytest.mark.usefixtures("oracle")
def test_the_legacy_batch_is_the_old_readers() -> None:
    """Through its own offline reader, cut or not; that one writes into the mask it is given."""
    name = "specforge.data.preprocessing"
    try:
        reader = importlib.import_module(name).OfflineEagle3Dataset
    except ImportError as error:
        pytest.skip(
            f"{name} cannot be imported ({error}); pip install datasets beside the old tool"
        )
    for length in (64, 9, 5):
        sample = spoken_sample()
        ours = collate([sample], "legacy", length)
        stored = {"input_ids": sample.input_ids, "loss_mask": sample.token_mask}
        stored |= {
            "aux_hidden_state": sample.aux_hidden[None],
            "hidden_state": sample.last_hidden[None],
        }
        made = reader.process_data(stored, length)
        theirs = [
            made[key]
            for key in ("input_ids", "attention_mask", "loss_mask", "hidden_state", "target")
        ]
        assert all(torch.equal(left, right) for left, right in zip(ours[:5], theirs, strict=True))
        assert int(ours.row_mask.sum()) == (1 if length == 5 else 3)


@pytest.mark.parametrize(("alignment", "learnt"), [("legacy", [5, 6, 7]), ("serving", [4, 5])])
def test_the_serving_rule_trains_what_a_server_drafts(alignment: str, learnt: list[int]) -> None:
    batch = collate([spoken_sample()], alignment, 64)
    assert labels(lambda one: our_losses(CASE, one), batch) == learnt


def test_alpha_of_a_peaked_draft_has_no_gradient_in_specforge_and_one_here(oracle: Oracle) -> None:
    """So sure a draft that most of its probabilities are zero in fp32: acceptance underflows."""
    case = Case(loss="lk_alpha", steps=2)
    config = case.config()
    frozen = tiny_frozen(case)
    batch = tiny_batch(case)
    params = tiny_params(case)
    params["lm_head.weight"] = params["lm_head.weight"] * 4000

    draft = old_draft(oracle, case.draft(), params, frozen)
    with eager_loss(oracle):
        losses = old_forward(oracle, draft, frozen, batch, config.objective).losses
    theirs = sum((config.objective.decay**i * value for i, value in enumerate(losses)), start=0)
    assert isinstance(theirs, Tensor)
    theirs.backward()
    gradients = {name: leaf.grad for name, leaf in draft.named_parameters()}
    assert torch.isfinite(theirs)
    assert gradients["fc.weight"].isnan().any()

    def loss_of(params: dict[str, Tensor]) -> Any:
        return e3.forward_loss(params, batch, config=config, frozen=frozen)

    (ours, _), grads = e3.value_and_grad(loss_of, has_aux=True)(params)
    assert torch.isfinite(ours)
    assert all(torch.isfinite(value).all() for value in grads.values())
