"""Weights as the convolution nests read them: for each block of output channels its biases, then (input channel, tap, output channel)."""

from numba import int64

from ..compile import specialised
from ..simd import gather_between, integers, number, pointer, splat, store


@specialised
def pack(dtype, lanes, cols, biased, scaled):
    """Jobs: (group, block of cols * lanes output channels).  Arguments: packed, weights, biases, scales; addresses of the taps' offsets;
    output channels and blocks a group, input channels a group, taps; the weights' steps from group to group, output to output and
    input to input channel.  ``scaled``: each output channel's weights are multiplied by its scale; biases are added as they are."""
    real, L, B = number(dtype), lanes, cols * lanes

    def kernel(args, start, stop):
        packed, w = pointer(args, 0, real), pointer(args, 1, dtype)
        biases, scales, taps = pointer(args, 2, dtype), pointer(args, 3, dtype), pointer(args, 4, int64)
        OC, blocks, IC, T, step_g, step_o, step_i = integers(args, 5, 7)
        zero = splat(real(0), L)
        for job in range(start, stop):
            g, block = job // blocks, job % blocks
            at = job * (IC * T + 1) * B
            for first in range(block * B, (block + 1) * B, L):
                to = at + first - block * B
                low, high = g * OC, g * OC + OC
                if biased:
                    store(packed, to, gather_between(biases, 0, low + first, 1, low, high, zero))
                else:
                    store(packed, to, zero)
                scale = gather_between(scales, 0, low + first, 1, low, high, zero) if scaled else zero
                for c in range(IC):
                    for t in range(T):
                        to += B
                        base = g * step_g + c * step_i + taps[t]
                        # Lane i is output channel first + i; of expanded weights all are one.
                        found = gather_between(w, base, first * step_o, step_o, 0, max(1, OC * step_o), zero)
                        store(packed, to, found * scale if scaled else found)

    return kernel
