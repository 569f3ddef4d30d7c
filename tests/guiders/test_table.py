"""docs/guiders.md has a line for every tested defect, and no other."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "guiders.md"


def test_every_line_of_the_table_has_its_tests():
    lines = set(re.findall(r"^\| (B\d+) \|", TABLE.read_text(encoding="utf-8"), re.M))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    tested = {number.upper() for number in re.findall(r"def test_(b\d+)_", tests)}
    assert lines == tested == {f"B{n}" for n in range(1, 15)}
