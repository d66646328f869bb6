"""Sweeps over random shapes by hypothesis; a machine without it leaves them out, and says so."""

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:  # a bare GPU machine

    class Strategies:
        """Of any name; nobody will draw from them."""

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    st = Strategies()

    def sweep(max_examples: int):
        def decorate(test):
            @pytest.mark.skip(reason="hypothesis is not installed")
            def left_out(self):
                raise AssertionError("skipped")

            left_out.__name__ = test.__name__
            return left_out

        return decorate

else:

    def sweep(max_examples: int):
        """Run a test, a method, on that many draws of its argument `data`."""

        def decorate(test):
            limits = settings(
                max_examples=max_examples,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=True,  # a failure is there again; on a GPU, what was compiled too
            )
            return limits(given(data=st.data())(test))

        return decorate
