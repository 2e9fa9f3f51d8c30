"""Docstrings are written for ``help()``: double backticks, roles and simple tables. Here they become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):`([^`]+)`")
RULE = re.compile(r"^(=+)( +=+)+$")


def markdown(text: str) -> str:
    """A docstring with Markdown's tables, and roles as code."""
    return _tables(ROLE.sub(r"``\1``", text)).replace("\nExample:\n", "\nExamples:\n")


def _tables(text: str) -> str:
    made: list[str] = []
    starts: list[int] = []  # of the columns; empty outside of a table
    rows = 0
    for line in text.split("\n"):
        if RULE.match(line.strip()):
            rows += 1  # the rule above, the one below the header, the one at the end
            starts = [match.start() for match in re.finditer("=+", line)] if rows < 3 else []
            made.append("|---" * len(starts) + "|" if rows == 2 else "")
            rows %= 3
        elif starts:
            cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
            made.append("| " + " | ".join(cells) + " |")
        else:
            made.append(line)
    return "\n".join(made)


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
