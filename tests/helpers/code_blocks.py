"""Code blocks of a page."""

from __future__ import annotations

import re


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """Number of the first line, and content, of each fenced block in one of the languages."""
    fenced = re.compile(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in fenced.finditer(text)]
