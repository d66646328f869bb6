"""The extension has no attention: its tangent is Triton's, like every tangent."""

from ..dispatch.extension import tangents_in_triton

jvp = tangents_in_triton("attention")
