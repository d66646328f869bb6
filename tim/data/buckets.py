"""Sizes of one area and several aspect ratios, and which of them a picture is of."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

Size = tuple[int, int]  # height and width, px


def of_area(side: int, unit: int) -> list[Size]:
    """All whose sides are multiples of `unit` and whose area is about side².

    Example:
        >>> of_area(32, 16)
        [(16, 64), (32, 32), (64, 16)]
    """
    short = range(unit, side + 1, unit)
    pairs = {(h, round(side**2 / h / unit) * unit) for h in short}
    return sorted(pairs | {(w, h) for h, w in pairs})


def nearest(picture: Size, known: Iterable[Size]) -> Size:
    """The one of the most similar aspect ratio."""
    ratio = math.log(picture[0] / picture[1])
    return min(known, key=lambda size: abs(ratio - math.log(size[0] / size[1])))


def filled(pictures: Sequence[Size], known: Iterable[Size], least: int) -> list[Size]:
    """Of the sizes `known` those that at least so many pictures are nearest to; the pictures of
    the rarest go to others first."""
    kept = list(known)
    while True:
        counts = Counter(nearest(picture, kept) for picture in pictures)
        kept = sorted(counts)
        rarest = min(kept, key=lambda size: counts[size])
        if counts[rarest] >= least or len(kept) == 1:
            return kept
        kept.remove(rarest)
