"""Classes by their names: ImageNet's 1,000 by WordNet's words for them (imagenet.LICENSE)."""

import difflib
import json
from collections import defaultdict
from functools import cache
from pathlib import Path


@cache
def imagenet() -> tuple[tuple[str, ...], ...]:
    """The names of each of ImageNet's classes (ILSVRC 2012), the usual one first; by their ids."""
    synsets = json.loads(Path(__file__).with_name("imagenet.json").read_text(encoding="utf-8"))
    return tuple(tuple(synsets[synset]) for synset in sorted(synsets))


def class_id(what: str, num_classes: int) -> int:
    """The class that an id means, or of 1,000 classes, which are taken for ImageNet's, a name.

    Upper case, hyphens and underscores make no difference. A name of several classes means the one
    whose usual name it is.

    Raises:
        ValueError: there is no such class, or the name is of several.
    """
    if what.strip().removeprefix("-").isdecimal():
        number = int(what)
        if not 0 <= number < num_classes:
            raise ValueError(f"class {number} is none of this network's, 0 … {num_classes - 1}")
        return number
    if num_classes != len(imagenet()):
        raise ValueError(f"{what!r} is no class: this network has the ids 0 … {num_classes - 1}")
    found = _by_name().get(_plain(what), [])
    if len(found) > 1:
        found = [n for n in found if _plain(imagenet()[n][0]) == _plain(what)] or found
    if not found:
        raise ValueError(f"{what!r} is no class of ImageNet{_near(_plain(what))}")
    if len(found) > 1:
        ids = " or ".join(f"{n} ({', '.join(imagenet()[n])})" for n in found)
        raise ValueError(f"{what!r} are several classes: give the id, {ids}")
    return found[0]


@cache
def _by_name() -> dict[str, list[int]]:
    ids: dict[str, list[int]] = defaultdict(list)
    for number, names in enumerate(imagenet()):
        for name in names:
            if number not in ids[_plain(name)]:
                ids[_plain(name)].append(number)
    return dict(ids)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("-", " ").replace("_", " ").split())


def _near(name: str) -> str:
    """The classes that have it as a word of their names, or names that are spelt alike."""
    known = _by_name()
    near = [other for other in known if name in other.split()] if name else []
    near = near[:5] or difflib.get_close_matches(name, known, n=3)
    options = ", ".join(f"{other} ({known[other][0]})" for other in near)
    return f": did you mean {options}?" if near else ": its id, 0 … 999, will do as well"
