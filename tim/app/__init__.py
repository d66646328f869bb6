"""What people start: the command `tim` and the demo."""
