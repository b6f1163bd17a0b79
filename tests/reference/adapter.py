"""The reference on a drawn case."""

from torch import Tensor

from eagle3fn.base.types import Params
from eagle3fn.testing.builders import Case, on, tiny_frozen, tiny_params, tiny_unaligned
from tests.reference.model import Draft
from tests.reference.objective import Metrics, forward, weighted_sum


def reference_draft(case: Case, device: str = "cpu") -> Draft:
    """The draft of a case, with its weights."""
    frozen = on(device, tiny_frozen(case))
    draft = Draft(case.draft(), frozen.embed_tokens, frozen.t2d, frozen.d2t)
    return draft.load(on(device, tiny_params(case)))


def run_reference(case: Case, device: str = "cpu") -> tuple[Tensor, Metrics, Params]:
    """Loss, metrics, and the gradients of the leaves that have one, by `.backward()`."""
    draft = reference_draft(case, device)
    head = on(device, tiny_frozen(case)).target_head
    batch = on(device, tiny_unaligned(case))
    objective = case.config().objective

    losses, metrics = forward(draft, head, batch, objective)
    loss = weighted_sum(losses, objective.decay)
    loss.backward()

    gradients = {}
    for name, leaf in draft.trainable().items():
        if leaf.grad is not None:
            gradients[name] = leaf.grad
    return loss, metrics, gradients
