"""python -m tests.stress.table FILE...: put these results into docs/reliability.md, one row for each campaign."""

import json
import sys
from collections import Counter
from pathlib import Path

from .rows import COLUMNS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- stress -->", "<!-- /stress -->"


def main() -> None:
    sums: dict[str, Counter[str]] = {}
    for path in sys.argv[1:]:
        for row in json.loads(Path(path).read_text())["rows"]:
            sums.setdefault(row["campaign"], Counter()).update({name: row[name] for name in COLUMNS})
    lines = [
        f"| campaign | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(f'{sums[name][it]:,}' for it in COLUMNS)} |" for name in sums]
    before, found, rest = PAGE.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"table: {PAGE} has no {BEGIN} ... {END}")
    PAGE.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main()
