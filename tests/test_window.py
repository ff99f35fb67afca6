"""A window's geometry against torch's own shapes and against counting by hand."""

import dataclasses
import functools
import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fastpool.window import Adaptive, Bins, Window, adaptive, output_size, window

RANKS = (1, 2, 3)


@st.composite
def each_axis(draw, rank, least, most):
    return tuple(draw(st.integers(least, most)) for _ in range(rank))


@st.composite
def asked_for(draw):
    """Arguments of max_pool, and the size of an input; whether they fit is not said."""
    rank = draw(st.sampled_from(RANKS))
    names = {"kernel_size": (1, 6), "stride": (1, 5), "padding": (0, 4), "dilation": (1, 3)}
    asked = {name: draw(each_axis(rank, *limits)) for name, limits in names.items()}
    return asked | {"ceil_mode": draw(st.booleans())}, draw(each_axis(rank, 1, 14 if rank < 3 else 9))


@st.composite
def fitting(draw, ranks=RANKS):
    """A window, and the size of an input that has an output."""
    rank = draw(st.sampled_from(ranks))
    most = 6 if rank < 3 else 3
    kernel, spread = draw(each_axis(rank, 1, most)), draw(each_axis(rank, 1, 3))
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, spread, strict=True)]
    padding = tuple(draw(st.integers(0, e // 2)) for e in extent)
    least = [max(1, e - 2 * p) for e, p in zip(extent, padding, strict=True)]
    size = tuple(draw(st.integers(n, max(n, 14 if rank < 3 else 8))) for n in least)
    return Window(kernel, draw(each_axis(rank, 1, 5)), padding, spread, draw(st.booleans())), size


def starts(w, axis, size):
    """Where the windows along an axis start, by hand: each stride that leaves room for one, then ceil_mode's."""
    found, at = [], -w.padding[axis]
    while at + w.extent[axis] <= size + w.padding[axis]:
        found.append(at)
        at += w.stride[axis]
    # ceil_mode takes one more if it does not end the padded input exactly, and starts inside the input or left padding.
    ended = found[-1] + w.extent[axis] == size + w.padding[axis]
    return [*found, at] if w.ceil_mode and not ended and at < size else found


@given(asked_for())
@example(({"kernel_size": (1, 3), "stride": (1, 1), "padding": (0, 2), "dilation": (1, 2), "ceil_mode": False}, (1, 1)))
def test_output_size_is_torchs_or_both_refuse(case):
    asked, size = case
    name = f"max_pool{len(size)}d"
    try:
        expected = tuple(getattr(T, name)(torch.zeros(1, 1, *size), **asked).shape[2:])
    except RuntimeError:
        expected = None
    try:
        found = output_size(name, window(name, len(size), **asked), *size)
    except RuntimeError:
        found = None
    assert found == expected


@given(fitting())
def test_output_size_counts_the_windows(case):
    w, size = case
    assert w.output_size(*size) == tuple(len(starts(w, axis, n)) for axis, n in enumerate(size))
    assert w.extent == tuple(d * (k - 1) + 1 for k, d in zip(w.kernel_size, w.dilation, strict=True))
    assert w.taps == math.prod(w.kernel_size)
    assert w.rank == len(size)


@given(fitting(), st.booleans())
def test_counts_of_the_taps_inside(case, include_pad):
    w, size = case
    for axis in range(w.rank):
        margin = w.padding[axis] if include_pad else 0
        inside = range(-margin, size[axis] + margin)
        taps = [[start + k * w.dilation[axis] for k in range(w.kernel_size[axis])] for start in starts(w, axis, size[axis])]
        counts = w.counts(axis, size[axis], include_pad)
        assert counts.dtype == np.int64
        assert counts.tolist() == [sum(position in inside for position in row) for row in taps]


@given(fitting())
def test_spans_hold_the_taps_inside(case):
    w, size = case
    for axis in range(w.rank):
        origins, firsts, ends = w.spans(axis, size[axis])
        assert {a.dtype for a in (origins, firsts, ends)} == {np.dtype(np.int64)}
        assert origins.tolist() == starts(w, axis, size[axis])
        for origin, first, end in zip(origins, firsts, ends, strict=True):
            assert 0 <= first <= end <= w.kernel_size[axis]
            inside = [k for k in range(w.kernel_size[axis]) if 0 <= origin + k * w.dilation[axis] < size[axis]]
            assert list(range(first, end)) == inside


@given(fitting(), st.booleans())
def test_counts_are_what_torch_divides_by(case, include_pad):
    w, size = case
    assume(set(w.dilation) == {1})
    assume(w.rank < 3 or all(k <= n for k, n in zip(w.kernel_size, size, strict=True)))  # in 3-d torch compares without the padding
    ones = torch.ones(1, 1, *size, dtype=torch.float64)
    pool = getattr(T, f"avg_pool{w.rank}d")
    average = pool(ones, w.kernel_size, w.stride, w.padding, w.ceil_mode, include_pad)[0, 0].numpy()
    inside, divisor = (
        functools.reduce(np.multiply.outer, [w.counts(axis, n, pad) for axis, n in enumerate(size)]) for pad in (False, include_pad)
    )
    np.testing.assert_array_equal(average, inside / divisor)


def test_counts_of_a_huge_window_take_no_table_of_its_taps():
    # Torch pools 4 elements by a window of a million, padded by half: the time and memory are the input's, not the window's.
    w = Window((10**6 + 1, 1), (1, 1), (5 * 10**5, 0), (1, 1), False)
    tracemalloc.start()
    try:
        assert w.counts(0, 4, False).tolist() == [4, 4, 4, 4]
        assert w.spans(0, 4)[1].tolist() == [500_000, 499_999, 499_998, 499_997]
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def by_hand(corners, steps, kernel, sizes):
    """(taps, outputs): flat positions, or None outside."""
    table = []
    for tap in itertools.product(*map(range, kernel)):
        row = []
        for corner in itertools.product(*corners):
            at = [c + k * d for c, k, d in zip(corner, tap, steps, strict=True)]
            inside = all(0 <= i < n for i, n in zip(at, sizes, strict=True))
            row.append(int(np.ravel_multi_index(at, sizes)) if inside else None)
        table.append(row)
    return table


@given(fitting())
def test_tap_table_by_hand(case):
    w, size = case
    flat, inside = w.tap_table(*size)
    expected = by_hand([starts(w, axis, n) for axis, n in enumerate(size)], w.dilation, w.kernel_size, size)
    assert (flat.dtype, inside.dtype) == (np.int64, np.bool_)
    assert inside.tolist() == [[at is not None for at in row] for row in expected]
    assert np.array_equal(flat[inside], [at for row in expected for at in row if at is not None])


@given(fitting((1, 2)))
def test_three_axes_are_the_same_window(case):
    """Missing axes come first, and every table is that of the window itself."""
    w, size = case
    full, more = w.on_three_axes, 3 - w.rank
    sizes = (*[1] * more, *size)
    assert full.output_size(*sizes) == (*[1] * more, *w.output_size(*size))
    for mine, theirs in zip(w.tap_table(*size), full.tap_table(*sizes), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for axis in range(more):
        assert [a.tolist() for a in full.spans(axis, 1)] == [[0], [0], [1]]


# Adaptive pooling


@given(st.integers(1, 40), st.integers(1, 40))
def test_bins_are_torchs(size, outputs):
    w = Bins((size,), (outputs,))
    (starts, firsts, ends), kernel = w.spans(0, size), w.kernel_size[0]
    owned = torch.autograd.functional.jacobian(lambda t: T.adaptive_avg_pool1d(t[None, None], outputs)[0, 0], torch.zeros(size)) != 0
    assert not firsts.any()
    assert [list(range(s, s + e)) for s, e in zip(starts, ends, strict=True)] == [row.nonzero().flatten().tolist() for row in owned]
    assert kernel == ends.max() == w.taps
    assert w.counts(0, size, True).tolist() == ends.tolist()
    assert w.output_size(size) == (outputs,)


def test_bins_tap_table_by_hand():
    w = Bins((5, 4), (3, 2))  # rows 0-1, 1-3, 3-4; columns 0-1, 2-3
    assert w.kernel_size == (3, 2)
    flat, inside = w.tap_table(5, 4)
    found = [flat[inside[:, output], output].tolist() for output in range(6)]
    assert found == [[0, 1, 4, 5], [2, 3, 6, 7], [4, 5, 8, 9, 12, 13], [6, 7, 10, 11, 14, 15], [12, 13, 16, 17], [14, 15, 18, 19]]
    np.testing.assert_array_equal(w.on_three_axes.tap_table(1, 5, 4)[0], flat)


def test_what_adaptive_pooling_resolves_to():
    assert Adaptive((1, 1)).resolve(7, 9) is None
    assert Adaptive((1,)).resolve(1) is None
    assert Adaptive((7, 3)).resolve(7, 9) == Window((1, 3), (1, 3), (0, 0), (1, 1), False)
    assert Adaptive((None, 3)).resolve(7, 9) == Window((1, 3), (1, 3), (0, 0), (1, 1), False)
    assert Adaptive((2, 3)).resolve(7, 9) == Bins((7, 9), (2, 3))
    assert not Bins((7, 9), (2, 3)).regular
    assert Adaptive((None, 3)).output_size(7, 9) == (7, 3)


@pytest.mark.parametrize("asked", [3, (3, 3), [3, 3], torch.Size([3, 3]), (np.int64(3), 3)], ids=repr)
def test_every_form_of_an_output_size_is_equal(asked):
    assert adaptive("adaptive_max_pool2d", 2, asked) == Adaptive((3, 3))
    assert adaptive("adaptive_max_pool2d", 2, None) == Adaptive((None, None))


BASE = Window((3, 3), (2, 2), (1, 1), (1, 1), False)
CHANGES = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "ceil_mode": True}


def test_equal_windows_are_one_key():
    same = Window((3, 3), (2, 2), (1, 1), (1, 1), False)
    assert BASE.extent == (3, 3)  # cached on the instance: must take no part in equality
    assert same == BASE
    assert hash(same) == hash(BASE)


@pytest.mark.parametrize("name", CHANGES)
def test_windows_that_differ_anywhere_are_other_keys(name):
    other = dataclasses.replace(BASE, **{name: CHANGES[name]})
    assert other != BASE
    assert len({BASE, other}) == 2


def test_a_window_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.stride = (1, 1)


FORMS = {
    "ints": (3, 2, 1, 1, False),
    "pairs": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "ones": ((3,), [2], (1,), [1], False),
    "numpy": (np.int64(3), np.int32(2), np.uint8(1), np.int64(1), False),
    "tensors": (torch.tensor(3), torch.tensor(2), torch.tensor(1), torch.tensor(1), False),
    "torch.Size": (torch.Size([3, 3]), torch.Size([2, 2]), torch.Size([1, 1]), torch.Size([1, 1]), False),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_the_same_window_is_equal(form):
    w = window("max_pool2d", 2, *form)
    assert w == BASE
    assert {type(i) for i in (*w.kernel_size, *w.stride, *w.padding, *w.dilation)} == {int}


@pytest.mark.parametrize("stride", [None, (), torch.Size([])], ids=repr)
def test_stride_defaults_to_kernel_size(stride):
    assert window("max_pool2d", 2, (3, 2), stride, 0, 1, False).stride == (3, 2)
