"""From in-window offsets to torch's flat indices (``return_indices=True``): position in the input plane, int64."""

from numba import int64

from ..compile import specialised
from ..simd import pointer


@specialised
def flat(saved, channels_last):
    """Jobs: rows of outputs, (n, c, oh) or, in channels_last, (n, oh).

    Arguments: flat, saved, offsets (position of each tap relative to the window's first, int64); C, OH, OW, W; SH, PH, SW, PW; the
    number of taps.  An output that chose none (its tap is -1, saved as the largest unsigned number) gets -1.
    """

    def kernel(args, start, stop):
        found, kept, offsets = pointer(args, 0, int64), pointer(args, 1, saved), pointer(args, 2, int64)
        C, OH, OW, W, SH, PH, SW, PW = args[3], args[4], args[5], args[6], args[7], args[8], args[9], args[10]
        taps = args[11]
        inner = C if channels_last else 1
        for job in range(start, stop):
            origin = (job % OH * SH - PH) * W - PW
            for ow in range(OW):
                out = (job * OW + ow) * inner
                for c in range(inner):
                    tap = int64(kept[out + c])
                    found[out + c] = origin + ow * SW + offsets[tap] if 0 <= tap < taps else -1

    return kernel
