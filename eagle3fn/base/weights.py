"""Weights by name, as a setting's value."""

from collections.abc import Mapping
from typing import Any, NoReturn

from eagle3fn.base.errors import UserError, shown

HEAVIEST = 1e6
LIGHTEST = 1e-6
"""Of all weights: beyond them a part has no effect in fp32, or no other part has."""


class Weights(dict[str, float]):
    """Weights by name, in the names' order: equal tables give equal sums, to the bit.

    It is a dict for JSON and TOML, cannot be changed, and has a hash, as every value of a frozen
    configuration.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(sorted(weights.items()))

    def _fixed(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("the weights of a configuration cannot be changed; make another one")

    __setitem__ = __delitem__ = __ior__ = _fixed
    clear = pop = popitem = setdefault = update = _fixed  # pyright: ignore[reportAssignmentType]

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Equal for equal tables."""
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as a whole: it has no items to be set one by one."""
        return Weights, (dict(self),)


def name_or_weights(value: Any, setting: str) -> str | Weights:
    """A name, or a table of weights by name, checked; one name of weight 1 is the name.

    Raises:
        UserError: neither, an empty table, or a weight that is no number from `LIGHTEST` to
            `HEAVIEST`; `setting` names it.
    """
    given = f"{setting} = {shown(value)}"
    if isinstance(value, str):
        if value.startswith("{"):
            raise UserError(
                f"{given}: is no TOML table; write {{name = 0.1, other = 0.9}}, and a name with a "
                'colon in quotes, {"module:function" = 1.0}'
            )
        return value

    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{given}: must be a name, or a table of names with their weights")
    if not value:
        raise UserError(f"{given}: names nothing; write a name, or one or several with a weight")
    for name, weight in value.items():
        if type(weight) not in (int, float) or not LIGHTEST <= weight <= HEAVIEST:
            raise UserError(
                f"{setting}: the weight of {shown(name)} is {shown(weight)}: must be a number "
                f"from {LIGHTEST:g} to {HEAVIEST:g}"
            )

    weights = Weights({name: float(weight) for name, weight in value.items()})
    first = next(iter(weights))
    return first if weights == {first: 1.0} else weights
