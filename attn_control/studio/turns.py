"""Which of a page's questions was its last: a late answer to an earlier one is thrown away."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

# In the browser: the number of a question is the last of its values.
ASK = """(...values) => {
  window.acTurn = (window.acTurn || 0) + 1;
  values[values.length - 1] = window.acTurn;
  return values;
}"""
_PAGES = 1_000


class Turns:
    """A page counts its questions, which several threads answer in any order."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, owner: str, turn: Any) -> bool:
        """Take note of a question; False where a later one of the same page came before it."""
        if isinstance(turn, bool) or not isinstance(turn, (int, float)):
            return False
        with self._lock:
            last = self._last.get(owner, turn)
            self._last[owner] = max(last, turn)
            self._last.move_to_end(owner)
            while len(self._last) > _PAGES:
                self._last.popitem(last=False)
            return turn >= last

    def holds(self, owner: str, turn: Any) -> bool:
        """Whether it is still the page's last."""
        with self._lock:
            return self._last.get(owner) == turn

    def leave(self, owner: str) -> None:
        """Forget a page that is gone."""
        with self._lock:
            self._last.pop(owner, None)
