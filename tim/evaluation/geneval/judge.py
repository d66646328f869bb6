"""Whether a picture shows what its prompt asks for (arXiv 2310.11513, section 3)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tim.checks import whole
from tim.evaluation.geneval.objects import CLASSES, COLOURS, Detection, Metadata

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # scores below or at it are no objects
MOST = 16  # objects of a class
NEAR = 0.1  # of both sizes: an offset that is no relation
RELATIONS = ("left of", "right of", "above", "below")
SETTINGS = {
    "threshold": THRESHOLD, "counting_threshold": COUNTING_THRESHOLD, "max_objects": MOST,
    "position_threshold": NEAR,
}  # fmt: skip


class Judgement(NamedTuple):
    correct: bool
    reason: str  # a line for each rule that failed
    details: dict[str, list[list[float]]]  # {class: [[x1, y1, x2, y2, score], …]}, best first


def check(metadata: Metadata) -> None:
    """Raises:
    ValueError, KeyError, TypeError: a rule of the prompt is none that can be judged.
    """
    for place, wanted in enumerate(metadata["include"]):
        whole(f"the count of {wanted['class']}", wanted["count"], 1)
        if wanted.get("color", COLOURS[0]) not in COLOURS:
            raise ValueError(f"color must be of {', '.join(COLOURS)}, got {wanted['color']!r}")
        if "position" in wanted:
            relation, index = wanted["position"]
            if relation not in RELATIONS or not 0 <= whole("its target", index) < place:
                raise ValueError(
                    f"position must be one of {', '.join(RELATIONS)} and the number of an earlier "
                    f"include, got {wanted['position']!r}"
                )
    for unwanted in metadata.get("exclude", []):
        whole(f"the count of {unwanted['class']}", unwanted["count"], 1)


def judge(
    metadata: Metadata,
    detections: Iterable[Detection],
    colours: Callable[[Sequence[Detection], str], Sequence[str]],
) -> Judgement:
    """Judge a picture by the objects in it, in any order.

    Args:
        metadata: of the prompt, with "tag", "include" and maybe "exclude".
        colours: the objects and their class → a colour each.

    Raises:
        ValueError: there are more or fewer colours than objects.
        FloatingPointError: a box or a score is not finite.
    """
    found = objects(metadata["tag"], detections)
    failures: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in metadata["include"]:
        taken = found.get(wanted["class"], [])[: wanted["count"]]
        failure = _failure(wanted, taken, matched, colours)
        failures += [failure] if failure else []
        matched.append(None if failure else taken)
    for unwanted in metadata.get("exclude", []):
        name, count = unwanted["class"], unwanted["count"]
        if (there := len(found.get(name, []))) >= count:
            failures.append(f"expected {name}<{count}, found {there}")
    details = {
        name: [[float(x) for x in (*_box(each), np.float32(each.score))] for each in found[name]]
        for name in sorted(found, key=_place)
    }
    return Judgement(not failures, "\n".join(failures), details)


def objects(tag: str, detections: Iterable[Detection]) -> dict[str, list[Detection]]:
    """Those that count, best first, by class."""
    least = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    found: dict[str, list[Detection]] = {}
    detections = list(detections)
    if not all(np.isfinite((*each.box, each.score)).all() for each in detections):
        raise FloatingPointError("the detector's boxes and scores are not finite")
    for detection in sorted(detections, key=lambda each: -each.score):
        of_class = found.setdefault(detection.name, [])
        if np.float32(detection.score) > least and len(of_class) < MOST:
            of_class.append(detection)
    return {name: of_class for name, of_class in found.items() if of_class}


def relations(a: Detection, b: Detection) -> list[str]:
    """Where `a` stands, seen from `b`: none, one or two of left of, right of, above, below."""
    corners = np.stack([_box(a), _box(b)]).reshape(2, 2, 2)  # object, corner, axis
    centres, sizes = corners.mean(1), abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    gap = np.maximum(abs(offset) - np.float32(NEAR) * sizes.sum(0), 0) * np.sign(offset)
    if (abs(gap) < 1e-3).all():
        return []
    x, y = gap / np.linalg.norm(offset)
    holds = x < -0.5, x > 0.5, y < -0.5, y > 0.5
    return [name for name, is_so in zip(RELATIONS, holds, strict=True) if is_so]


def _failure(
    wanted: dict[str, Any],
    taken: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colours: Callable[[Sequence[Detection], str], Sequence[str]],
) -> str | None:
    name, count = wanted["class"], wanted["count"]
    if len(taken) < count:
        return f"expected {name}>={count}, found {len(taken)}"
    if (colour := wanted.get("color")) is not None:
        seen = list(colours(taken, name))
        if len(seen) != len(taken):
            raise ValueError(f"colours must be one for each of {len(taken)} objects, got {seen}")
        if seen.count(colour) < count:
            others = ", ".join(f"{seen.count(each)} {each}" for each in COLOURS if each in seen)
            return (
                f"expected {colour} {name}>={count}, found {seen.count(colour)} {colour}; "
                f"and {others}"
            )
    if "position" not in wanted:
        return None
    relation, index = wanted["position"]
    if matched[index] is None:
        return f"no target for {name} to be {relation}"
    for each in taken:
        for target in matched[index]:
            if relation not in (there := relations(each, target)):
                return f"expected {name} {relation} target, found {' and '.join(there)} target"
    return None


def _box(detection: Detection) -> np.ndarray:
    return np.asarray(detection.box, dtype=np.float32)


def _place(name: str) -> tuple[int, str]:
    return (CLASSES.index(name) if name in CLASSES else len(CLASSES), name)
