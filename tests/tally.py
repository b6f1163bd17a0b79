"""Counts of the drawn cases that a property was checked on."""

from eagle3fn.specforge import parity
from eagle3fn.testing import Case

NONTRIVIAL = 0.8
"""The least share of cases that must leave something to compare."""


class Tally:
    """The cases of one property, and how many of them leave something to compare."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases: list[Case] = []
        self.nontrivial = 0

    def add(self, case: Case, nontrivial: bool) -> None:
        self.cases.append(case)
        self.nontrivial += nontrivial

    def check(self) -> None:
        """Fail unless four of five cases are non-trivial.

        Those of one-token samples don't count: Hypothesis begins with them, and under most masks
        they train no row.
        """
        counted = sum(max(case.lengths) > 1 for case in self.cases)
        assert counted, "no case was checked"
        assert self.nontrivial >= int(NONTRIVIAL * counted), self.describe()

    def describe(self) -> str:
        """One line: cases, non-trivial ones, and counts by dtype, loss and unroll length."""
        head = f"{self.name}: {len(self.cases)} cases, {self.nontrivial} non-trivial"
        return "; ".join([head, *parity.describe_counts(parity.counts(self.cases))])
