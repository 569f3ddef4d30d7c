"""The table: shares, paired differences, and no certainty that the data does not give."""

from __future__ import annotations

import os

import pytest
from rich.console import Console

from attn_control.render import load_job
from attn_control.render.command import quickstart_job
from attn_control.render.summary import (
    footnote,
    memory_line,
    paired,
    percent,
    points,
    share_right,
    summarise,
    table,
    verdicts,
)


def rows(variant, pattern, seeds=2, seconds=1.0, kind="cuda"):
    """`pattern` is one character a picture, `+` right, `-` wrong, `?` not scored."""
    return [
        {
            "variant": variant,
            "prompt": f"p{index // seeds}",
            "seed": index % seeds,
            "score": None if mark == "?" else {"right": mark == "+"},
            "seconds": seconds,
            "peak_bytes": 10**9,
            "peak_kind": kind,
        }
        for index, mark in enumerate(pattern)
    ]


def test_shares_and_differences():
    plain = rows("plain", "+-" * 8)
    cfg = rows("cfg", "++" * 4 + "+-" * 4, seconds=2.0)
    first, second = summarise(plain + cfg, ["plain", "cfg", "absent"], ["plain"])
    assert (first.name, first.right.mean, first.seconds, first.against) == ("plain", 0.5, 1.0, {})
    assert (second.right.mean, second.seconds) == (0.75, 2.0)
    difference = second.against["plain"]
    assert (difference.mean, difference.n, difference.groups) == (0.25, 16, 8)
    assert 0 <= difference.low < 0.25 < difference.high <= 0.5


def test_all_alike_is_not_certainty():
    every = share_right(rows("v", "+" * 16))
    assert every.mean == 1 and every.high == 1 and 0.6 < every.low < 0.7
    never = share_right(rows("v", "-" * 16))
    assert never.mean == 0 and never.low == 0 and 0.3 < never.high < 0.4
    same = paired(rows("a", "+-" * 8), rows("b", "+-" * 8))
    assert same.mean == 0 and same.low < -0.2 and same.high > 0.2
    better = paired(rows("a", "+" * 16), rows("b", "-" * 16))
    assert better.mean == 1 and 0 < better.low < 0.6 and better.high == 1


def test_few_prompts_give_no_interval():
    found = share_right(rows("v", "+-+-+-+-", seeds=2))
    assert (found.mean, found.low, found.high) == (0.5, 0, 1)
    found = paired(rows("v", "++++"), rows("w", "----"))
    assert (found.mean, found.low, found.high) == (1, -1, 1)


def test_only_pictures_that_both_have_are_compared():
    found = paired(rows("a", "+" * 12), rows("b", "-" * 10))
    assert found.n == 10
    assert paired(rows("a", "??"), rows("b", "++")) is None
    assert share_right(rows("a", "??")) is None


@pytest.mark.parametrize(
    "ours,theirs,words",
    [
        ("+" * 24, "-" * 24, "a is right more often than b"),
        ("-" * 24, "+" * 24, "a is right less often than b"),
        ("+-" * 12, "-+" * 12, "1 of the differences could be chance"),
    ],
)
def test_verdicts_point_whichever_way_the_data_does(ours, theirs, words):
    told = verdicts(summarise(rows("a", ours) + rows("b", theirs), ["a", "b"], ["b"]))
    assert any(words in line for line in told) and len(told) == 1


def test_the_table_prints_names_as_text():
    data = rows("[red]plain[/red]", "+-" * 8) + rows("cfg [1]", "++" * 8)
    names = ["[red]plain[/red]", "cfg [1]"]
    console = Console(width=160, record=True, file=open(os.devnull, "w"))
    console.print(table(summarise(data, names, names[:1]), names[:1]))
    text = console.export_text()
    assert "[red]plain[/red]" in text and "vs [red]plain[/red]" in text
    assert "50 % [50, 50]" in text and "+50 [" in text and "1.00 GB" in text


def test_the_peak_of_a_process_is_told_once():
    mine = summarise(rows("a", "+-" * 8, kind="resident memory"), ["a"], [])
    assert memory_line(mine) == "Peak memory of the process: 1.00 GB."
    assert [column.header for column in table(mine, []).columns][-1] == "s each"
    assert memory_line(summarise(rows("a", "+-" * 8), ["a"], [])) is None


def test_unequal_counts_are_shown():
    data = rows("a", "+-" * 8) + rows("b", "+-" * 6)
    assert "pictures" in [column.header for column in table(summarise(data, "ab", []), []).columns]


def test_the_quickstart_fits_a_terminal_of_80_columns():
    job, _ = load_job(quickstart_job())
    names = list(job.variants)
    data = [row for name in names for row in rows(name, "+--" * 8, seeds=3, kind="process")]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(table(summarise(data, names, job.compare), job.compare))
    lines = console.export_text().rstrip().split("\n")
    assert len(lines) == 1 + len(names), lines


def test_texts():
    assert percent(None) == points(None) == "-"
    assert "n = 8 prompts x 2 seeds a variant, which is small" in footnote(rows("v", "+-" * 8))
    assert "too few for an interval" in footnote(rows("v", "+-"))
    assert "no scorer" in footnote(rows("v", "??"))
