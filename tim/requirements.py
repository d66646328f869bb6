"""What `tim` needs beside torch, which `pip install tim-kernels` alone does not bring."""

from importlib.util import find_spec


def require(*packages: str, extra: str = "tim") -> None:
    """Raises:
    ImportError: one of them is not installed; the message says what brings it.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f'tim needs {", ".join(missing)}: pip install "tim-kernels[{extra}]"')
