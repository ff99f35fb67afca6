"""Loop nests of global pooling over channels_last maps: ``group`` registers of channels go through all pixels together."""

from numba import int32

from ..compile import specialised
from ..simd import (
    between,
    convert,
    integers,
    load,
    load_masked,
    number,
    numbers,
    phase,
    pointer,
    repeat,
    settle,
    splat,
    store,
    store_masked,
    store_past,
    unroll,
    with_phase,
)
from . import ahead, channels_last
from .number import jitable
from .reduction import arithmetic, can_carry, in_order, members
from .sums import cascade

AHEAD = 16
"""Pixels: a group may read a short piece of each, which the hardware does not foresee."""


def _is_short(kind, saves):
    """Whether a step is of one number."""
    return len(members(kind, None)) == 1 or (can_carry(kind) and not saves)


def asks(kind, saves, size):
    """Whether to ask for a map of so many bytes: not where it may lie in L2 and the steps are short.  us, 8x512x14x14 on two cores with
    and without: avg 33 and 24, max with what backward needs 39 and 44; of 26 MB either is as quick with as without."""
    return size > ahead.CACHED or not _is_short(kind, saves)


MANY_PIXELS = 1024


def group(kind, saves, lanes, channels, pixels):
    """How many registers of channels go through the pixels together.

    Of many pixels as much of each as there is, so that memory is read in its order: 8x256x56x56, max, GROUP registers 1.09 ms, 8 of them
    1.06, WIDE 0.89, as fast as a copy; of few, no more than what they carry leaves room for: 64x512x7x7 0.23, 0.25, 0.27.
    """
    return channels_last.group(kind, lanes, channels) if pixels >= MANY_PIXELS or _is_short(kind, saves) else channels_last.GROUP


def _whole_image(made, dtype, lanes, group, bounded, asking):
    """(start, stop, args) -> the states of ``group`` registers of channels, of pixels start .. stop - 1."""
    real = number(dtype)
    L, start_of, step, merge = lanes, made.start, made.more, made.merge
    ask = ahead.asking(dtype)

    @jitable
    def empty(args):
        return repeat(start_of(splat(real(0), L), splat(int32(0), L)), group)

    @jitable
    def merged(states, i, args):
        others, p = args
        return with_phase(states, i, merge(phase(states, i), phase(others, i), p))

    @jitable
    def combine(states, others, args):
        return unroll(merged, group, states, (others, args[-1]))

    @jitable
    def stepped(states, i, args):
        x, at, channel, C, tap, fill, p = args
        c = channel + i * L
        if bounded:
            inside = between(c, 1, 0, C, L) if c < C else between(0, 1, 0, 0, L)
            return with_phase(states, i, step(phase(states, i), load_masked(x, at + c, inside, fill), tap, p))
        return with_phase(states, i, step(phase(states, i), load(x, at + c, L), tap, p))

    @jitable
    def block(start, stop, args):
        x, image, dense, H, W, stride_d, stride_h, stride_w, channel, C, fill, p = args
        states = empty(args)
        for pixel in range(start, stop):
            if dense:
                at = image + pixel * stride_w
            else:
                line = pixel // W
                at = image + line // H * stride_d + line % H * stride_h + pixel % W * stride_w
            if asking:
                ask(x, at + channel + AHEAD * stride_w, group * L)
            states = unroll(stepped, group, states, (x, at, channel, C, splat(int32(pixel), L), fill, p))
        return states

    return cascade(block, combine, empty, 1)


@specialised
def forward(kind, dtype, saved, saves, lanes, group, asking):
    """Jobs: (image, ``group`` registers of channels).  Arguments: x, y, saved; C, D, H, W; x's strides of N, D, H and W; whether pixels
    follow each other; the seed's halves; the parameters.  ``asking``: for what is read ahead."""
    P, L, real, neutral, made = len(kind.parameters), lanes, number(dtype), arithmetic(kind).neutral, in_order(kind, dtype, lanes, saves)
    inside_image, bounded_image = (_whole_image(made, dtype, L, group, bounded, asking) for bounded in (False, True))
    finish = made.finish

    @jitable
    def put(states, i, args):
        y, kept, image, channel, C, count, p = args
        c = channel + i * L
        value, choice = finish(phase(states, i), count, count, p)
        if c + L <= C:
            store(y, image + c, value)
            if saves:
                store(kept, image + c, convert(choice, saved))
        elif c < C:
            mask = between(c, 1, 0, C, L)
            store_masked(y, image + c, value, mask)
            if saves:
                store_masked(kept, image + c, convert(choice, saved), mask)
        return states

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        C, D, H, W, stride_n, stride_d, stride_h, stride_w, dense = integers(args, 3, 9)
        p = numbers(args, 14, P, real, L)
        fill, count = neutral(splat(real(0), L)), splat(real(D * H * W), L)
        blocks = (C + group * L - 1) // (group * L)
        for job in range(start, stop):
            n, channel = job // blocks, job % blocks * group * L
            image = x, n * stride_n, dense, H, W, stride_d, stride_h, stride_w, channel, C, fill, p
            if channel + group * L <= C:
                states = inside_image(0, D * H * W, image)
            else:
                states = bounded_image(0, D * H * W, image)
            unroll(put, group, states, (y, kept, n * C, channel, C, count, p))

    return kernel


@specialised
def backward(kind, dtype, saved, lanes, past):
    """Jobs: (image, row).  Arguments: gx, gy, saved, x, y; C, D, H, W; x's strides of N, D, H and W; the parameters.  gx is dense.
    ``past``: gx, whose pixels are whole cache lines, is written past the caches."""
    A, P, L, real, residue = arithmetic(kind), len(kind.parameters), lanes, number(dtype), number(saved)
    share, reads_values, reads_saved, put = A.share, A.reads_values, A.reads_saved, store_past if past else store

    @jitable
    def fetch(array, at, whole, mask, fill):
        if whole:
            return load(array, at, L)
        return load_masked(array, at, mask, fill)

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y = pointer(args, 3, dtype), pointer(args, 4, dtype)
        C, D, H, W, stride_n, stride_d, stride_h, stride_w, _ = integers(args, 5, 9)
        p = numbers(args, 14, P, real, L)
        zero, nothing, count = splat(real(0), L), splat(residue(0), L), splat(real(D * H * W), L)
        for job in range(start, stop):
            n, r = job // (D * H), job % (D * H)
            row = n * stride_n + r // H * stride_d + r % H * stride_h
            for w in range(W):
                source, target, tap = row + w * stride_w, (job * W + w) * C, splat(residue(r * W + w), L)
                for c in range(0, C, L):
                    whole, mask, out = c + L <= C, between(c, 1, 0, C, L), n * C + c
                    g = fetch(gy, out, whole, mask, zero)
                    v = fetch(y, out, whole, mask, zero) if reads_values else zero
                    s = fetch(kept, out, whole, mask, nothing) if reads_saved else nothing
                    here = fetch(x, source + c, whole, mask, zero) if reads_values else zero
                    given = share(g, here, v, s, tap, count, count, p)
                    if whole:
                        put(gx, target + c, given)
                    else:
                        store_masked(gx, target + c, given, mask)
        if past:
            settle()

    return kernel
