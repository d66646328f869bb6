"""Networks that are trained already. A checkout has them beside the code; to the wheel, which is
kept small, the package `tim-assets` adds them."""

from importlib.util import find_spec
from pathlib import Path

NAMES = "mnist", "emoji"


def folder(name: str) -> Path:
    """Of a network of NAMES, as `tim train` exports it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    roots = [Path(__file__).parents[1] / "assets"]
    if (spec := find_spec("tim_assets")) is not None:
        roots += map(Path, spec.submodule_search_locations or ())
    for root in roots:
        if (root / name / "config.json").is_file():
            return root / name
    raise FileNotFoundError(
        f"the trained network {name!r} is not installed: run in a checkout of tim-kernels, or "
        "install its folder tim/assets with pip"
    )
