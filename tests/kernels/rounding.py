import numpy as np
import torch


def round_bfloat16_like_hardware() -> None:
    """Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = rounded
