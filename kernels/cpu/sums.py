"""Reductions of many elements: states combined across lanes, and sums in cascades.

DEPTH steps make a block, DEPTH blocks a larger one, and so on, so that of n elements one goes through LEVELS + 1 chains of 16 and one of
n / 65536 steps, and the error stays beside that of torch's cascade sum.
"""

from ..simd import exchange, load_each, store_each
from .number import jitable
from .reduction import bare, tupled

DEPTH, LEVELS = 16, 4


def cascade(block, combine, empty, unit, twice=False):
    """(start, stop, args) -> the state of elements start .. stop - 1, by ``block``, which does it for up to DEPTH * unit of them.
    ``empty(args)``: the state of none; ``combine(a, b, args)``: that of both.  ``twice``: ``block`` is compiled for that length too, and
    the last, of any length, may be of up to twice as many."""
    least = DEPTH * unit

    @jitable
    def known(start, stop, args):
        total, last = empty(args), start + max(0, (stop - start) // least - 1) * least
        for at in range(start, last, least):
            total = combine(total, block(at, at + least, args), args)
        return combine(total, block(last, stop, args), args)

    def larger(smaller, size):
        @jitable
        def blocks(start, stop, args):
            total = empty(args)
            for at in range(start, stop, size):
                total = combine(total, smaller(at, min(stop, at + size), args), args)
            return total

        return blocks

    reduce = known if twice else larger(block, least)
    for level in range(1, LEVELS):
        reduce = larger(reduce, least * DEPTH**level)
    return reduce


def transposed(combine, parts, lanes):
    """(arrays) -> state, whose lane i is all lanes of the i-th of ``lanes`` states combined; these lie one after the other in arrays.

    A tree over registers and lanes at once: lanes - 1 combinations for all, where each state by itself would take log2(lanes).
    """
    bare_of, tuple_of = bare(parts), tupled(parts)

    def halved(rest, distance):
        @jitable
        def more(states):
            for i in range(distance):
                low, high = exchange(load_each(states, i * lanes, lanes), load_each(states, (i + distance) * lanes, lanes), distance)
                store_each(states, i * lanes, tuple_of(combine(bare_of(low), bare_of(high))))
            return rest(states)

        return more

    reduce, distance = jitable(lambda states: bare_of(load_each(states, 0, lanes))), 1
    while distance < lanes:
        reduce, distance = halved(reduce, distance), 2 * distance
    return reduce
