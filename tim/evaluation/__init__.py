"""Evaluation of trained networks."""

from .scores import inception_score, precision_recall, spatial_features
from .statistics import frechet_distance

__all__ = ["frechet_distance", "inception_score", "precision_recall", "spatial_features"]
