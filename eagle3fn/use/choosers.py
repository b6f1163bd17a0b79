"""How one decoded sequence chooses its tokens: the greedy way, and by drawing them."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eagle3fn.base.sampling import Sampling
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.sampling import distribution, draw, nucleus, overlap, tempered, verify


class Chosen(NamedTuple):
    """What a run of the target emits.

    Attributes:
        tokens: the accepted drafted tokens and the target's own one, `(1, A + 1)`.
        overlaps: the chance of each drafted token's place to be accepted; none if greedy.
        chances: the target's probability of each of `tokens`, before top-p; none if greedy.
    """

    tokens: Tensor
    overlaps: list[float]
    chances: list[float]


class Chooser(Protocol):
    """Drafts a round's tokens, and chooses what is emitted of them."""

    def draft(self, drafter: Drafter, aux: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Commit rows and draft `count` >= 1 tokens, `(1, count)`: `Drafter.draft`."""
        ...

    def choose(self, drafted: Tensor, logits: Tensor) -> Chosen:
        """Choose by the target's `logits` `(1, C + 1, V)` after each of `drafted` `(1, C)`."""
        ...


def chooser(sampling: Sampling) -> Chooser:
    """The way of choosing at this temperature."""
    return Sampled(sampling) if sampling.temperature > 0 else Greedy()


class Greedy:
    """The likeliest tokens of draft and target; a drafted token must be the target's own."""

    def draft(self, drafter: Drafter, aux: Tensor, tokens: Tensor, count: int) -> Tensor:
        """As `Chooser.draft`."""
        return drafter.draft(aux, tokens, count)

    def choose(self, drafted: Tensor, logits: Tensor) -> Chosen:
        """As `Chooser.choose`."""
        predicted = logits.argmax(-1)  # (1, C + 1)
        accepted = common_prefix(drafted[0].tolist(), predicted[0].tolist())
        return Chosen(predicted[:, : accepted + 1], [], [])


class Sampled:
    """Tokens drawn from draft and target by speculative sampling (`use.sampling`).

    Temperature and top-p shape both distributions: the draft then seldom draws what the target
    cannot. The random numbers are those of `sampling.seed` alone.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.q: list[Tensor] = []  # of this round's drafted tokens, each (D,)
        self.target_ids = torch.zeros(0, dtype=torch.int64)  # (D,)

    def draft(self, drafter: Drafter, aux: Tensor, tokens: Tensor, count: int) -> Tensor:
        """As `Chooser.draft`; keeps what each token was drawn from."""
        self.q = []
        self.target_ids = drafter.target_ids
        return drafter.draft(aux, tokens, count, self._pick)

    def choose(self, drafted: Tensor, logits: Tensor) -> Chosen:
        """As `Chooser.choose`."""
        count = drafted.shape[1]
        whole = tempered(logits[0], self.sampling.temperature)  # (C + 1, V)
        p = nucleus(whole, self.sampling.top_p)

        # The draft's distributions over the target's ids: (C, V)
        q = torch.zeros_like(p[:count])
        if count:
            q[:, self.target_ids] = torch.stack(self.q)

        tokens = verify(drafted[0].tolist(), p, q, self._uniforms(count + 1))
        emitted = torch.tensor([tokens], device=logits.device)
        chances = whole[: len(tokens)].gather(-1, emitted[0][:, None])[:, 0]
        return Chosen(emitted, overlap(p[:count], q).tolist(), chances.tolist())

    def _pick(self, logits: Tensor) -> Tensor:
        """Draw a draft id `(1, 1)` from draft logits `(1, 1, D)`."""
        chances = distribution(logits[0, 0], self.sampling)
        self.q.append(chances)
        drawn = draw(chances, self._uniforms(1)[0])
        return torch.tensor([[drawn]], device=logits.device)

    def _uniforms(self, count: int) -> list[float]:
        """Numbers in [0, 1); from the CPU, so that every device has the same."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64).tolist()


def common_prefix(drafted: list[int], greedy: list[int]) -> int:
    """The number of drafted tokens before the first that differs from the target's own."""
    for position, (token, expected) in enumerate(zip(drafted, greedy, strict=False)):
        if token != expected:
            return position
    return len(drafted)
