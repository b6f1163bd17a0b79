"""Samples with features on demand: a wrong answer is refused before it is a batch."""

import re
from contextlib import closing

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Sample
from eagle3fn.data.on_demand import OnlineSamples, Widths
from eagle3fn.data.stages import Item, Share
from tests.data.planned_sources import HIDDEN, TAPS, Sources, pool_of, row_of

WIDTHS = Widths(TAPS, HIDDEN, torch.bfloat16)


def with_aux(sample: Sample, change) -> Sample:
    return sample._replace(aux_hidden=change(sample.aux_hidden))


def with_nan(states):
    states = states.clone()
    states[1, 0] = torch.nan
    return states


WRONG = {
    "taps": (lambda s: with_aux(s, lambda aux: aux[:, HIDDEN:]), r"must be \(\d, 12\)"),
    "width": (
        lambda s: s._replace(last_hidden=s.last_hidden[:, 1:]),
        r"last_hidden \(\d, 3\): must be",
    ),
    "length": (lambda s: with_aux(s, lambda aux: aux[:-1]), "aux_hidden .*must be"),
    "dtype": (lambda s: with_aux(s, torch.Tensor.float), "both must be bfloat16"),
    "nan": (lambda s: with_aux(s, with_nan), "aux_hidden holds NaN or infinity at token 1"),
    "ids": (lambda s: s._replace(input_ids=s.input_ids + 1), "not those that were asked for"),
    "mask": (lambda s: s._replace(token_mask=1 - s.token_mask), "mask is not that of the row"),
}


def load(wrong) -> list:
    """Two updates of two samples, as training reads them; the second answer is wrong."""
    answers = iter([lambda samples: samples, wrong])
    pool = pool_of(Sources(wrong=lambda samples: next(answers)(samples)), 1)  # noqa: PLW0108
    online = OnlineSamples([row_of(number) for number in range(4)], pool, WIDTHS)
    items = [Item(Share([[0, 1]], []), 2), Item(Share([[2], [3]], []), 4)]
    found = []
    try:
        with pool, closing(online.load(items)) as loaded:
            found.extend(loaded)
    except UserError as error:
        found.append(str(error))
    return found


def test_right_answers_come_in_their_bins():
    first, second = load(list)
    assert [len(each) for each in first.value.bins] == [2]
    assert [len(each) for each in second.value.bins] == [1, 1]
    assert torch.equal(second.value.bins[1][0].input_ids, row_of(3).input_ids)
    assert (first.place, second.place) == (2, 4)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answer_is_refused_before_it_is_a_batch(name):
    change, named = WRONG[name]
    found = load(lambda samples: [samples[0], change(samples[1])])
    assert len(found) == 2
    assert isinstance(found[1], str)
    assert found[1].startswith("sample 'row3': ")
    assert re.search(named, found[1]), found[1]


def test_answer_of_too_few_samples_is_refused():
    *_, error = load(lambda samples: samples[:1])
    assert error == "a source gave 1 samples of 2 rows"
