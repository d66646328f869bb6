"""Transition Models (arXiv 2509.04394): model, any-step sampling, training, evaluation."""

from .requirements import require

require("diffusers", "omegaconf")
