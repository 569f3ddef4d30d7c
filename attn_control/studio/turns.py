"""What the browser does by itself, without asking the server.

A late answer is thrown away. Many questions about a page may be under way at the same time, and
their answers come in any order: the browser counts them, and shows that to its last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

# A question: its number is the last of its values, and comes back with the answer.
ASK = """(...values) => {
  window.acTurn = (window.acTurn || 0) + 1;
  values[values.length - 1] = window.acTurn;
  return values;
}"""
# An answer: its number and what it says. What is undefined leaves the page as it is.
SHOW = """(turn, ...values) =>
  turn === window.acTurn ? values : values.map(() => undefined)"""


def cleared(names: Sequence[str]) -> str:
    """Nothing is said at any of these places."""
    return f"() => {json.dumps([''] * len(names))}"


def told_at(names: Sequence[str]) -> str:
    """What is changed, by name, out of JSON; all other places stay."""
    return f"""(told) => {{
  const changes = JSON.parse(told || "{{}}");
  return {json.dumps(list(names))}.map((name) => changes[name]);
}}"""
