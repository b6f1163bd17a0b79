"""Samples whose features a pool of sources computes when they are asked for.

Tokens and masks of all samples are known, or with `Answers` those of all prompts. One update's
samples of a rank are a group: a source computes them together, so that their bits depend neither on
where a run was resumed nor on what else is asked for.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.types import Sample
from eagle3fn.data.generate import Sampling
from eagle3fn.data.rollout import Group, rolled_out
from eagle3fn.data.samples import Encoded
from eagle3fn.data.source_pool import Pool
from eagle3fn.data.sources import FeatureSource
from eagle3fn.data.stages import Item, Loaded, Share, stage
from eagle3fn.data.validate import hidden_fault, token_fault

BUFFER = 2**30
"""Bytes of samples that are rolled out ahead, where nobody says how many."""
_SEEDS_APART = 1_000_003


class Keeper(Protocol):
    """What keeps samples as they pass."""

    def passed(self, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        """Called with samples and their numbers, by several threads."""
        ...

    def settle(self) -> None:
        """Let what has passed be on the disk; all ranks call."""
        ...


class Widths(NamedTuple):
    """What the states of a token are."""

    taps: int  # A
    hidden: int  # Ht
    stored: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's states, id and mask."""
        return (self.taps + 1) * self.hidden * self.stored.itemsize + 2 * torch.int64.itemsize


class Asked(NamedTuple):
    """What a group is of."""

    numbers: list[int]
    share: Share[list[int]] | None  # None: of a sample by itself


class OnlineSamples:
    """A `data.features.OnDemand` over a pool of sources.

    Args:
        rows: tokens and masks; with `answers` prompts, followed by one supervised place for every
            token that an answer may have.
        pool: the sources; None: tokens alone are read.
        widths: of the states.
        answers: how the target writes; None: the rows have their answers.

    Attributes:
        buffer: bytes of samples that may be waited for or ready, for each stage that loads.
        seed: of the answers.
        keeper: what is called with the samples of each group that is loaded; None: nothing.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        pool: Pool | None,
        widths: Widths,
        answers: Sampling | None = None,
    ) -> None:
        self.rows = rows
        self.pool = pool
        self.widths = widths
        self.buffer = BUFFER
        self.seed = 0
        self.answers = answers is not None
        self.keeper: Keeper | None = None
        self._sampling = answers
        # Samples that have one answer for the whole run, and those answers.
        self._fixed: dict[int, Encoded | None] = {}
        # Their features, as many as fit `buffer`; evaluations come one after another.
        self._held: dict[int, Sample] = {}
        self._held_bytes = 0

    def fix(self, numbers: Iterable[int]) -> None:
        """Let these samples, the held-out ones, keep the first answer that the target writes.

        Their features stay in memory, as far as they fit into `buffer` once more.
        """
        for number in numbers:
            self._fixed.setdefault(number)

    # As `OnDemand` has them

    def tokens(self, number: int) -> tuple[Tensor, Tensor]:
        """`input_ids` and `token_mask` of a sample; with answers that are written, of the longest
        that may be.
        """
        row = self._fixed.get(number) or self.rows[number]
        return row.input_ids, row.token_mask

    def sample(self, number: int) -> Sample:
        """One sample, computed alone.

        Raises:
            UserError: as `data.rollout.rolled_out`.
        """
        group = self._group(Asked([number], None), 0)
        with closing(self.rolled([group])) as rolled:
            return next(rolled)[1][0]

    def load(self, shares: Iterable[Item[Share[list[int]]]]) -> Generator[Item[Loaded], None, None]:
        """As `data.stages.read`: the samples of a rank's own bins, and the masks of the others'.

        With answers that are written no mask of another rank's sample is known: there are none.

        Raises:
            UserError: as `data.rollout.rolled_out`.
        """
        return _loaded(shares, self)

    def settle(self) -> None:
        """As `OnDemand.settle`.

        Raises:
            UserError: not written, on whichever rank.
        """
        if self.keeper:
            self.keeper.settle()

    # Groups

    def group_of(self, item: Item[Share[list[int]]]) -> Group:
        """An update's samples of this rank."""
        numbers = [number for each in item.value.own for number in each]
        return self._group(Asked(numbers, item.value), item.place)

    def rolled(self, groups: Iterable[Group]) -> Generator[tuple[Group, list[Sample]], None, None]:
        """The groups' samples, in their order; what is in memory is not asked for again."""
        return _rolled(groups, self)

    def rolled_anew(
        self, groups: Iterable[Group]
    ) -> Generator[tuple[Group, list[Sample]], None, None]:
        """The groups' samples, in their order, all by the sources."""
        assert self.pool is not None, "features without a source"
        return rolled_out(groups, self.pool, self._ask, self.buffer)

    def held(self, group: Group) -> list[Sample] | None:
        """The samples of a group that are in memory; None unless all are."""
        found = [self._held.get(number) for number in group.key.numbers]
        return [sample for sample in found if sample] if found and all(found) else None

    def hold(self, group: Group, samples: list[Sample]) -> None:
        """Keep a held-out sample in memory, if it fits."""
        for number, sample in zip(group.key.numbers, samples, strict=True):
            size = sum(value.nbytes for value in sample)
            fits = self._held_bytes + size <= self.buffer
            if number in self._fixed and number not in self._held and fits:
                self._held[number] = sample
                self._held_bytes += size

    def _group(self, asked: "Asked", place: int) -> Group:
        rows = [Encoded(self.rows[number].id, *self.tokens(number)) for number in asked.numbers]
        tokens = sum(len(row.input_ids) for row in rows)
        return Group(asked, place, rows, tokens * self.widths.bytes_per_token)

    def _ask(self, source: FeatureSource, group: Group) -> list[Sample]:
        """What a source computes of a group, checked."""
        numbers = group.key.numbers
        alone = len(numbers) == 1 and (group.key.share is None or numbers[0] in self._fixed)
        if self._sampling is None or (alone and self._fixed.get(numbers[0])):
            samples = source.features(group.rows, self.widths.stored)
        else:
            # Ranks are at one place with other samples.
            drawn = 0 if alone else group.place
            seed = (self.seed + drawn) * _SEEDS_APART + numbers[0]
            samples = self._written(source, group, self._sampling, seed)

        if len(samples) != len(group.rows):
            raise UserError(f"a source gave {len(samples)} samples of {len(group.rows)} rows")
        for row, sample in zip(group.rows, samples, strict=True):
            self._check(row, sample)
        if self.answers and alone and numbers[0] in self._fixed and not self._fixed[numbers[0]]:
            (sample,) = samples
            known = Encoded(group.rows[0].id, sample.input_ids, sample.token_mask)
            self._fixed[numbers[0]] = known
        return samples

    def _written(
        self, source: FeatureSource, group: Group, sampling: Sampling, seed: int
    ) -> list[Sample]:
        """The target's answers to a group's prompts, drawn by `seed`."""
        assert source.write is not None
        prompts = []
        for row in group.rows:
            length = len(row.input_ids) - int(row.token_mask.sum())
            prompts.append(Encoded(row.id, row.input_ids[:length], row.token_mask[:length]))
        return source.write(prompts, sampling, seed, self.widths.stored)

    def _check(self, row: Encoded, sample: Sample) -> None:
        """Refuse features that training would refuse, or that would train a wrong draft."""
        what = token_fault(sample.input_ids, sample.token_mask)
        if what is None and not self.answers and not torch.equal(sample.input_ids, row.input_ids):
            what = "its tokens are not those that were asked for"
        if what is None and not self.answers and not torch.equal(sample.token_mask, row.token_mask):
            what = "its mask is not that of the row"
        if what is None:
            what = hidden_fault(
                sample.aux_hidden,
                sample.last_hidden,
                length=len(sample.input_ids),
                taps=self.widths.taps,
                size=self.widths.hidden,
                dtype=str(self.widths.stored).removeprefix("torch."),
            )
        if what:
            raise UserError(
                f"sample {printable(repr(row.id))}: {what}; look at the target's weights and at "
                "what computes it, or leave the row out"
            )


@stage
def _rolled(groups: Iterable[Group], online: OnlineSamples) -> Iterator[tuple[Group, list[Sample]]]:
    """`OnlineSamples.rolled`."""
    coming = deque[tuple[Group, list[Sample] | None]]()

    def missing() -> Iterator[Group]:
        for group in groups:
            held = online.held(group)
            coming.append((group, held))
            if held is None:
                yield group

    with closing(online.rolled_anew(missing())) as rolled:
        for asked, samples in rolled:
            while (first := coming.popleft())[1] is not None:
                yield first[0], first[1]
            online.hold(asked, samples)
            yield asked, samples
    for group, held in coming:
        assert held is not None
        yield group, held


@stage
def _loaded(
    items: Iterable[Item[Share[list[int]]]], online: OnlineSamples
) -> Iterator[Item[Loaded]]:
    """`OnlineSamples.load`."""
    with closing(online.rolled(map(online.group_of, items))) as rolled:
        for group, samples in rolled:
            numbers, share = group.key
            if online.keeper:
                online.keeper.passed(numbers, samples)

            # Back into their bins.
            left = iter(samples)
            bins = [[next(left) for _ in each] for each in share.own]
            others = []
            if not online.answers:
                others = [online.tokens(number)[1] for each in share.others for number in each]
            yield Item(Loaded(share.own, bins, others), group.place)
