"""Counter-based random numbers: the same draw on every device, in every layout, on any number of threads.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), on numbers of dtype uint32.
"""

from .number import like, multiply_wide, unit, where

ROUNDS = 10


def philox(c0, c1, c2, c3, k0, k1):
    """Four random words of the counter (c0, c1, c2, c3) under the key (k0, k1); all numbers of dtype uint32."""
    for _ in range(ROUNDS):
        high0, low0 = multiply_wide(c0, like(c0, 0xD2511F53))
        high1, low1 = multiply_wide(c2, like(c2, 0xCD9E8D57))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + like(k0, 0x9E3779B9)
        k1 = k1 + like(k1, 0xBB67AE85)
    return c0, c1, c2, c3


def uniform(position, plane, k0, k1, zero):
    """The draw of output ``position`` (row by row) of a plane, in [0, 1), as a number of zero's dtype.

    The flat output index is the pair (plane, position), both uint32; four neighbouring positions share a counter, a word each.
    """
    words = philox(position >> like(position, 2), like(position, 0), plane, like(plane, 0), k0, k1)
    word = position & like(position, 3)
    low = where(word == like(word, 0), words[0], words[1])
    high = where(word == like(word, 2), words[2], words[3])
    return unit(where(word < like(word, 2), low, high), zero)
