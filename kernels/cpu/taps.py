"""What the taps of a correlation read, as the nests' tables and the model of their cost need it."""

import numpy as np

from .geometry import stored_dtype


def stored(problem):
    """A correlation with its dtype as the nests know it."""
    return problem._replace(dtype=stored_dtype(problem.dtype))


def is_depthwise(problem):
    return problem.groups > 1 and problem.inputs == problem.outputs == 1


def is_flat(problem):
    """Whether one tap reads the maps as they are written: then rows need not be told apart."""
    axes, (*_, xd, xh, xw), (*_, yd, yh, yw) = problem.axes, problem.x_strides, problem.y_strides
    same = all(axis.step == 1 and axis.offsets == (0,) and axis.size == axis.outputs for axis in axes)
    _, height, width = (axis.size for axis in axes)
    return same and (xh, xd) == (xw * width, xw * width * height) and (yh, yd) == (yw * width, yw * width * height)


def regular(axis):
    """(the first tap's offset, from tap to tap) of an axis in order."""
    first, *others = axis.offsets or (0,)
    return first, others[0] - first if others else 1


def lie_side_by_side(axis):
    """Whether an axis's taps do."""
    return not axis.offsets or max(axis.offsets) - min(axis.offsets) == len(axis.offsets) - 1


def in_order(problem):
    """The same correlation with each axis's taps from the first to the last: a gradient by the input has them the other way round."""
    orders = [np.argsort(axis.offsets) for axis in problem.axes]
    taps = np.array(problem.weight_taps, np.int64).reshape([len(order) for order in orders])[np.ix_(*orders)]
    axes = (axis._replace(offsets=tuple(sorted(axis.offsets))) for axis in problem.axes)
    return problem._replace(axes=tuple(axes), weight_taps=tuple(taps.ravel().tolist()))


def end_of_x(problem):
    """Elements from a depthwise correlation's first to behind its last."""
    shape = problem.images, problem.groups, *(axis.size for axis in problem.axes)
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, problem.x_strides, strict=True))


def lines_of(depth, height, strides):
    """Where rows of x begin, -1: of zeros, as (output slab, plane, row), and how taps find theirs.

    A plane is what taps share that differ by whole steps: an offset along the depth, a remainder of the offset along the height.
    -> lines, planes, each tap pair's (plane, row) in order, rows a plane."""
    remainders = sorted({offset % height.step for offset in height.offsets})
    low = min((offset // height.step for offset in height.offsets), default=0)
    high = max((offset // height.step for offset in height.offsets), default=0)
    planes = [(offset, r) for offset in dict.fromkeys(depth.offsets) for r in remainders]
    rows = [((z, o % height.step), o // height.step - low) for z in depth.offsets for o in height.offsets]
    Q = height.outputs + high - low
    lines = np.empty((depth.outputs, len(planes), Q), np.int64)
    for i, (z, r) in enumerate(planes):
        d = np.arange(depth.outputs)[:, None] * depth.step + z
        h = (np.arange(Q) + low) * height.step + r
        inside = (d >= 0) & (d < depth.size) & (h >= 0) & (h < height.size)
        lines[:, i] = np.where(inside, d * strides[2] + h * strides[3], -1)
    return lines, planes, rows, Q


def inside_of(axes, x_strides):
    """depthwise.weights_of_planes' tables, of the taps inside and of the taps, and x's steps from output to output."""
    most = max(1, *(len(axis.offsets) for axis in axes))
    taps = np.zeros((3, most), np.int64)
    for i, (axis, stride) in enumerate(zip(axes, x_strides[2:], strict=True)):
        taps[i, : len(axis.offsets)] = np.array(axis.offsets, int) * stride
    steps = (axis.step * stride for axis, stride in zip(axes, x_strides[2:], strict=True))
    inside = np.concatenate([_spans(_is_inside(axis)) for axis in axes])
    return np.ascontiguousarray(inside, np.int64), taps, tuple(steps)


def _is_inside(axis):
    """[output, tap]: whether the tap lies in the map."""
    positions = np.arange(axis.outputs)[:, None] * axis.step + np.array(axis.offsets, int)
    return (positions >= 0) & (positions < axis.size)


def _spans(here):
    """(first, end) of what is true in each row, where it lies side by side; 0, 0 where nothing is."""
    first = here.argmax(1) if here.shape[1] else np.zeros(len(here), int)
    return np.stack([first, first + here.sum(1)], 1)


def rows_inside(depth, height):
    """[output slab, output row, (first, end)]: the rows of taps, of a kernel's depth and height, between which all lie that have one in
    the map."""
    (deep, tall), KH = (_spans(_is_inside(axis))[:, None] for axis in (depth, height)), len(height.offsets)
    deep, tall = np.broadcast_arrays(deep, tall.swapaxes(0, 1))
    first, end = deep[..., 0] * KH + tall[..., 0], (deep[..., 1] - 1) * KH + tall[..., 1]
    some = (deep[..., 1] > deep[..., 0]) & (tall[..., 1] > tall[..., 0])
    return np.where(some[..., None], np.stack([first, end], -1), 0)


def share_of_rows(problem, pieces):
    """The part of the rows of taps that a tile of so many output rows goes through: the same row of several maps, or rows that follow."""
    depth, height, _ = problem.axes
    inside, rows = rows_inside(depth, height), len(depth.offsets) * len(height.offsets)
    groups = np.arange(0, height.outputs, pieces if problem.images < pieces else 1)
    first, end = np.minimum.reduceat(inside[..., 0], groups, 1), np.maximum.reduceat(inside[..., 1], groups, 1)
    return float((end - first).mean()) / rows if rows else 1.0


def pixels_kept(width):
    """Of each tap of a row the outputs, first and end, that it does not take into the padding; () where there are none but those."""
    spans = _spans(_is_inside(width).T)
    return () if (spans == (0, width.outputs)).all() else tuple(spans.ravel().tolist())
