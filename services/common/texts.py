"""Texts from outside, as they can be stored and shown."""

import re

# What no text of the database holds, or what would change how a list looks.
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def showable(text: str) -> str:
    return _UNSHOWABLE.sub("?", text)
