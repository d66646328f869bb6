"""The extension has no attention: its tangent is Triton's, like every tangent."""

from ..extension import tangents_in_triton

jvp = tangents_in_triton("attention")
