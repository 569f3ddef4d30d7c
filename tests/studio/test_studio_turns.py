"""A late answer is thrown away: a page's last question is the one that is shown."""

from __future__ import annotations

import random
import threading
import time

from attn_control.studio.turns import Turns


def test_the_last_question_is_answered_whatever_the_order_of_the_answers():
    """Fifty questions at once, each as long as chance has it; what is shown last is the last."""
    turns, shown, rng = Turns(), [], random.Random(0)
    delays = [rng.random() * 0.1 for _ in range(50)]

    def answer(number):
        if turns.ask("page", number):
            time.sleep(delays[number])
            if turns.holds("page", number):
                shown.append(number)

    threads = [threading.Thread(target=answer, args=[number]) for number in range(50)]
    for thread in rng.sample(threads, len(threads)):
        thread.start()
    for thread in threads:
        thread.join()
    assert shown and shown[-1] == 49 and shown == sorted(shown)


def test_pages_do_not_know_of_each_other_and_a_wrong_number_is_no_question():
    turns = Turns()
    assert turns.ask("a", 5) and turns.ask("b", 1) and not turns.ask("a", 4)
    assert turns.holds("a", 5) and turns.holds("b", 1) and not turns.holds("b", 5)
    assert not any(turns.ask("a", wrong) for wrong in (None, "9", True, [9]))
    turns.leave("a")
    assert not turns.holds("a", 5) and turns.ask("a", 1), "a page that is gone is forgotten"


def test_no_more_pages_are_kept_than_a_few():
    turns = Turns()
    for number in range(1_500):
        turns.ask(f"page {number}", 1)
    assert turns.holds("page 1499", 1) and not turns.holds("page 1", 1)
