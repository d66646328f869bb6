"""What people start: the command `tim` and the demo."""

from ..requirements import require

require("accelerate", "transformers", "typer")
