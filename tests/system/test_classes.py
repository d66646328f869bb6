"""Classes by their names."""

import pytest

from tim.data.classes import class_id, imagenet


def test_imagenet_s_classes():
    """Known ids of ILSVRC 2012, at both ends and in between."""
    names = imagenet()
    assert len(names) == 1000 and all(names)
    known = {0: "tench", 207: "golden retriever", 388: "giant panda", 817: "sports car"}
    assert {number: names[number][0] for number in known} == known
    assert "toilet paper" in names[999] and "house finch" in names[12]


@pytest.mark.parametrize(
    "what, expected",
    [
        ("207", 207), (" 0 ", 0), ("golden retriever", 207), ("Golden_Retriever", 207),
        ("GOLDEN  RETRIEVER", 207), ("toilet paper", 999), ("man eating shark", 2),
        ("polecat", 358),  # and another name of the skunk
    ],
)  # fmt: skip
def test_ids_and_names(what, expected):
    assert class_id(what, 1000) == expected


def test_every_name_is_its_class_s_or_is_refused_with_both():
    for number, names in enumerate(imagenet()):
        for name in names:
            try:
                found = class_id(name, 1000)
            except ValueError as error:
                assert f"{number} (" in str(error)
            else:
                assert name.casefold() in (other.casefold() for other in imagenet()[found])
        if names[0] not in ("crane", "maillot", "Cardigan", "cardigan"):
            assert class_id(names[0], 1000) == number


@pytest.mark.parametrize(
    "what, count, said",
    [
        ("golden retreiver", 1000, r"no class of ImageNet: did you mean golden retriever \(207\)"),
        ("retriever", 1000, r"did you mean flat coated retriever \(205\), curly"),
        ("crane", 1000, r"give the id, 134 \(crane\) or 517 \(crane\)"),
        ("xyzzy plugh", 1000, "its id, 0 … 999, will do"),
        ("1000", 1000, "class 1000 is none of this network's, 0 … 999"),
        ("-1", 10, "class -1 is none of this network's, 0 … 9"),
        ("three", 10, "'three' is no class: this network has the ids 0 … 9"),
        ("", 1000, "'' is no class"),
    ],
)
def test_refusals(what, count, said):
    with pytest.raises(ValueError, match=said):
        class_id(what, count)
