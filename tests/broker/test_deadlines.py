"""Leases end in the order of their last renewal."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from matpo_broker.deadlines import Deadlines


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["renew", "end"]), st.floats(0, 5)), max_size=40))
def test_the_same_as_a_plain_table_of_ends(events: list[tuple[str, str, float]]) -> None:
    deadlines, table, now_s = Deadlines(10.0, [], 0.0), {}, 0.0
    for lease, what, step_s in events:
        now_s += step_s
        if what == "renew":
            deadlines.renew(lease, now_s)
            table[lease] = now_s + 10.0
        else:
            deadlines.end(lease)
            table.pop(lease, None)
        assert set(deadlines.over(now_s + 7)) == {name for name, end_s in table.items() if end_s <= now_s + 7}
        assert deadlines.next_s == min(table.values(), default=inf)
        assert len(deadlines) == len(table)


def test_leases_of_an_earlier_process_begin_again() -> None:
    deadlines = Deadlines(10.0, ["a", "b"], 100.0)
    assert deadlines.over(109.9) == []
    assert deadlines.over(110.0) == ["a", "b"]
