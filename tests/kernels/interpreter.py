"""Triton's interpreter, mended for tests: it rounds as a GPU does, and starts a call sooner."""

import inspect

import numpy as np
import torch


def mend() -> None:
    """Both, in this process."""
    round_like_hardware()
    look_for_builtins_once()


def round_like_hardware() -> None:
    """Triton's interpreter truncates float32 to bfloat16 and FP8; a GPU rounds to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.float8e4nv):
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            values = values.clamp(-448, 448).to(torch.float8_e4m3fn)  # as cvt.rn.satfinite
            return values.view(torch.uint8).numpy()
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = rounded


def look_for_builtins_once() -> None:
    """It searches all of triton.language for builtins at every call of a device function, which is
    half of a kernel's time; where they are does not change."""
    import triton.language as tl
    from triton.runtime import interpreter

    is_builtin, names = tl.core.is_builtin, {}

    def patch_builtins(package, builder, scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):  # not patched yet
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins
