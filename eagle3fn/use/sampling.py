"""Speculative sampling: what is emitted has exactly the target's distribution.

The draft draws a token `x` from its distribution `q`. The target, whose distribution is `p`, keeps
it with the chance `min(1, p(x) / q(x))`; else one token is drawn from the residual,

    r = max(p - q, 0) / Σ max(p - q, 0)

A token comes out with the probability `q(x) min(1, p(x) / q(x)) + (1 - Σ min(p, q)) r(x) = p(x)`
(Leviathan et al., https://arxiv.org/abs/2211.17192). Random numbers are arguments, so every
function is a function of what it is given. Distributions are fp64.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import Sampling


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from: the tempered softmax, cut to its nucleus. `(…, V)` to `(…, V)` fp64."""
    return nucleus(tempered(logits, sampling.temperature), sampling.top_p)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """`softmax(logits / temperature)` `(…, V)` in fp64, at a temperature above 0."""
    logits = logits.double()
    shifted = logits - logits.amax(-1, keepdim=True)
    return torch.softmax(shifted / temperature, dim=-1)


def nucleus(chances: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens whose mass reaches `top_p`, and no more of them, normalised: `(…, V)`.

    Of equally likely tokens the lower ids come first. With `top_p` 1 nothing is cut.
    """
    if top_p >= 1:
        return chances
    ordered, ids = chances.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the mass of the likelier ones
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(chances).scatter(-1, ids, ordered)
    return kept / kept.sum(-1, keepdim=True)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """The chance that a token drawn from `q` is accepted: `Σ min(p, q)`, `(…, V)` to `(…)`."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a token is drawn from after a rejection: `max(p - q, 0)`, normalised; `(V,)`.

    `p` where nothing is left, as `p` and `q` are equal to rounding.
    """
    left = (p - q).clamp_min(0.0)
    mass = left.sum()
    return left / mass if mass > 0 else p


def draw(chances: Tensor, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the distribution function of `chances` `(V,)`.

    Raises:
        UserError: a chance is NaN or infinite.
    """
    mass = chances.cumsum(-1)
    total = mass[-1]
    if not torch.isfinite(total):
        raise UserError(
            "a distribution to draw from holds NaN or infinity: the logits of target or draft are "
            "not finite; decode in float32, or mend the weights"
        )

    # The first token whose mass, with all before it, is beyond the place. Below the total even if
    # the product is rounded up, so a token of no mass is never drawn.
    below = torch.nextafter(total, torch.zeros_like(total))
    place = torch.minimum(total * uniform, below)
    return int(torch.searchsorted(mass, place, right=True))


def verify(drafted: Sequence[int], p: Tensor, q: Tensor, uniforms: Sequence[float]) -> list[int]:
    """The tokens that a round emits: the drafted ones up to the first rejected, and one more.

    The last one is drawn from the residual of the rejected place, or from the last row of `p` if
    all were accepted.

    Args:
        drafted: `C` token ids; each was drawn from its row of `q`.
        p: the target's distributions, `(C + 1, V)`.
        q: the draft's, `(C, V)`, over the target's ids.
        uniforms: `C + 1` numbers in [0, 1): one for each drafted token, and one for the last draw.
    """
    places = torch.arange(len(drafted), device=p.device)
    ids = torch.tensor(drafted, dtype=torch.int64, device=p.device)
    ratios = (p[places, ids] / q[places, ids]).tolist()

    for place, ratio in enumerate(ratios):
        if uniforms[place] >= min(1.0, ratio):
            instead = draw(residual(p[place], q[place]), uniforms[-1])
            return [*drafted[:place], instead]
    return [*drafted, draw(p[-1], uniforms[-1])]


def of_prompt(sampling: Sampling, number: int) -> Sampling:
    """The sampling of prompt `number`, whose random numbers depend on no other prompt."""
    digest = hashlib.sha256(f"{sampling.seed} {number}".encode()).digest()
    return sampling._replace(seed=int.from_bytes(digest[:8], "little") >> 1)
