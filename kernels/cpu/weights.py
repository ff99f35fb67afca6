"""Weights as the convolution nests read them: for each block of output channels its biases, then chain by chain of input channels (row of
taps, input channel, tap of the row, output channel), so that rows of taps that lie in the padding can be left out at either end."""

from numba import int64

from ..compile import specialised
from ..simd import between, gather_between, integers, number, pointer, splat, store, store_masked
from .number import jitable


@specialised
def pack(dtype, lanes, block, biased, scaled):
    """Jobs: (group, block of so many output channels).  Arguments: packed, weights, biases, scales; addresses of the taps' offsets;
    output channels and blocks a group, input channels a group, taps, taps of a row, input channels of a chain; the weights' steps from
    group to group, output to output and input to input channel.  ``scaled``: each output channel's weights are multiplied by its scale;
    biases are added as they are."""
    real, L, B = number(dtype), lanes, block

    @jitable
    def put(packed, to, k, found):
        if k + L <= B:
            store(packed, to, found)
        else:
            store_masked(packed, to, found, between(k, 1, 0, B, L))

    def kernel(args, start, stop):
        packed, w = pointer(args, 0, real), pointer(args, 1, dtype)
        biases, scales, taps = pointer(args, 2, dtype), pointer(args, 3, dtype), pointer(args, 4, int64)
        OC, blocks, IC, T, along, together, step_g, step_o, step_i = integers(args, 5, 9)
        zero = splat(real(0), L)
        for job in range(start, stop):
            g, first = job // blocks, job % blocks * B
            low, high, begin = g * OC, g * OC + OC, job * (IC * T + 1) * B
            for k in range(0, B, L):
                to, channel = begin + k, first + k
                bias = gather_between(biases, 0, low + channel, 1, low, high, zero) if biased else zero
                put(packed, to, k, bias)
                scale = gather_between(scales, 0, low + channel, 1, low, high, zero) if scaled else zero
                for chain in range(0, IC, together):
                    for row in range(0, T, along):
                        for c in range(chain, min(IC, chain + together)):
                            for t in range(row, row + along):
                                to += B
                                base = g * step_g + c * step_i + taps[t]
                                # Lane i is output channel ``channel + i``; of expanded weights all are one.
                                found = gather_between(w, base, channel * step_o, step_o, 0, max(1, OC * step_o), zero)
                                put(packed, to, k, found * scale if scaled else found)

    return kernel
