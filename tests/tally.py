"""Counts of the drawn cases that a property was checked on."""

from eagle3fn.specforge import parity
from eagle3fn.testing import Case

ENOUGH = 0.8


class Tally:
    """The cases of one property; a case whose loss or a gradient is all zero is trivial."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases: list[Case] = []
        self.nontrivial = 0

    def add(self, case: Case, nontrivial: bool) -> None:
        self.cases.append(case)
        if nontrivial:
            self.nontrivial += 1

    def check(self) -> None:
        """Four of five cases must be non-trivial.

        Those of one-token samples don't count: Hypothesis begins with them, and under most masks
        they train no row.
        """
        counted = sum(max(case.lengths) > 1 for case in self.cases)
        assert counted, f"{self.name}: no case of more than one token was drawn"
        assert self.nontrivial >= int(ENOUGH * counted), self.describe()

    def describe(self) -> str:
        """One line: counts, and the cases by dtype, loss and unroll length."""
        head = f"{self.name}: {len(self.cases)} cases, {self.nontrivial} non-trivial"
        return "; ".join([head, *parity.describe_counts(parity.counts(self.cases))])
