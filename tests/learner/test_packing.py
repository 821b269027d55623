"""Packing: every sampled token once, with its own episode's advantage and the weight of the whole step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpo.episode import Group
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings
from matpo_learner.packing import READS_PER_TOKEN, pack_sft, pack_update

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "two_episodes.json").read_text())
SEEDS = st.integers(0, 10_000)


def _advantages(groups):
    return [np.array([0.25 + g + 10.0 * k for k in range(len(group.episodes))]) for g, group in enumerate(groups)]


def _settings(**changes):
    return LearnerSettings.model_validate({"group_size": 2, "groups_per_update": 4, "microbatch_tokens": 40} | changes)


def _all_ranks(groups, settings, world_size):
    plans = [
        pack_update(groups, _advantages(groups), settings, version=7, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    return [[batch for plan in plans for batch in plan[step]] for step in range(settings.num_minibatches)]


def _segments(batch):
    """Row positions of each segment's tokens."""
    return np.split(batch.segment_rows, np.cumsum(batch.segment_lengths)[:-1]) if len(batch.segment_lengths) else []


def _targets(batches):
    """Every trained token as (context, token, advantage, mu, weight, lag, role)."""
    rows = []
    for b in batches:
        paths = {rows[-1]: rows for segment in _segments(b) for rows in (segment[: n + 1] for n in range(len(segment)))}
        for i, position in enumerate(b.predict_from):
            context = tuple(b.token_ids[paths[position]].tolist())
            weight, role = round(float(b.weights[i]), 9), b.roles[b.role_ids[i]]
            rows.append(
                (context, int(b.target_ids[i]), float(b.advantages[i]), float(b.mu[i]), weight, int(b.lags[i]), role)
            )
    return Counter(rows)


def _loop(groups, denominator, constant_tokens=1024):
    """The same by a plain loop over groups, episodes, segments and tokens."""
    total = sum(e.num_sampled for g in groups for e in g.episodes)
    rows = []
    for group, of_group in zip(groups, _advantages(groups), strict=True):
        for episode, advantage in zip(group.episodes, of_group, strict=True):
            size = len(groups) * len(group.episodes)
            divisor = {"episode": size * episode.num_sampled, "token": total, "constant": size * constant_tokens}[
                denominator
            ]
            for s in episode.segments:
                for t in range(s.num_tokens):
                    if s.trainable and s.sampled[t]:
                        context, weight = tuple(s.token_ids[:t].tolist()), round(float(np.float32(1 / divisor)), 9)
                        lag = 7 - int(s.versions[t])
                        rows.append(
                            (
                                context,
                                int(s.token_ids[t]),
                                float(np.float32(advantage)),
                                float(s.logprobs[t]),
                                weight,
                                lag,
                                s.role,
                            )
                        )
    return Counter(rows)


@given(
    seed=SEEDS,
    denominator=st.sampled_from(["episode", "token", "constant"]),
    world_size=st.integers(1, 3),
    room=st.integers(1, 90),
    vocabulary=st.sampled_from([2, 64]),  # of two tokens: much is shared
    share=st.booleans(),
)
def test_packed_tokens_equal_a_plain_loop(random_groups, seed, denominator, world_size, room, vocabulary, share):
    groups = random_groups(seed, num_groups=3, group_size=2, vocabulary=vocabulary)
    settings = _settings(denominator=denominator, microbatch_tokens=room, share_prefixes=share)
    (step,) = _all_ranks(groups, settings, world_size)
    assert _targets(step) == _loop(groups, denominator)


@given(seed=SEEDS)
def test_each_sampled_token_of_each_segment_carries_exactly_its_episode_s_advantage(random_groups, seed):
    """Defect 1 of the official code: worker tokens were trained only where the planner had one at the same index."""
    groups = random_groups(seed, num_groups=1, group_size=2, max_workers=4)
    (step,) = _all_ranks(groups, _settings(), 1)
    found = Counter(float(a) for b in step for a in b.advantages)
    want = Counter(
        {a: e.num_sampled for a, e in zip(_advantages(groups)[0], groups[0].episodes, strict=True) if e.num_sampled}
    )
    assert found == want


def test_two_episodes_pack_to_the_weights_and_advantages_worked_by_hand(make_segment, make_episode):
    team = [
        make_segment(0, "planner", token_ids=[1, 2, 3, 4], sampled=[1, 2, 3]),
        make_segment(1, "worker", token_ids=[1, 5], sampled=[1]),
        make_segment(2, "worker", token_ids=[1, 6, 7], sampled=[1, 2]),
    ]
    alone = [make_segment(0, "planner", token_ids=[1, 8, 9], sampled=[1, 2])]
    group = Group(id="g", episodes=[make_episode("g", 0, team, 1.0), make_episode("g", 1, alone, 0.0)])
    ((row,),) = pack_update([group], [np.array(GOLDEN["advantages"])], _settings(), version=0)
    found = sorted(zip(row.target_ids.tolist(), row.weights.tolist(), row.advantages.tolist(), strict=True))
    tokens = zip([2, 3, 4, 5, 6, 7, 8, 9], GOLDEN["tokens"], strict=True)
    for (token, weight, advantage), (want_token, row_of) in zip(found, tokens, strict=True):
        assert token == want_token
        assert weight == pytest.approx(GOLDEN["weights"][row_of["episode"]], abs=1e-7)
        assert advantage == pytest.approx(GOLDEN["advantages"][row_of["episode"]], abs=1e-6)


def test_worker_token_without_a_planner_token_at_its_index_is_trained(make_segment, make_episode):
    planner = make_segment(0, "planner", token_ids=[1, 2, 3], sampled=[2])
    worker = make_segment(1, "worker", token_ids=[1, 4, 5, 6, 7, 8], sampled=[1, 4, 5])
    group = Group(id="g", episodes=[make_episode("g", 0, [planner, worker], 1.0)])
    (step,) = pack_update([group], [np.array([0.5])], _settings(), version=0)
    assert sorted(t for b in step for t in b.target_ids) == [3, 4, 7, 8]
    assert all((b.advantages == 0.5).all() for b in step)


@given(seed=SEEDS)
def test_frozen_segments_carry_no_trained_token_and_do_not_count(random_groups, make_episode, seed):
    groups = random_groups(seed, num_groups=2, group_size=2, max_workers=3)
    without = [
        Group(
            id=g.id,
            episodes=[
                make_episode(g.id, e.member, [s for s in e.segments if s.trainable], e.reward) for e in g.episodes
            ],
        )
        for g in groups
    ]
    settings = _settings()
    assert _targets(_all_ranks(groups, settings, 1)[0]) == _targets(_all_ranks(without, settings, 1)[0])


@given(seed=SEEDS, num_minibatches=st.integers(1, 4))
def test_minibatches_hold_whole_groups_with_all_their_roles(random_groups, seed, num_minibatches):
    """Defect 2 of the official code: steps were cut by row count, workers last."""
    groups = random_groups(seed, num_groups=5, group_size=2)
    settings = _settings(num_minibatches=num_minibatches, loss="decoupled_ppo")
    steps = _all_ranks(groups, settings, 2)
    bounds = np.linspace(0, 5, num_minibatches + 1).round().astype(int)
    advantages = _advantages(groups)
    for step, low, high in zip(steps, bounds[:-1], bounds[1:], strict=True):
        want = Counter()
        for g in range(low, high):
            for e, a in zip(groups[g].episodes, advantages[g], strict=True):
                for s in e.segments:
                    if s.trainable and s.num_sampled:
                        want[s.role, float(a)] += s.num_sampled
        assert (
            Counter((b.roles[r], float(a)) for b in step for r, a in zip(b.role_ids, b.advantages, strict=True)) == want
        )


@given(seed=SEEDS, world_size=st.integers(1, 4), room=st.integers(1, 60), vocabulary=st.sampled_from([2, 64]))
def test_rows_keep_their_limit_and_every_rank_has_the_same_number(random_groups, seed, world_size, room, vocabulary):
    groups = random_groups(seed, num_groups=2, group_size=2, vocabulary=vocabulary)
    settings = _settings(microbatch_tokens=room)
    plans = [
        pack_update(groups, _advantages(groups), settings, version=0, rank=r, world_size=world_size)[0]
        for r in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    for b in [b for plan in plans for b in plan if len(b.segment_lengths) > 1]:
        assert b.num_tokens <= room
        assert len(b.segment_rows) < (room + 1) * READS_PER_TOKEN * len(b.segment_lengths)


@given(seed=SEEDS)
def test_a_token_stands_once_in_a_row_if_and_only_if_all_before_it_is_shared(random_groups, seed):
    groups = random_groups(seed, num_groups=2, group_size=3, vocabulary=3)
    (shared,) = pack_update(groups, _advantages(groups), _settings(microbatch_tokens=10_000), version=0)
    apart = _settings(microbatch_tokens=10_000, share_prefixes=False)
    (plain,) = pack_update(groups, _advantages(groups), apart, version=0)
    assert len(shared) == len(plain) == 1
    contexts = {
        tuple(plain[0].token_ids[segment[: n + 1]].tolist())
        for segment in _segments(plain[0])
        for n in range(len(segment))
    }
    assert shared[0].num_tokens == len(contexts) < plain[0].num_tokens
    assert all((shared[0].position_ids[s] == np.arange(len(s))).all() for s in _segments(shared[0]))


def test_segments_of_a_group_that_share_a_prompt_are_put_into_one_row(make_segment, make_episode):
    groups = []
    for g in range(4):
        prompt = [g, *range(10, 40)]
        episodes = [
            make_episode(
                f"g{g}", k, [make_segment(0, "planner", token_ids=[*prompt, 50 + k, 60], sampled=[31, 32])], 1.0
            )
            for k in range(4)
        ]
        groups.append(Group(id=f"g{g}", episodes=episodes))
    (rows,) = pack_update(groups, _advantages(groups), _settings(microbatch_tokens=80, group_size=4), version=0)
    assert sum(b.num_tokens for b in rows) == 4 * (31 + 4)
    assert len(rows) == 2


def test_positions_restart_and_first_tokens_are_no_targets(make_segment, make_episode):
    planner = make_segment(0, "planner", token_ids=[5, 91, 7, 2], sampled=[2, 3])
    worker = make_segment(1, "worker", token_ids=[5, 44, 8], sampled=[2])
    group = Group(id="g", episodes=[make_episode("g", 0, [planner, worker], 1.0)])
    ((row,),) = pack_update([group], [np.array([1.0])], _settings(share_prefixes=False), version=3)
    assert row.token_ids.tolist() == [5, 91, 7, 5, 44]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.segment_lengths.tolist() == [3, 2]
    assert row.segment_rows.tolist() == [0, 1, 2, 3, 4]
    assert row.predict_from.tolist() == [1, 2, 4]
    assert row.target_ids.tolist() == [7, 2, 8]
    assert row.target_segments.tolist() == [0, 0, 1]
    assert row.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert row.lags.tolist() == [3, 3, 3]


@given(seed=SEEDS, room=st.integers(1, 90))
def test_every_target_knows_its_segment_and_a_segment_is_whole_in_one_row(random_groups, seed, room):
    groups = random_groups(seed, num_groups=2, group_size=2)
    (rows,) = _all_ranks(groups, _settings(microbatch_tokens=room), 2)
    found = []
    for row in rows:
        for number in np.unique(row.target_segments):
            positions = row.position_ids[row.predict_from[row.target_segments == number]]
            assert (np.diff(positions) > 0).all()  # of one segment, in order
            found.append(len(positions))
    want = [s.num_sampled for g in groups for e in g.episodes for s in e.segments if s.trainable and s.num_sampled]
    assert sorted(found) == sorted(want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_advantage_that_is_not_finite_is_refused(random_groups, bad):
    groups = random_groups(1, num_groups=1, group_size=2)
    with pytest.raises(ValueError, match=r"group g-0: advantages .* are not all finite"):
        pack_update(groups, [np.array([bad, 0.0])], _settings(), version=0)


def test_shared_tokens_stand_once_and_predict_what_each_segment_sampled(make_segment, make_episode):
    planner = make_segment(0, "planner", token_ids=[5, 91, 7, 2], sampled=[2, 3])
    worker = make_segment(1, "worker", token_ids=[5, 44, 8], sampled=[2])
    group = Group(id="g", episodes=[make_episode("g", 0, [planner, worker], 1.0)])
    ((row,),) = pack_update([group], [np.array([1.0])], _settings(), version=3)
    assert row.token_ids.tolist() == [5, 44, 91, 7]
    assert row.position_ids.tolist() == [0, 1, 1, 2]
    by_role = {row.roles[row.role_ids[i]]: int(row.target_ids[i]) for i in range(3)}
    assert by_role == {"planner": 2, "worker": 8}
    assert _targets([row]) == _targets(
        pack_update([group], [np.array([1.0])], _settings(share_prefixes=False), version=3)[0]
    )


def test_sampled_first_token_is_refused(make_segment, make_episode):
    episode = make_episode("g", 0, [make_segment(0, "planner", token_ids=[5, 6], sampled=[0, 1])], 1.0)
    with pytest.raises(EpisodeError, match="A segment begins with a prompt") as caught:
        pack_sft([episode], _settings())
    assert caught.value.reason == "first_token_sampled"


@given(seed=SEEDS)
def test_supervised_weights_of_a_step_sum_to_one(random_groups, seed):
    episodes = [e for g in random_groups(seed, num_groups=2, group_size=2) for e in g.episodes]
    rows = [b for r in range(2) for b in pack_sft(episodes, _settings(), rank=r, world_size=2)]
    total = sum(float(b.weights.sum()) for b in rows)
    assert total == pytest.approx(1.0 if sum(e.num_sampled for e in episodes) else 0.0, abs=1e-5)


def test_update_without_any_sampled_token_packs_to_empty_rows(make_segment, make_episode):
    group = Group(
        id="g", episodes=[make_episode("g", 0, [make_segment(0, "planner", token_ids=[5, 6], sampled=[])], 1.0)]
    )
    ((row,),) = pack_update([group], [np.array([1.0])], _settings(), version=0)
    assert (row.num_tokens, row.num_targets) == (0, 0)
