"""`python -m tim`, the command `tim`."""

import sys


def main() -> None:
    """The command; Ctrl-C ends it cleanly, also while it is loaded."""
    try:
        from tim.app.cli import app

        app(prog_name="tim")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
