"""What of an image the network sees."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ctsr.infer.windows import MARGIN, occupied_box


@given(
    rows=st.tuples(st.integers(0, 90), st.integers(1, 60)),
    columns=st.tuples(st.integers(0, 70), st.integers(1, 40)),
    stride=st.sampled_from([1, 4, 16]),
)
def test_the_box_holds_the_patient_and_no_more_air_than_the_margin(rows, columns, stride):
    y = np.full((3, 150, 110), -1000, np.int16)
    body = (slice(rows[0], sum(rows)), slice(columns[0], sum(columns)))
    y[(1, *body)] = 40
    for side, inner, size in zip(occupied_box(y, stride), body, y.shape[1:], strict=True):
        assert side.start % stride == 0
        assert side.stop % stride == 0 or side.stop == size
        assert max(0, inner.start - MARGIN - stride) <= side.start <= max(0, inner.start - MARGIN)
        assert min(size, inner.stop + MARGIN) <= side.stop <= min(size, inner.stop + MARGIN + stride)


def test_air_alone_is_taken_whole():
    assert occupied_box(np.full((2, 30, 40), -1000, np.int16), 16) == (slice(0, 30), slice(0, 40))
