import json
from pathlib import Path

import pytest
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


@pytest.fixture
def golden():
    return lambda name: Golden(GOLDEN / f"{name}.safetensors")


def pytest_generate_tests(metafunc):
    """`golden_<kind>` parametrises a test over every golden file of that kind."""
    for kind in ("model", "transport", "loss", "sample"):
        if f"golden_{kind}" in metafunc.fixturenames:
            paths = sorted(GOLDEN.glob(f"{kind}_*.safetensors"))
            assert paths, f"no golden files for {kind} in {GOLDEN}"
            metafunc.parametrize(
                f"golden_{kind}", [Golden(p) for p in paths], ids=[p.stem for p in paths]
            )


def relative_error(actual, expected) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN never passes a comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
