"""python -m benchmarks.tables: puts the tables of committed results into README.md and docs/.

Between `<!-- table: benchmarks/results/NAME.md -->` and `<!-- end of table -->` stands the first table of that file,
word for word; a second word in the comment, `columns=1,2,4`, takes only these. A test sees to it that none is out of
date.

    --check     change nothing; exit code 1 and the names of the files if a table differs
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"(?P<begin><!-- table: (?P<source>\S+\.md)(?: columns=(?P<columns>[\d,]+))? -->\n)"
    r"(?P<table>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def pages(root: Path = ROOT) -> Iterator[Path]:
    """The files that may hold tables."""
    yield root / "README.md"
    yield from sorted((root / "docs").glob("*.md"))


def first_table(text: str, columns: Sequence[int] = ()) -> str:
    """The first table of a Markdown text, of all columns or of these (from 1).

    Raises:
        ValueError: there is no table, or no such column.
    """
    found = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if found is None:
        raise ValueError("expected a table, got none")
    lines = found[0].splitlines()
    if not columns:
        return "\n".join(lines) + "\n"
    cells = [line.strip("|").split("|") for line in lines]
    width = len(cells[0])
    if max(columns) > width or min(columns) < 1:
        raise ValueError(f"columns: expected numbers from 1 to {width}, got {list(columns)}")
    return "".join("|" + "|".join(row[column - 1] for column in columns) + "|\n" for row in cells)


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every marked table as its source has it.

    Raises:
        ValueError: a source that is not there or has no such table; it names the source.
    """

    def fill(block: re.Match[str]) -> str:
        columns = [int(column) for column in (block["columns"] or "").split(",") if column]
        try:
            table = first_table((root / block["source"]).read_text(encoding="utf-8"), columns)
        except (OSError, ValueError) as error:
            raise ValueError(f"{block['source']}: {error}") from error
        return block["begin"] + table + block["end"]

    return _BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Tables of results in the docs.")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    changed = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        new = filled(text, root)
        if new != text:
            changed.append(page.relative_to(root))
            if not given.check:
                from fastflow.atomic import atomic_write

                with atomic_write(page) as temporary:
                    temporary.write_text(new, encoding="utf-8")
    print("\n".join(map(str, changed)) or "all tables are those of benchmarks/results")
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
