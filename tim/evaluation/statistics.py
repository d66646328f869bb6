"""Mean and covariance of features in one pass, and the Fréchet distance between two of them."""

import torch
from torch import Tensor

from tim.checks import check_finite


class Moments:
    """Mean and covariance of rows that come in batches, in float64 (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows (n, D) of any floating-point dtype."""
        rows = rows.double()
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._merge(len(rows), mean, centred.T @ centred)

    def update(self, other: "Moments") -> None:
        """The rows of another, too."""
        if other.count:
            self._merge(other.count, other._mean, other._scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        apart = mean - self._mean
        self._scatter = self._scatter + scatter
        if self.count:
            self._scatter += torch.outer(apart, apart) * (self.count * count / total)
            self._mean = self._mean + apart * (count / total)
        else:
            self._mean = mean
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased.

        Raises:
            ValueError: there are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two pictures or more, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ in float64 (Heusel et al., arXiv 1706.08500).

    With Σ = AᵀA the last trace is the sum of the singular values of A₁A₂ᵀ, also where Σ has not
    full rank; directions whose variance rounding made up are left out of A.

    Args:
        mu1, mu2: means (D,), tensors or arrays.
        sigma1, sigma2: covariances (D, D).

    Raises:
        ValueError: shapes do not fit, a value is not finite, or a matrix is no covariance.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
        4.0
    """
    (mu1, sigma1), (mu2, sigma2) = _gaussian("1", mu1, sigma1), _gaussian("2", mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"both must have as many features, got {len(mu1)} and {len(mu2)}")
    apart = (mu1 - mu2.to(mu1.device)).square().sum()
    cross = torch.linalg.svdvals(_root("1", sigma1) @ _root("2", sigma2).to(mu1.device).T).sum()
    return float(apart + sigma1.trace() + sigma2.trace().to(mu1.device) - 2 * cross)


def distance(one: Moments, other: Moments) -> float:
    """`frechet_distance` of what two sets of rows are like."""
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


def _gaussian(which: str, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    mu, sigma = (torch.as_tensor(each, dtype=torch.float64) for each in (mu, sigma))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise ValueError(
            f"mu{which} must be (D,) and sigma{which} (D, D), "
            f"got {tuple(mu.shape)} and {tuple(sigma.shape)}"
        )
    check_finite(f"mu{which}", mu)
    check_finite(f"sigma{which}", sigma)
    return mu, (sigma + sigma.T) / 2


def _root(which: str, sigma: Tensor) -> Tensor:
    """A (rank, D) of Σ = AᵀA."""
    variances, directions = torch.linalg.eigh(sigma)
    noise = len(sigma) * torch.finfo(sigma.dtype).eps * variances.abs().max()
    if variances[0] < -1e-4 * variances.abs().max():
        raise ValueError(f"sigma{which} has a negative variance, {float(variances[0]):.3g}")
    real = variances > noise
    return variances[real].sqrt()[:, None] * directions.T[real]
