"""The five transports of TiM, one a file (arXiv 2509.04394, section 3 and appendix)."""

from typing import Any, Literal

from .base import Interpolant, StepCoefficients, TargetCoefficients, Transport
from .edm import EDM
from .ot_fm import OTFM
from .trigflow import TrigFlow
from .ve_sde import VESDE
from .vp_sde import VPSDE

__all__ = [
    "EDM",
    "Interpolant",
    "OTFM",
    "TRANSPORTS",
    "VESDE",
    "VPSDE",
    "StepCoefficients",
    "TargetCoefficients",
    "Transport",
    "TransportName",
    "TrigFlow",
    "make",
]

TransportName = Literal["OT_FM", "TrigFlow", "EDM", "VP_SDE", "VE_SDE"]
TRANSPORTS: dict[TransportName, type[Transport]] = {
    "OT_FM": OTFM,
    "TrigFlow": TrigFlow,
    "EDM": EDM,
    "VP_SDE": VPSDE,
    "VE_SDE": VESDE,
}


def make(name: TransportName, **params: Any) -> Transport:
    """The transport of a published name (OT_FM, TrigFlow, EDM, VP_SDE or VE_SDE).

    Raises:
        ValueError: an unknown name or parameter.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"no transport {name!r}; there are {', '.join(TRANSPORTS)}")
    try:
        return TRANSPORTS[name](**params)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
