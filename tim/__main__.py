"""`python -m tim`, the command `tim`."""

from tim.app.cli import app

app(prog_name="tim")
