"""The golden files of the published implementation, and how results are compared with them."""

import json
from pathlib import Path

from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One golden file: `meta` and its tensors by group ("input", "output", "state", …)."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def group(self, name: str) -> dict:
        prefix = f"{name}/"
        return {k.removeprefix(prefix): v for k, v in self._tensors.items() if k.startswith(prefix)}


def relative_error(actual, expected) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN never passes a comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
