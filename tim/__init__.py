"""Transition Models (arXiv 2509.04394): model, any-step sampling, training, evaluation."""

from pkgutil import extend_path

from .requirements import require

__path__ = extend_path(__path__, __name__)  # the published modules, where they are installed too
require("diffusers", "omegaconf")
