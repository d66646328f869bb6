import torch
from torch import Tensor

from ..checks import accumulation_dtype
from ..coefficients import weighted_sum


def transition_inputs(
    x: Tensor,
    z: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    d_alpha: Tensor | None = None,
    d_sigma: Tensor | None = None,
    alpha_pm: Tensor | None = None,
    sigma_pm: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """α x + σ z; α' x + σ' z and the two α± x + σ± z of the trailing samples."""
    dtype = accumulation_dtype(x, z)

    def mix(a: Tensor, b: Tensor) -> Tensor:
        last = x.shape[0] - a.shape[0]
        return weighted_sum((a, b), (x[last:], z[last:]), dtype).to(x.dtype)

    v_t = None if d_alpha is None else mix(d_alpha, d_sigma)
    x_pm = None
    if alpha_pm is not None:
        sides = zip(alpha_pm.chunk(2), sigma_pm.chunk(2), strict=True)
        x_pm = torch.cat([mix(*side) for side in sides])
    return mix(alpha, sigma), v_t, x_pm
