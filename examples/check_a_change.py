"""A change of the objective is property-tested: a right one passes, a wrong one is found.

The change: gradients are accumulated, one sample at a time. Each sample's sum over rows must be
divided by the rows of the whole batch. Its own are wrong, but not where all samples have as many.
"""

import torch
from hypothesis import find, settings

import eagle3fn as e3
from eagle3fn.testing import assert_equivalent, cases, tiny_batch, tiny_frozen, tiny_params


def by_sample(params, batch, config, frozen, row_counts):
    """Loss and metrics, summed over batches of one sample."""
    losses, metrics = [], []
    for number in range(len(batch.row_mask)):
        fields = zip(batch._fields[:6], batch[:6], strict=True)
        own = {name: x[number : number + 1] for name, x in fields if x is not None}
        one = batch._replace(**own, row_counts=row_counts, plan=None)
        loss, aux = e3.forward_loss(params, one, config=config, frozen=frozen)
        losses.append(loss)
        metrics.append(aux)
    sums = [torch.stack(field).sum(0) for field in zip(*metrics, strict=True)]
    return torch.stack(losses).sum(), e3.Aux(*sums)


def right(params, batch, *, config, frozen):
    """Divided by the rows that the whole batch trains at each unroll step."""
    row_counts = batch.row_mask.sum((0, 2)).float().clamp(min=1)
    return by_sample(params, batch, config, frozen, row_counts)


def wrong(params, batch, *, config, frozen):
    """The mean over samples, each divided by its own rows."""
    loss, aux = by_sample(params, batch, config, frozen, row_counts=None)
    return loss / len(batch.row_mask), aux


def differs(case) -> bool:
    """Whether the wrong one's loss is another than ours."""
    tensors = tiny_params(case), tiny_batch(case)
    given = {"config": case.config(), "frozen": tiny_frozen(case)}
    return not torch.isclose(wrong(*tensors, **given)[0], e3.forward_loss(*tensors, **given)[0])


def main() -> None:
    """Compare loss, metrics and every gradient; sums in another order round otherwise."""
    assert_equivalent(right, cases=20, ulps=100, dtype="float64", normalization="mask")
    print("right: equal to ours on 20 problems")

    # Hypothesis looks for a problem, and shrinks it: two samples, of which one has more rows.
    problems = cases(dtype="float64", normalization="mask")
    found = find(problems, differs, settings=settings(derandomize=True, database=None))
    print("wrong:", found, "trains rows", tiny_batch(found).row_mask.sum((1, 2)).tolist())


if __name__ == "__main__":
    main()
