"""The ledger's rules, one at a time, by hand. Times are in seconds and made up."""

from __future__ import annotations

import pytest

from aiorl.errors import EpisodesTooShort
from aiorl.sampling.decisions import Decision, Granted, Opened, Sealed
from aiorl.sampling.epoch import EpochLedger


def ledger_of(
    num_groups: int, num_epoch_samples: int, *, max_policy_lag: int = 0, late_ticks: float | None = 4.0
) -> EpochLedger:
    ledger = EpochLedger(num_epoch_samples, max_policy_lag=max_policy_lag, late_ticks=late_ticks)
    for group in range(num_groups):
        ledger.join(group)
    return ledger


def taken(ledger: EpochLedger) -> list[Decision]:
    """The decisions since the last call."""
    decisions, ledger.decisions = ledger.decisions, []
    return decisions


def sealed_of(ledger: EpochLedger) -> list[Sealed]:
    return [decision for decision in taken(ledger) if isinstance(decision, Sealed)]


def send(ledger: EpochLedger, group: int, adds: int = 4, *, at: float = 0.0) -> int:
    """A step that is granted at once goes out; returns its epoch."""
    epoch = ledger.request(group, adds)
    assert epoch is not None
    ledger.dispatch(group, at)
    return epoch


def step(ledger: EpochLedger, group: int, adds: int = 4, *, at: float = 0.0) -> int:
    """A step that is granted at once goes out and lands a second later."""
    epoch = send(ledger, group, adds, at=at)
    ledger.land(group, adds, 0, at + 1.0)
    return epoch


# ---------------------------------------------------------------------- grants and seals
def test_steps_are_granted_while_rows_are_missing_and_no_longer() -> None:
    ledger = ledger_of(4, 10)
    assert [ledger.request(group, 4) for group in range(3)] == [1, 1, 1]  # 0, 4 and 8 rows were in sight: fewer than 10
    assert ledger.request(3, 4) is None
    assert taken(ledger) == [Opened(1)]
    assert ledger.num_outstanding == 3


def test_an_epoch_is_sealed_when_its_last_step_lands() -> None:
    ledger = ledger_of(3, 10)
    for group in range(3):
        send(ledger, group)
    ledger.land(0, 4, 0, 1.0)
    ledger.land(2, 4, 0, 1.0)
    assert sealed_of(ledger) == []
    assert ledger.unsealed_rows == 8
    ledger.land(1, 4, 0, 1.0)
    assert taken(ledger) == [Sealed(1, {0: 1, 1: 1, 2: 1}, num_rows=12, num_dropped=0, num_late=0)]
    assert not ledger.sampling
    assert ledger.unsealed_rows == ledger.num_outstanding == 0


def test_rows_that_exactly_fill_an_epoch_leave_no_room() -> None:
    ledger = ledger_of(2, 8)
    assert [ledger.request(0, 4), ledger.request(1, 4)] == [1, 1]
    ledger.dispatch(0, 0.0)
    ledger.land(0, 4, 0, 1.0)
    assert ledger.request(0, 4) is None


def test_a_group_larger_than_an_epoch_overshoots_by_less_than_itself() -> None:
    ledger = ledger_of(2, 1)
    assert send(ledger, 0, 64) == 1
    assert ledger.request(1, 64) is None
    ledger.land(0, 64, 0, 1.0)
    assert sealed_of(ledger)[0].num_rows == 64


def test_a_fast_group_makes_up_for_a_slow_one_and_boundaries_count_the_ticks_of_each() -> None:
    ledger = ledger_of(2, 12)
    send(ledger, 1)
    step(ledger, 0)
    step(ledger, 0)
    assert ledger.request(0, 4) is None
    ledger.land(1, 4, 0, 5.0)
    ledger.learned(1)
    [sealed] = sealed_of(ledger)
    assert sealed.boundaries == {0: 2, 1: 1}


def test_at_lag_0_the_next_epoch_waits_for_the_learner() -> None:
    ledger = ledger_of(2, 4)
    step(ledger, 0)
    assert ledger.request(1, 4) is None
    assert ledger.request(0, 4) is None
    taken(ledger)
    ledger.learned(1)
    assert taken(ledger) == [Opened(2), Granted(1, 2)]  # in the order in which they asked
    ledger.dispatch(1, 1.0)
    ledger.land(1, 4, 0, 2.0)
    ledger.learned(2)
    assert taken(ledger) == [Sealed(2, {0: 1, 1: 1}, 4, 0, 0), Opened(3), Granted(0, 3)]


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_at_a_lag_the_next_grant_belongs_to_the_next_epoch_and_nothing_drains(lag: int) -> None:
    ledger = ledger_of(lag + 2, 4, max_policy_lag=lag)
    assert [send(ledger, group) for group in range(lag + 1)] == list(range(1, lag + 2))
    assert ledger.request(lag + 1, 4) is None  # none is older than epoch - 1 - lag
    ledger.land(0, 4, 0, 1.0)
    assert [sealed.epoch for sealed in sealed_of(ledger)] == [1]
    ledger.learned(1)
    assert taken(ledger) == [Opened(lag + 2), Granted(lag + 1, lag + 2)]


def test_epochs_are_sealed_in_order_even_where_the_later_one_is_complete_first() -> None:
    ledger = ledger_of(2, 4, max_policy_lag=1)
    assert [send(ledger, 0), send(ledger, 1)] == [1, 2]
    ledger.land(1, 4, 0, 1.0)
    assert sealed_of(ledger) == []
    ledger.land(0, 4, 0, 1.0)
    assert [sealed.epoch for sealed in sealed_of(ledger)] == [1, 2]


def test_weights_do_not_change_between_a_grant_and_its_action() -> None:
    ledger = ledger_of(2, 4, max_policy_lag=1)
    assert ledger.request(0, 4) == 1
    assert ledger.request(1, 4) is None  # epoch 2 would activate newer weights while epoch 1 still waits for an action
    taken(ledger)
    ledger.dispatch(0, 0.0)
    assert taken(ledger) == [Opened(2), Granted(1, 2)]


def test_who_waits_is_served_first() -> None:
    ledger = ledger_of(3, 4)
    step(ledger, 2)
    for group in (1, 0, 2):
        assert ledger.request(group, 1) is None
    taken(ledger)
    ledger.learned(1)
    assert taken(ledger) == [Opened(2), Granted(1, 2), Granted(0, 2), Granted(2, 2)]


def test_a_step_that_brings_less_than_it_promised_is_made_up_for() -> None:
    ledger = ledger_of(2, 4)
    send(ledger, 0)
    assert ledger.request(1, 4) is None
    ledger.land(0, 1, 0, 1.0)
    assert taken(ledger)[1:] == [Granted(1, 1)]


def test_it_starts_where_an_earlier_run_ended() -> None:
    ledger = ledger_of(1, 4)
    ledger.resume_at(17)
    assert step(ledger, 0) == 18
    assert sealed_of(ledger)[0].epoch == 18


# ---------------------------------------------------------------------- lateness
def with_a_median_of_one_second(ledger: EpochLedger, group: int, num_ticks: int) -> None:
    for _ in range(num_ticks):
        step(ledger, group, 1)
    taken(ledger)


def test_a_late_step_does_not_hold_its_epoch_and_its_rows_open_the_next_one() -> None:
    ledger = ledger_of(2, 10)
    with_a_median_of_one_second(ledger, 0, 5)
    send(ledger, 1, at=100.0)
    assert ledger.deadline() is None  # the epoch is not full: nobody waits
    send(ledger, 0, 1, at=101.0)
    assert ledger.deadline() == 104.0
    ledger.land(0, 1, 0, 102.0)
    assert ledger.request(0, 1) is None
    ledger.expire(103.9)
    assert taken(ledger) == []
    ledger.expire(104.0)
    assert taken(ledger) == [Granted(0, 1)]
    assert ledger.num_outstanding == 1  # the late one is not counted
    assert ledger.deadline() is None
    ledger.dispatch(0, 104.0)
    ledger.land(0, 1, 0, 105.0)
    for at in (106.0, 107.0, 108.0):
        step(ledger, 0, 1, at=at)
    assert taken(ledger) == [Sealed(1, {0: 10, 1: 0}, num_rows=10, num_dropped=0, num_late=0)]
    ledger.land(1, 4, 0, 300.0)
    assert ledger.unsealed_rows == 4
    assert not ledger.sampling
    ledger.learned(1)
    assert send(ledger, 1, 6, at=300.0) == 2
    ledger.land(1, 6, 0, 301.0)
    assert taken(ledger) == [Opened(2), Sealed(2, {0: 10, 1: 2}, num_rows=10, num_dropped=0, num_late=4)]


def test_a_late_step_whose_place_nobody_fills_still_belongs_to_its_epoch() -> None:
    ledger = ledger_of(1, 3)
    with_a_median_of_one_second(ledger, 0, 2)
    send(ledger, 0, 1)
    ledger.expire(100.0)
    ledger.land(0, 1, 0, 101.0)
    assert taken(ledger) == [Sealed(1, {0: 3}, num_rows=3, num_dropped=0, num_late=1)]


def test_when_all_are_late_the_first_to_land_completes_the_epoch() -> None:
    ledger = ledger_of(3, 5)
    with_a_median_of_one_second(ledger, 0, 1)
    for group in range(2):
        send(ledger, group, 2)
    ledger.expire(100.0)
    assert send(ledger, 2, 2, at=100.0) == 1
    ledger.expire(200.0)  # nothing is left to expire: the epoch is not full
    ledger.land(1, 2, 0, 201.0)
    assert sealed_of(ledger) == []
    ledger.land(2, 2, 0, 201.0)
    assert sealed_of(ledger) == [Sealed(1, {0: 1, 1: 1, 2: 1}, 5, 0, 2)]


def test_late_rows_fill_as_many_epochs_as_they_are_worth() -> None:
    ledger = ledger_of(4, 4)
    step(ledger, 0)
    ledger.learned(1)
    for group in range(4):
        assert send(ledger, group) == 2
        if group < 3:
            ledger.expire(100.0)  # each is late, and the next one takes its place
    taken(ledger)
    ledger.land(3, 4, 0, 1.0)
    assert sealed_of(ledger) == [Sealed(2, {0: 1, 1: 0, 2: 0, 3: 1}, 4, 0, 0)]
    for group in (0, 2, 1):
        ledger.land(group, 4, 0, 200.0)
    assert ledger.unsealed_rows == 12
    assert ledger.request(0, 4) is None
    assert taken(ledger) == []
    for epoch in (3, 4, 5):
        ledger.learned(epoch - 1)
        [opened, sealed] = taken(ledger)
        assert opened == Opened(epoch)
        assert isinstance(sealed, Sealed)
        assert (sealed.num_rows, sealed.num_late) == (4, 4)  # not 12 in one
    ledger.learned(5)
    assert taken(ledger) == [Opened(6), Granted(0, 6)]


def test_where_groups_have_gone_on_the_next_epochs_earliest_steps_are_taken_over() -> None:
    ledger = ledger_of(3, 3, max_policy_lag=1)
    with_a_median_of_one_second(ledger, 0, 1)
    assert send(ledger, 2, 2) == 1
    assert [step(ledger, 0, 1), step(ledger, 1, 1, at=50.0), send(ledger, 0, 1, at=99.0)] == [2, 2, 2]
    assert sealed_of(ledger) == []
    ledger.expire(100.0)  # group 2 is late: two rows of epoch 2 complete epoch 1
    assert sealed_of(ledger) == [Sealed(1, {0: 2, 1: 1, 2: 0}, 3, 0, 0)]
    ledger.land(2, 2, 0, 101.0)
    ledger.land(0, 1, 0, 101.0)
    assert sealed_of(ledger) == [Sealed(2, {0: 3, 1: 1, 2: 1}, 3, 0, 2)]


def test_of_the_next_epochs_steps_the_earliest_granted_is_taken_over_first() -> None:
    ledger = ledger_of(3, 2, max_policy_lag=1)
    with_a_median_of_one_second(ledger, 0, 1)
    assert [send(ledger, 2, 1), send(ledger, 1, 1, at=99.0), send(ledger, 0, 1, at=99.0)] == [1, 2, 2]
    ledger.land(0, 1, 0, 100.0)
    ledger.expire(100.0)
    assert sealed_of(ledger) == []  # group 1's is, though group 0's has landed
    ledger.land(1, 1, 0, 101.0)
    assert sealed_of(ledger) == [Sealed(1, {0: 1, 1: 1, 2: 0}, 2, 0, 0)]


def test_an_outstanding_step_that_was_taken_over_is_waited_for() -> None:
    ledger = ledger_of(2, 2, max_policy_lag=1)
    with_a_median_of_one_second(ledger, 0, 1)
    assert [send(ledger, 1, 1), send(ledger, 0, 1, at=99.0)] == [1, 2]
    ledger.expire(100.0)
    assert sealed_of(ledger) == []
    ledger.land(0, 1, 0, 101.0)
    assert sealed_of(ledger) == [Sealed(1, {0: 2, 1: 0}, 2, 0, 0)]


def test_late_rows_of_the_next_epoch_are_taken_over_too() -> None:
    ledger = ledger_of(2, 2)
    with_a_median_of_one_second(ledger, 1, 1)
    send(ledger, 0, 1)
    ledger.expire(50.0)
    assert send(ledger, 1, 1, at=50.0) == 1
    ledger.land(0, 1, 0, 51.0)  # epoch 1 is full: it opens epoch 2
    assert ledger.request(0, 1) is None
    ledger.leave(1)  # epoch 1 is not: it is all that there is
    assert sealed_of(ledger) == [Sealed(1, {0: 1, 1: 1}, 2, 0, 1)]
    ledger.learned(1)
    assert taken(ledger) == [Opened(2), Granted(0, 2)]


def test_a_step_whose_action_is_not_out_yet_is_not_late() -> None:
    ledger = ledger_of(2, 2)
    with_a_median_of_one_second(ledger, 0, 1)
    assert ledger.request(1, 1) == 1
    assert ledger.deadline() is None
    ledger.expire(1000.0)
    assert ledger.num_outstanding == 1


def test_no_step_is_late_before_some_tick_is_known_nor_where_lateness_is_off() -> None:
    ledger = ledger_of(1, 1)
    send(ledger, 0, 1)
    assert ledger.deadline() is None
    ledger.expire(1000.0)
    assert ledger.num_outstanding == 1
    ledger = ledger_of(2, 3, late_ticks=None)
    with_a_median_of_one_second(ledger, 0, 2)
    send(ledger, 1, 1)
    assert ledger.deadline() is None
    ledger.expire(1000.0)
    assert ledger.num_outstanding == 1


def test_four_median_ticks_is_the_median_of_all_groups() -> None:
    ledger = ledger_of(2, 6)
    for took in (1.0, 1.0, 3.0, 100.0, 3.0):
        send(ledger, 0, 1)
        ledger.land(0, 1, 0, took)
    send(ledger, 1, 1, at=10.0)
    assert ledger.deadline() == 10.0 + 4 * 3.0


# ---------------------------------------------------------------------- groups that leave
def test_a_step_of_a_group_that_leaves_is_granted_to_another() -> None:
    ledger = ledger_of(2, 4)
    send(ledger, 0)
    assert ledger.request(1, 4) is None
    taken(ledger)
    ledger.leave(0)
    assert taken(ledger) == [Granted(1, 1)]
    assert ledger.num_outstanding == 1


def test_what_a_group_landed_before_it_left_stays() -> None:
    ledger = ledger_of(2, 8)
    step(ledger, 0)
    send(ledger, 0, at=1.0)
    ledger.leave(0)
    assert ledger.unsealed_rows == 4
    step(ledger, 1)
    assert sealed_of(ledger) == [Sealed(1, {0: 1, 1: 1}, 8, 0, 0)]
    ledger.forget(0)
    ledger.learned(1)
    assert [step(ledger, 1), step(ledger, 1)] == [2, 2]
    assert sealed_of(ledger) == [Sealed(2, {1: 3}, 8, 0, 0)]


def test_a_group_may_leave_before_its_action_is_out() -> None:
    ledger = ledger_of(2, 4, max_policy_lag=1)
    assert ledger.request(0, 4) == 1
    ledger.leave(0)
    assert [step(ledger, 1), step(ledger, 1)] == [1, 2]  # nothing waits for the action that never goes out


def test_a_group_may_leave_while_it_waits() -> None:
    ledger = ledger_of(3, 4)
    step(ledger, 0)
    assert ledger.request(1, 4) is None
    assert ledger.request(2, 4) is None
    taken(ledger)
    ledger.leave(1)
    ledger.leave(1)  # harmless
    ledger.learned(1)
    assert taken(ledger) == [Opened(2), Granted(2, 2)]


def test_a_group_may_leave_while_it_is_late() -> None:
    ledger = ledger_of(2, 3)
    with_a_median_of_one_second(ledger, 0, 2)
    send(ledger, 1, 1)
    ledger.expire(100.0)
    ledger.leave(1)
    assert ledger.num_outstanding == 0
    step(ledger, 0, 1, at=100.0)
    assert sealed_of(ledger) == [Sealed(1, {0: 3, 1: 0}, 3, 0, 0)]


def test_the_last_step_of_an_epoch_may_be_one_that_never_lands() -> None:
    ledger = ledger_of(3, 4, max_policy_lag=1)
    send(ledger, 0)
    send(ledger, 1)
    ledger.land(1, 4, 0, 1.0)
    ledger.leave(0)  # epoch 2's rows complete epoch 1
    assert sealed_of(ledger) == [Sealed(1, {0: 0, 1: 1, 2: 0}, 4, 0, 0)]
    assert send(ledger, 2) == 2  # open, and empty again


# ---------------------------------------------------------------------- holding, ending, giving up
def test_a_pause_grants_nothing_and_lets_what_is_outstanding_land() -> None:
    ledger = ledger_of(2, 8)
    send(ledger, 0)
    ledger.pause()
    assert ledger.paused
    assert ledger.request(1, 4) is None
    ledger.land(0, 4, 0, 1.0)
    assert ledger.request(0, 4) is None
    assert ledger.num_outstanding == 0
    assert taken(ledger) == [Opened(1)]
    ledger.resume()
    assert not ledger.paused
    assert taken(ledger) == [Granted(1, 1)]


def test_what_lands_in_a_pause_is_sealed_and_what_is_learned_opens_nothing() -> None:
    ledger = ledger_of(1, 4)
    send(ledger, 0)
    ledger.pause()
    ledger.land(0, 4, 0, 1.0)
    assert ledger.request(0, 4) is None
    ledger.learned(1)
    assert taken(ledger) == [Opened(1), Sealed(1, {0: 1}, 4, 0, 0)]
    ledger.resume()
    assert taken(ledger) == [Opened(2), Granted(0, 2)]


def test_finishing_completes_the_open_epochs_and_opens_none() -> None:
    ledger = ledger_of(2, 8, max_policy_lag=1)
    send(ledger, 0)
    ledger.finish()
    assert ledger.sampling
    assert [send(ledger, 1), ledger.request(1, 4)] == [1, None]
    ledger.land(0, 4, 0, 1.0)
    ledger.land(1, 4, 0, 1.0)
    ledger.learned(1)
    assert [type(decision) for decision in taken(ledger)] == [Opened, Sealed]
    assert not ledger.sampling


def test_an_epoch_may_be_told_to_make_do_with_what_it_has() -> None:
    ledger = ledger_of(3, 100)
    ledger.complete()
    assert taken(ledger) == []
    step(ledger, 0)
    send(ledger, 1)
    assert ledger.request(0, 4) == 1
    ledger.dispatch(0, 0.0)
    ledger.complete()
    assert ledger.request(2, 4) is None
    ledger.land(0, 4, 0, 1.0)
    assert sealed_of(ledger) == []
    ledger.land(1, 4, 0, 1.0)  # what was granted is waited for: nothing is thrown away
    assert sealed_of(ledger) == [Sealed(1, {0: 2, 1: 1, 2: 0}, 12, 0, 0)]


def test_an_epoch_without_a_row_cannot_be_complete() -> None:
    ledger = ledger_of(1, 4)
    send(ledger, 0)
    ledger.complete()
    ledger.land(0, 0, 0, 1.0)
    assert ledger.request(0, 4) == 1
    assert sealed_of(ledger) == []


def test_ten_epochs_of_dropped_rows_and_none_kept_end_in_an_error() -> None:
    ledger = ledger_of(1, 4)
    for _ in range(9):
        send(ledger, 0, 0)
        ledger.land(0, 0, 4, 1.0)
    send(ledger, 0, 0)
    ledger.land(0, 0, 3, 1.0)
    send(ledger, 0, 0)
    with pytest.raises(
        EpisodesTooShort, match=r"^40 transitions in a row .* lower trainer.sampling.min_trajectory_length"
    ):
        ledger.land(0, 0, 1, 1.0)


def test_dropped_rows_beside_kept_ones_are_counted_and_no_error() -> None:
    ledger = ledger_of(1, 4)
    step(ledger, 0, 1)
    for _ in range(20):
        send(ledger, 0, 0)
        ledger.land(0, 0, 4, 1.0)
    step(ledger, 0, 3)
    assert sealed_of(ledger) == [Sealed(1, {0: 22}, 4, 80, 0)]


def test_it_says_what_it_waits_for() -> None:
    ledger = ledger_of(2, 8)
    assert ledger.describe() == "no epoch open; 0 groups wait for a grant; epoch 0 is learned"
    send(ledger, 0, 8)
    assert ledger.request(1, 4) is None
    assert ledger.describe() == (
        "epoch 1: 0 of 8 rows landed, 1 steps outstanding; 1 groups wait for a grant; epoch 0 is learned"
    )
    ledger.pause()
    assert ledger.describe().startswith("paused; ")
    ledger.resume()
    ledger.finish()
    assert ledger.describe().startswith("finishing; ")
