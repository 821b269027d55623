"""The prefix tree, against sets of prefixes written out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matpo_learner import prefixes

SEQUENCES = st.lists(st.lists(st.sampled_from([0, 1, 70_000]), min_size=1, max_size=8), max_size=12)


def _arrays(sequences):
    return [np.array(s, dtype=np.int32) for s in sequences]


def _num_prefixes(sequences):
    return len({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})


@given(SEQUENCES)
def test_two_positions_are_one_node_if_and_only_if_everything_up_to_them_is_equal(sequences):
    total, places = prefixes.places(prefixes.tree(_arrays(sequences)), [len(s) for s in sequences])
    node_of = {}
    for sequence, nodes in zip(sequences, places, strict=True):
        assert len(nodes) == len(sequence)
        for n, node in enumerate(nodes):
            assert node_of.setdefault(tuple(sequence[: n + 1]), int(node)) == node
    assert sorted(node_of.values()) == list(range(total))


@given(SEQUENCES)
def test_leaves_are_the_sequences_that_are_no_prefix_of_another_and_hold_every_node(sequences):
    tree, lengths = prefixes.tree(_arrays(sequences)), [len(s) for s in sequences]
    found = [tuple(sequences[i]) for i in prefixes.leaves(tree, lengths)]
    distinct = {tuple(s) for s in sequences}
    assert sorted(found) == sorted(s for s in distinct if not any(o != s and o[: len(s)] == s for o in distinct))
    assert _num_prefixes(found) == _num_prefixes(sequences)


@given(SEQUENCES, st.integers(0, 30))
def test_families_hold_every_sequence_once_within_the_limit_and_share_a_first_token(sequences, limit):
    found = prefixes.families(prefixes.tree(_arrays(sequences)), [len(s) for s in sequences], limit)
    assert sorted(i for family in found for i in family) == list(range(len(sequences)))
    for family in found:
        members = [sequences[i] for i in family]
        assert len({s[0] for s in members}) == 1
        assert len(members) == 1 or _num_prefixes(members) <= limit


@given(SEQUENCES)
def test_families_without_a_limit_are_all_sequences_with_one_first_token(sequences):
    found = prefixes.families(prefixes.tree(_arrays(sequences)), [len(s) for s in sequences], 10_000)
    assert len(found) == len({s[0] for s in sequences})


def test_family_that_is_too_large_is_cut_where_least_is_shared():
    sequences = [[1, 2, 3, 3], [1, 2, 3, 4], [1, 9, 8, 3], [1, 9, 8, 4]]
    found = prefixes.families(prefixes.tree(_arrays(sequences)), [4] * 4, 6)
    assert found == [[0, 1], [2, 3]]
