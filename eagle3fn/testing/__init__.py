"""Property tests of a change: strategies, tiny builders, `assert_equivalent`; and a tiny run."""

from eagle3fn.testing.builders import Case as Case
from eagle3fn.testing.builders import tiny_batch as tiny_batch
from eagle3fn.testing.builders import tiny_frozen as tiny_frozen
from eagle3fn.testing.builders import tiny_params as tiny_params
from eagle3fn.testing.equivalence import Side as Side
from eagle3fn.testing.equivalence import assert_case as assert_case
from eagle3fn.testing.equivalence import assert_equivalent as assert_equivalent
from eagle3fn.testing.strategies import cases as cases
from eagle3fn.testing.tiny_run import write_tiny_run as write_tiny_run
