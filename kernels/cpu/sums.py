"""Reductions of many elements: states combined across lanes, and sums in cascades.

DEPTH steps make a block, DEPTH blocks a larger one, and so on, so that of n elements one goes through LEVELS + 1 chains of 16 and one of
n / 65536 steps, and the error stays beside that of torch's cascade sum.
"""

from ..simd import swap_lanes
from .number import jitable

DEPTH, LEVELS = 16, 4


def cascade(block, combine, empty, unit):
    """(start, stop, args) -> the state of elements start .. stop - 1, by ``block``, which does it for up to DEPTH * unit of them; and
    DEPTH * unit."""

    def larger(smaller, size):
        @jitable
        def blocks(start, stop, args):
            total = empty()
            for at in range(start, stop, size):
                total = combine(total, smaller(at, min(stop, at + size), args))
            return total

        return blocks

    size = unit
    for _ in range(LEVELS):
        size *= DEPTH
        block = larger(block, size)
    return block, DEPTH * unit


def across_lanes(combine, lanes):
    """state -> state, each lane of which is all lanes combined."""

    def extended(reduce, distance):
        @jitable
        def more(state):
            state = reduce(state)
            return combine(state, swap_lanes(state, distance))

        return more

    reduce, distance = jitable(lambda state: state), 1
    while distance < lanes:
        reduce, distance = extended(reduce, distance), 2 * distance
    return reduce
