"""Laws of the data classes for records."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from atomtune.data.records import Example, learned_spans


@given(st.lists(st.integers(0, 2), max_size=30))
def test_learned_spans_cover_exactly_the_learned_tokens_once(marks):
    learn = (0, *marks)
    spans = learned_spans(Example(tuple(range(len(learn))), learn, ""))
    inside = [i for start, end in spans for i in range(start, end)]
    assert inside == [i for i, times in enumerate(learn) if times]
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))  # spans do not touch
