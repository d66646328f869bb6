"""Scores of features: the Inception score; precision and recall; what a spatial feature is."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tim.checks import check_finite, whole

_ROWS, _COLUMNS = 1024, 8192  # of distances at once: 64 MiB in float64
_CHANNELS = 7  # of a spatial map


def spatial_features(maps: Tensor) -> Tensor:
    """What sFID (Nash et al., arXiv 2103.03841) compares: maps (N, C, h, w) → (N, h·w·7).

    The first seven channels in the order (h, w, c), that of ADM's stored statistics.

    Raises:
        ValueError: the maps are not (N, C, h, w) with seven channels or more.
    """
    if maps.ndim != 4 or maps.shape[1] < _CHANNELS:
        raise ValueError(f"maps must be (N, {_CHANNELS} or more, h, w), got {tuple(maps.shape)}")
    return maps[:, :_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """The mean over splits of exp(mean KL(p ‖ mean p)), in float64 (arXiv 1606.03498).

    Args:
        logits: (N, K); of ADM's network without the bias.
        splits: consecutive equal parts of the rows.

    Raises:
        ValueError: the rows make no whole splits, or a logit is not finite.
    """
    splits = whole("splits", splits, 1)
    if logits.ndim != 2 or not len(logits) or len(logits) % splits:
        raise ValueError(
            f"logits must be (N, K), N a multiple of splits = {splits}; got {tuple(logits.shape)}"
        )
    check_finite("logits", logits)
    return math.fsum(map(_score, logits.chunk(splits))) / splits


def _score(logits: Tensor) -> float:
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    return float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())


class PrecisionRecall(NamedTuple):
    """Of `precision_recall`."""

    precision: float
    recall: float
    realism: Tensor  # (samples,), how deep inside a reference ball: 1 is its edge


@torch.no_grad()
def precision_recall(reference: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    A row's ball reaches to the k-th nearest other row of its set, edge included. Precision is the
    share of samples within some reference ball, recall that of references within some sample
    ball. Distances are float64; near an edge they are taken again from the difference of the two
    rows, so equal distances are equal. Beside the features it takes less than 1 GiB.

    Returns:
        Both shares, and each sample's realism (equation 3 there): the largest radius / distance
        among the half of the reference balls that are smallest.

    Raises:
        ValueError: k or fewer rows, other widths, or a value is not finite.
    """
    k = whole("k", k, 1)
    for name, rows in (("reference", reference), ("samples", samples)):
        if rows.ndim != 2 or len(rows) <= k:
            raise ValueError(
                f"{name} must be (N, D) with more than k = {k} rows, got {tuple(rows.shape)}"
            )
        check_finite(name, rows)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"both must have as many features, got {reference.shape[1]} and {samples.shape[1]}"
        )
    of_reference, of_samples = squared_radii(reference, k), squared_radii(samples, k)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    nearest = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    small = torch.where(of_reference <= of_reference.median(), of_reference, 0)
    for rows, columns, distances, doubt in _blocks(reference, samples):
        a, b = reference[rows], samples[columns]
        edges = of_reference[rows, None], of_samples[None, columns]
        precise[columns] |= _within(distances, edges[0], doubt, a, b).any(0)
        recalled[rows] |= _within(distances, edges[1], doubt, a, b).any(1)
        depth = (small[rows, None] / distances.clamp_min(1e-300)).amax(0)
        nearest[columns] = torch.maximum(nearest[columns], depth)
    precision, recall = (share.double().mean().item() for share in (precise, recalled))
    return PrecisionRecall(precision, recall, nearest.sqrt())


def squared_radii(rows: Tensor, k: int = 3) -> Tensor:
    """Squared distances (N,), float64, of rows (N, D) to the k-th nearest other row."""
    radii = rows.new_empty(len(rows), dtype=torch.float64)
    values = indices = radii.new_empty(0)
    for block, columns, distances, _ in _blocks(rows, rows):
        places = torch.arange(columns.start, columns.stop, device=rows.device)
        places = places.expand_as(distances)
        if columns.start:
            distances = torch.cat([values, distances], 1)
            places = torch.cat([indices, places], 1)
        values, nearest = distances.topk(min(k + 1, distances.shape[1]), largest=False)
        indices = places.gather(1, nearest)
        if columns.stop == len(rows):
            radii[block] = _exact(rows[block, None], rows[indices]).amax(1)
    return radii


def _blocks(one: Tensor, other: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows of both, their squared distances, and how far off those may be."""
    centre = one.float().mean(0).double()  # distances stay, rounding shrinks
    is_quick = len(one) * len(other) < 10**8
    for i in tqdm(range(0, len(one), _ROWS), desc="distances", disable=is_quick):
        a = one[i : i + _ROWS].double() - centre
        for j in range(0, len(other), _COLUMNS):
            b = other[j : j + _COLUMNS].double() - centre
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            distances = torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)
            error = 4 * (one.shape[1] + 4) * torch.finfo(torch.float64).eps
            doubt = error * squares.max()
            yield slice(i, i + len(a)), slice(j, j + len(b)), distances, doubt


def _exact(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances of row to row (…, D), each a sum in the same order."""
    return (one.double() - other.double()).square().sum(-1)


def _within(distances: Tensor, edges: Tensor, doubt: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Which distances (n, m) reach to their edge at most; those in doubt are taken again."""
    inside = distances <= edges
    for pairs in ((distances - edges).abs() <= doubt).nonzero().split(_COLUMNS):
        i, j = pairs.T
        inside[i, j] = _exact(one[i], other[j]) <= edges.expand_as(distances)[i, j]
    return inside
