"""Where the command was before `tim.app.cli`."""

from tim.app.cli import app

__all__ = ["app"]
