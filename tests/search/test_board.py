"""Who goes on: kept to a time, asked of a sampler, in the order of the looks; on made-up losses, without a model."""

from dataclasses import replace

import numpy as np
import pytest

from welltuned.errors import InputError
from welltuned.search.arms import first_arms, question_of
from welltuned.search.board import Board, Rules
from welltuned.search.events import ArmEnded
from welltuned.search.forecast import SearchForecast, forecast, require_time
from welltuned.search.sampler import starting
from welltuned.search.state import State, Status

ROWS = 40


@pytest.fixture(scope="module")
def plan(prepared_for):
    return prepared_for(max_steps=100).plan


def board_of(plan, rules=None, over=("r=2,4,8",)):
    told = []
    arms = first_arms(plan, question_of(None, list(over)))
    return Board(plan, arms, [1] * ROWS, rules or Rules(rates=False), told.append), told


def losses(level, seed=0):
    """Rows that differ much among themselves, alike for all arms, and by the arm's level."""
    hard = np.random.default_rng(0).normal(0, 0.3, ROWS)
    return tuple(level + hard + np.random.default_rng(seed).normal(0, 0.01, ROWS))


def looked(board, levels):
    """Every arm is trained to where it is judged next, and judged there."""
    while due := [(arm, board.due(arm)) for arm in board.state.alive if board.due(arm) is not None]:
        for arm, share in due:
            step = board.goal(arm)
            board.state = board.state.with_arm(replace(arm, step=step, tokens=100 * step))
            board.looked(arm.number, share, losses(levels(board.arms[arm.number], share), arm.number), 7)


def test_arms_go_through_the_looks_together(plan):
    board, _ = board_of(plan, Rules(rates=False, grid=True))  # nothing is acted upon
    assert board.shares == (0.1, 0.2, 0.4, 1.0)
    for share, goal in zip(board.shares, (10, 20, 40, 100), strict=True):
        assert {board.goal(arm) for arm in board.state.alive} == {goal} and len(board.behind()) == 3
        looked(board, lambda arm, share: 1.0)
        assert not board.behind() and board.share_now == share
        assert board.judge(1.0) == ()
    assert board.state.ended and board.state.winner is not None and board.state.evaluated == 4 * 3 * 7


def by_rank(arm, share):
    """Near each other, so that nothing is dropped by the losses alone: r 8 is best."""
    return 1.3 - 0.2 * share - 0.0005 * arm.plan.value("r")


@pytest.mark.parametrize(
    ("seconds", "alive"),
    [
        (None, [3, 3, 3]),
        (10_000.0, [3, 3, 3]),
        (195.0, [3, 3, 1]),  # from 40 % on one run's rest, 60 s, is left; two would be 120
        (130.0, [3, 1, 1]),  # not even to 40 %, all three
        (1.0, [3, 1, 1]),  # an arm is never given up for want of time
    ],
)
def test_what_the_time_does_not_suffice_for_is_dropped(plan, seconds, alive):
    """A run takes 100 s here: one update a second."""
    board, told = board_of(plan, Rules(rates=False, seconds=seconds))
    found = []
    while not board.state.ended:
        looked(board, by_rank)
        board.judge(float(sum(arm.step for arm in board.state.arms)))
        found.append(len(board.state.alive))
    assert found[:3] == alive
    for event in told:
        if isinstance(event, ArmEnded) and "minutes" in event.why:
            assert event.status == "dropped" and "do not suffice" in event.why
    late = sum("is not cut short" in str(event) for event in told)
    assert late == int(seconds is not None and seconds < 140)  # its 140 updates are made all the same, which is told
    spent = sum(arm.step for arm in board.state.arms)
    assert seconds is None or seconds < 140 or spent <= seconds
    assert board.state.winner == 2


def test_no_arm_begins_for_which_there_is_no_time(plan):
    def at_the_edge(arm, share):
        return 1.3 - 0.2 * share - 0.1 * np.log(arm.plan.value("learning_rate") / 1e-2)

    for seconds, arms in ((None, 4), (400.0, 4), (100.0, 3)):
        board, _ = board_of(plan, Rules(seconds=seconds), over=())
        while not board.state.ended:
            looked(board, at_the_edge)
            board.judge(float(sum(arm.step for arm in board.state.arms)))
        assert len(board.state.arms) == arms, seconds


class Fixed:
    """A sampler with proposals of its own."""

    trials, batch = 6, 2

    def __init__(self):
        self.told = []

    def ask(self, told, count):
        self.told.append([(dict(settings), loss) for settings, loss in told])
        return [{"r": 10 + len(told) + i} for i in range(count)]


def test_a_sampler_is_told_all_and_asked_until_its_trials_are_spent(plan):
    sampler = Fixed()
    board, _ = board_of(plan, Rules(rates=False, sampler=sampler), over=("r=2,4",))
    looked(board, by_rank)
    assert board.judge(0.0) == ()  # the first look decides nothing
    begun = []
    while True:
        looked(board, by_rank)
        new = board.judge(0.0)
        if not new:
            break
        begun.append(new)
        assert all(board.goal(board.of(n)) == 10 for n in new)  # they take the first look too
    assert begun == [(2, 3), (4, 5)]
    assert [len(told) for told in sampler.told] == [2, 4]
    rows = [round(loss, 4) for _, loss in sampler.told[1]]
    assert rows == sorted(rows, reverse=True) and sampler.told[1][3][0] == {"r": 13}  # a larger rank is better here
    assert all([x.share for x in a.looks] == [0.1, 0.2] for a in board.state.arms)
    assert board.share_now > 0.2


def test_a_proposal_that_is_no_arm_is_told_and_counted(plan):
    class Poor(Fixed):
        def ask(self, told, count):
            return [{"r": -1}, {"r": 12}]

    board, told = board_of(plan, Rules(rates=False, sampler=Poor()), over=("r=2,4",))
    looked(board, by_rank)
    board.judge(0.0)
    looked(board, by_rank)
    assert board.judge(0.0) == (2,) and board.state.refused == 1
    assert any("left out" in str(event) for event in told)


def test_what_diverged_is_told_to_a_sampler_as_such(plan):
    sampler = Fixed()
    board, _ = board_of(plan, Rules(rates=False, sampler=sampler), over=("r=2,4",))
    board.end(0, Status.DIVERGED, "by order")
    for _ in range(2):
        looked(board, by_rank)
        board.judge(0.0)
    assert [loss is None for _, loss in sampler.told[0]] == [True, False]


def test_a_state_is_read_back(plan):
    board, _ = board_of(plan)
    looked(board, by_rank)
    board.judge(1.0)
    again, _ = board_of(plan)
    again.restore(State.from_json(board.state.to_json()))
    assert again.state == board.state and again.share_now == board.share_now
    earlier = board.state.to_json()
    earlier["arms"] = [{**arm, "like": 0} for arm in earlier["arms"]]
    assert State.from_json(earlier) == board.state


def test_a_forecast(plan):
    known = replace(plan, time=replace(plan.time, tokens_per_second=plan.time.tokens / 100.0))  # a run takes 100 s
    arms = first_arms(plan, question_of(3, []))
    found = forecast(known, arms, (0.1, 0.2, 0.4, 1.0), more=1)
    assert found.run == pytest.approx(100.0) and found.arms == 3
    assert 140 < found.low < 300 and 400 < found.high < 800  # with evaluations
    assert "3 arms" in found.sentence() and "--minutes" in found.sentence()
    require_time(found, None, plan)
    require_time(found, 101.0, plan)
    with pytest.raises(InputError, match=r"one run alone is forecast.*1 minute.*max_steps=30"):
        require_time(found, 60.0, plan)
    unknown = replace(plan, time=replace(plan.time, tokens_per_second=None))
    assert "cannot be forecast" in forecast(unknown, arms, (1.0,)).sentence()
    require_time(SearchForecast(arms=3, run=None, low=None, high=None, speed_from=plan.time.speed_from), 1.0, plan)


def test_settings_that_a_bank_cannot_hold_are_refused_at_the_start(plan):
    with pytest.raises(InputError, match="make 1 arms"):
        starting(plan, question_of(None, ["r=8"]))
    with pytest.raises(InputError, match="are no time"):
        question_of(None, [], minutes=-1)
