"""The reference run on a drawn case."""

from torch import Tensor

from eagle3fn.base.types import Params
from eagle3fn.testing.builders import Case, tame_batch, tame_frozen, tame_params
from tests.reference.model import Draft
from tests.reference.objective import Metrics, forward, weighted_sum


def reference_draft(case: Case) -> Draft:
    """The draft of a case with its weights."""
    frozen = tame_frozen(case)
    return Draft(case.draft(), frozen.embed_tokens, frozen.t2d, frozen.d2t).load(tame_params(case))


def run_reference(case: Case) -> tuple[Tensor, Metrics, Params]:
    """Loss, metrics, and the gradients of the leaves that have one, by `.backward()`."""
    draft, objective = reference_draft(case), case.config().objective
    losses, metrics = forward(draft, tame_frozen(case).target_head, tame_batch(case), objective)
    loss = weighted_sum(losses, objective.decay)
    loss.backward()
    return loss, metrics, {name: leaf.grad for name, leaf in draft.trainable().items() if leaf.grad is not None}
