"""What the README says is what the repository holds."""

import json
import re
from pathlib import Path

from tim.evaluation.mnist import GUIDANCE, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


RESULTS = json.loads((ROOT / "docs/mnist/results.json").read_text())


def test_the_measurements_are_those_of_the_committed_file():
    for guidance in GUIDANCE:
        assert table(RESULTS, guidance) in README
    for name in ("classifier_accuracy", "frechet_distance_of_train_images"):
        value = RESULTS[name] * (100 if name == "classifier_accuracy" else 1)
        assert f"{value:.1f}" in README


def test_one_step_is_far_ahead_of_flow_matching_and_more_steps_are_no_worse():
    networks = RESULTS["networks"]
    assert len({network["trained_images"] for network in networks.values()}) == 1
    for guidance in map(str, GUIDANCE):
        tim, flow = (networks[n]["by_guidance"][guidance] for n in ("TiM", "flow matching"))
        assert tim["1"]["recognised"] > flow["1"]["recognised"] + 0.1
        assert tim["1"]["frechet_distance"] < flow["1"]["frechet_distance"] / 5
        counts = ["1", "2", "4", "8", "32"]
        for fewer, more in zip(counts, counts[1:], strict=False):
            errors = tim[fewer]["standard_error"], tim[more]["standard_error"]
            noise = 2 * sum(error**2 for error in errors) ** 0.5
            assert tim[more]["recognised"] >= tim[fewer]["recognised"] - noise


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
