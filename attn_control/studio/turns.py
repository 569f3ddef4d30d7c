"""A late answer is thrown away. Many questions about a page may be under way at the same time, and
their answers come in any order: the browser counts them, and shows that to its last one.
"""

# A question: its number is the last of its values, and comes back with the answer.
ASK = """(...values) => {
  window.acTurn = (window.acTurn || 0) + 1;
  values[values.length - 1] = window.acTurn;
  return values;
}"""
# An answer: its number, what it says, and what is shown now, as many.
SHOW = """(turn, ...values) => {
  const half = values.length / 2;
  return turn === window.acTurn ? values.slice(0, half) : values.slice(half);
}"""
# Somebody writes where answers go: those under way come too late.
WROTE = "() => { window.acTurn = (window.acTurn || 0) + 1; return []; }"
