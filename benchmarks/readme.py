"""Put the tables in ``benchmarks/results`` between their markers in README.md and the pages in ``docs``."""

from __future__ import annotations

import re
from pathlib import Path

from tl_sparsify._internal.files import write_text

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    def table(match: re.Match[str]) -> str:
        return match[1] + (ROOT / "benchmarks" / "results" / f"{match[2]}.md").read_text() + match[3]

    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        write_text(page, TABLE.sub(table, page.read_text()))


if __name__ == "__main__":
    main()
