"""A package only so that no other `tests` on the path is taken for this one."""
