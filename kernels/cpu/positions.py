"""From in-window offsets to torch's flat indices (``return_indices=True``): position in the input plane, int64."""

from numba import int64

from ..compile import specialised
from ..simd import integers, pointer


@specialised
def flat(saved, channels_last):
    """Jobs: rows of outputs, (n, c, od, oh) or, in channels_last, (n, od, oh).

    Arguments: flat, saved; spans of slices, rows and columns; C, OD, OH, OW, H, W; DD, DH, DW, KD, KH, KW.  An output that chose none
    (its tap is -1, saved as the largest unsigned number) gets -1.
    """

    def kernel(args, start, stop):
        found, kept = pointer(args, 0, int64), pointer(args, 1, saved)
        spans_d, spans_h, spans_w = pointer(args, 2, int64), pointer(args, 3, int64), pointer(args, 4, int64)
        C, OD, OH, OW, H, W, DD, DH, DW, KD, KH, KW = integers(args, 5, 12)
        inner, taps = C if channels_last else 1, KD * KH * KW
        for job in range(start, stop):
            d, h = spans_d[3 * (job // OH % OD)], spans_h[3 * (job % OH)]
            for ow in range(OW):
                out, w = (job * OW + ow) * inner, spans_w[3 * ow]
                for c in range(inner):
                    tap = int64(kept[out + c])
                    position = ((d + tap // KW // KH * DD) * H + h + tap // KW % KH * DH) * W + w + tap % KW * DW
                    found[out + c] = position if 0 <= tap < taps else -1

    return kernel
