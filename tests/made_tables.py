"""Tables of a page that a test makes: between two comments that name it and the test's file."""

from __future__ import annotations

import os
from pathlib import Path


def held(page: Path, name: str, by: str, table: str) -> None:
    """Fail where the page's table is another one; with UPDATE_README set, write it anew."""
    begin, end = f"<!-- {name}: made by {by} -->", f"<!-- /{name} -->"
    text = page.read_text(encoding="utf-8")
    assert begin in text and end in text
    before, rest = text.split(begin)
    old, after = rest.split(end)
    if os.environ.get("UPDATE_README"):
        page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    else:
        assert old == f"\n{table}\n", f"the table has drifted: UPDATE_README=1 pytest {by}"
