"""Property tests against this package or the old tool: strategies, tiny builders, `assert_equivalent`."""

from eagle3fn.testing.builders import Case as Case
from eagle3fn.testing.builders import tame_batch as tame_batch
from eagle3fn.testing.builders import tame_frozen as tame_frozen
from eagle3fn.testing.builders import tame_params as tame_params
from eagle3fn.testing.equivalence import assert_case as assert_case
from eagle3fn.testing.equivalence import assert_equivalent as assert_equivalent
from eagle3fn.testing.strategies import cases as cases
from eagle3fn.testing.strategies import oracle_cases as oracle_cases
