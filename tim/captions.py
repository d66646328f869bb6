"""What is done to a caption or a prompt before it is tokenised."""


def escaped(text: str) -> str:
    """`text` as the released text network was trained on it: Python's unicode-escape.

    Printable ASCII without backslashes stays as it is; "é" becomes "\\xe9", a line break "\\n", one
    backslash two.

    Example::

        escaped("café")  # 'caf\\\\xe9', eight characters
    """
    return text.encode("unicode_escape").decode("ascii")
