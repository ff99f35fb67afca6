"""A window's geometry against torch's own shapes and against counting by hand."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fastpool.window import Window, output_size, window

AXES = 2


def each_axis(least, most):
    return st.tuples(*[st.integers(least, most)] * AXES)


asked_for = st.fixed_dictionaries(
    {
        "kernel_size": each_axis(1, 6),
        "stride": each_axis(1, 5),
        "padding": each_axis(0, 4),
        "dilation": each_axis(1, 3),
        "ceil_mode": st.booleans(),
    }
)
sizes = each_axis(1, 14)


@st.composite
def fitting(draw):
    """A window, and the size of an input that has an output."""
    kernel, spread = draw(each_axis(1, 6)), draw(each_axis(1, 3))
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, spread, strict=True)]
    padding = tuple(draw(st.integers(0, e // 2)) for e in extent)
    least = [max(1, e - 2 * p) for e, p in zip(extent, padding, strict=True)]
    size = tuple(draw(st.integers(n, max(n, 14))) for n in least)
    return Window(kernel, draw(each_axis(1, 5)), padding, spread, draw(st.booleans())), size


def starts(w, axis, size):
    """Where the windows along an axis start, by hand: each stride that leaves room for one, then ceil_mode's."""
    found, at = [], -w.padding[axis]
    while at + w.extent[axis] <= size + w.padding[axis]:
        found.append(at)
        at += w.stride[axis]
    # ceil_mode takes one more if it does not end the padded input exactly, and starts inside the input or left padding.
    ended = found[-1] + w.extent[axis] == size + w.padding[axis]
    return [*found, at] if w.ceil_mode and not ended and at < size else found


@given(asked_for, sizes)
@example({"kernel_size": (1, 3), "stride": (1, 1), "padding": (0, 2), "dilation": (1, 2), "ceil_mode": False}, (1, 1))
def test_output_size_is_torchs_or_both_refuse(asked, size):
    x = torch.zeros(1, 1, *size)
    try:
        expected = tuple(T.max_pool2d(x, **asked).shape[2:])
    except RuntimeError:
        expected = None
    try:
        found = output_size("max_pool2d", window("max_pool2d", **asked), *size)
    except RuntimeError:
        found = None
    assert found == expected


@given(fitting())
def test_output_size_counts_the_windows(case):
    w, size = case
    assert w.output_size(*size) == (len(starts(w, 0, size[0])), len(starts(w, 1, size[1])))
    assert w.extent == tuple(d * (k - 1) + 1 for k, d in zip(w.kernel_size, w.dilation, strict=True))
    assert w.taps == w.kernel_size[0] * w.kernel_size[1]


@given(fitting(), st.booleans())
def test_counts_of_the_taps_inside(case, include_pad):
    w, size = case
    for axis in range(AXES):
        margin = w.padding[axis] if include_pad else 0
        inside = range(-margin, size[axis] + margin)
        taps = [[start + k * w.dilation[axis] for k in range(w.kernel_size[axis])] for start in starts(w, axis, size[axis])]
        counts = w.counts(axis, size[axis], include_pad)
        assert counts.dtype == np.int64
        assert counts.tolist() == [sum(position in inside for position in row) for row in taps]


@given(fitting(), st.booleans())
def test_counts_are_what_torch_divides_by(case, include_pad):
    w, size = case
    assume(w.dilation == (1, 1))
    ones = torch.ones(1, *size, dtype=torch.float64)
    average = T.avg_pool2d(ones, w.kernel_size, w.stride, w.padding, w.ceil_mode, include_pad)[0].numpy()
    inside, divisor = (np.multiply.outer(w.counts(0, size[0], pad), w.counts(1, size[1], pad)) for pad in (False, include_pad))
    np.testing.assert_array_equal(average, inside / divisor)


def test_counts_of_a_huge_window_take_no_table_of_its_taps():
    # Torch pools 4 elements by a window of a million, padded by half: the time and memory are the input's, not the window's.
    w = Window((10**6 + 1, 1), (1, 1), (5 * 10**5, 0), (1, 1), False)
    tracemalloc.start()
    try:
        assert w.counts(0, 4, False).tolist() == [4, 4, 4, 4]
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@given(fitting())
def test_tap_table_by_hand(case):
    w, (height, width) = case
    flat, inside = w.tap_table(height, width)
    windows = list(itertools.product(starts(w, 0, height), starts(w, 1, width)))
    assert flat.shape == inside.shape == (w.taps, len(windows))
    assert (flat.dtype, inside.dtype) == (np.int64, np.bool_)
    kernel = itertools.product(*map(range, w.kernel_size))
    for tap, (kh, kw) in enumerate(kernel):
        for output, (top, left) in enumerate(windows):
            row, column = top + kh * w.dilation[0], left + kw * w.dilation[1]
            assert inside[tap, output] == (0 <= row < height and 0 <= column < width)
            if inside[tap, output]:
                assert flat[tap, output] == row * width + column


@given(fitting())
def test_tap_offsets_count_from_the_first_tap(case):
    w, (height, width) = case
    offsets, (flat, _) = w.tap_offsets(width), w.tap_table(height, width)
    assert offsets.dtype == np.int64
    np.testing.assert_array_equal(offsets[:, None] + flat[0], flat)


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
    w = window("max_pool2d", *form)
    assert w == BASE
    assert {type(i) for i in (*w.kernel_size, *w.stride, *w.padding, *w.dilation)} == {int}


@pytest.mark.parametrize("stride", [None, (), torch.Size([])], ids=repr)
def test_stride_defaults_to_kernel_size(stride):
    assert window("max_pool2d", (3, 2), stride, 0, 1, False).stride == (3, 2)
