"""Loop nests of global pooling over channels_last maps: GROUP registers of channels go through all pixels together."""

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
    splat,
    store,
    store_masked,
    unroll,
    with_phase,
)
from .number import jitable
from .reduction import arithmetic
from .sums import cascade

GROUP = 4


def _whole_image(A, real, lanes, bounded):
    """(start, stop, args) -> the states of GROUP registers of channels, of pixels start .. stop - 1."""
    L, begin, step, one_combine = lanes, A.begin, A.step, A.combine

    @jitable
    def empty():
        zero, origin = splat(real(0), L), splat(int32(0), L)
        return repeat(begin(zero, origin, zero, zero), GROUP)

    @jitable
    def combined(states, i, others):
        return with_phase(states, i, one_combine(phase(states, i), phase(others, i)))

    @jitable
    def combine(states, others):
        return unroll(combined, GROUP, states, others)

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
        states = empty()
        for pixel in range(start, stop):
            if dense:
                at = image + pixel * stride_w
            else:
                line = pixel // W
                at = image + line // H * stride_d + line % H * stride_h + pixel % W * stride_w
            states = unroll(stepped, GROUP, states, (x, at, channel, C, splat(int32(pixel), L), fill, p))
        return states

    return cascade(block, combine, empty, 1)[0]


@specialised
def forward(kind, dtype, saved, saves, lanes):
    """Jobs: (image, GROUP registers of channels).  Arguments: x, y, saved; C, D, H, W; x's strides of N, D, H and W; whether pixels
    follow each other; the seed's halves; the parameters."""
    A, P, L, real = arithmetic(kind), len(kind.parameters), lanes, number(dtype)
    neutral, finish = A.neutral, A.finish
    inside_image, bounded_image = _whole_image(A, real, lanes, False), _whole_image(A, real, lanes, True)

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
        blocks = (C + GROUP * L - 1) // (GROUP * L)
        for job in range(start, stop):
            n, channel = job // blocks, job % blocks * GROUP * L
            image = x, n * stride_n, dense, H, W, stride_d, stride_h, stride_w, channel, C, fill, p
            if channel + GROUP * L <= C:
                states = inside_image(0, D * H * W, image)
            else:
                states = bounded_image(0, D * H * W, image)
            unroll(put, GROUP, states, (y, kept, n * C, channel, C, count, p))

    return kernel


@specialised
def backward(kind, dtype, saved, lanes):
    """Jobs: (image, row).  Arguments: gx, gy, saved, x, y; C, D, H, W; x's strides of N, D, H and W; the parameters.  gx is dense."""
    A, P, L, real, residue = arithmetic(kind), len(kind.parameters), lanes, number(dtype), number(saved)
    share, reads_values, reads_saved = A.share, A.reads_values, A.reads_saved

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
            # Channels outside, pixels inside: what an output gives is in registers along a row.
            for c in range(0, C, L):
                whole, mask, out = c + L <= C, between(c, 1, 0, C, L), n * C + c
                g = fetch(gy, out, whole, mask, zero)
                v = fetch(y, out, whole, mask, zero) if reads_values else zero
                s = fetch(kept, out, whole, mask, nothing) if reads_saved else nothing
                for w in range(W):
                    source, target = row + w * stride_w + c, (job * W + w) * C + c
                    tap = splat(residue(r * W + w), L)
                    here = fetch(x, source, whole, mask, zero) if reads_values else zero
                    given = share(g, here, v, s, tap, count, count, p)
                    if whole:
                        store(gx, target, given)
                    else:
                        store_masked(gx, target, given, mask)

    return kernel
