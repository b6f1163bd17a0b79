"""`flex_attention` in our unroll: its forward runs on the CPU, its backward on a card alone."""

import pytest
import torch

from eagle3fn.specforge.arithmetic import SPECFORGE
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from tests.specforge.helpers import loss_with
from tests.specforge.private_tape import with_flex


# Unfused, as SpecForge's parity needs it
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_unroll_with_flex_attention_has_the_loss_of_the_plain_attention():
    case = for_specforge(Case(lengths=(17, 17), steps=3, heads=(4, 2), head_dim=8, mask="full"))
    batch = tiny_batch(case)

    # SpecForge's mask counts a sample's last real rows as padding: they are not trained here.
    row_mask = batch.row_mask.clone()
    row_mask[:, :, -2 * case.steps :] = 0
    batch = batch._replace(row_mask=row_mask, plan=None)

    losses = []
    for ops in (SPECFORGE, with_flex(SPECFORGE)):
        with torch.no_grad():
            loss, _ = loss_with(None, ops)(
                tiny_params(case), batch, config=case.config(), frozen=tiny_frozen(case)
            )
        losses.append(loss)

    plain, flex = losses
    assert plain > 0
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-6)
