"""Pictures of many sizes in packs of at most so many tokens."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from tim.checks import whole


def longest_first(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Packs of lines whose lengths, in tokens, sum to at most `most`: the longest line first, each
    into the fullest pack that has room (longest-pack-first histogram packing, 2107.02027).

    Raises:
        ValueError: a line alone is longer than `most`.

    Example:
        >>> longest_first([3, 5, 2, 4], 8)
        [[1, 0], [3, 2]]
    """
    return _packed(lengths, most, np.argsort(-np.asarray(lengths), kind="stable"))


def mixed(lengths: Sequence[int], most: int, *, seed: int) -> list[list[int]]:
    """As `longest_first`, but the lines come in an order drawn by `seed`: a pack is then a random
    batch, of lines long and short, where equals would be among themselves.

    Raises:
        ValueError: a line alone is longer than `most`.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    return _packed(lengths, most, order.numpy())


def _packed(lengths: Sequence[int], most: int, order: np.ndarray) -> list[list[int]]:
    """Each line, in this order, into the fullest pack that has room."""
    most = whole("most", most, 1)
    packs: list[list[int]] = []
    with_room = defaultdict(list)  # packs by the tokens that they have left
    rooms: list[int] = []  # its keys in order
    for line in order.tolist():
        length = whole("lengths", lengths[line], 1)
        if length > most:
            raise ValueError(f"line {line} has {length} tokens, more than a pack's {most}")
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            pack = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, pack = most, []
            packs.append(pack)
        pack.append(line)
        if not with_room[room - length]:
            insort(rooms, room - length)
        with_room[room - length].append(pack)
    return packs
