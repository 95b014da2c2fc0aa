"""--budget_minutes on a clock of our own: the run ends near the budget even where the machine slows down in the middle."""

import pytest

from training.budget import MOST_OVERRUN, Budget
from training.optim import OptimizerOptions, learning_rate


def simulate(speed, *, seconds=180.0, schedule="wsd", pause=2.0, interval=250, log_interval=10):
    """Runs a plan against `speed(now)`, the seconds of a step at that time → (seconds used, steps, final plan, all plans)."""
    now = 0.0
    budget = Budget(
        seconds, start=0.0, pause_interval=interval, options=OptimizerOptions(schedule=schedule), pause_seconds=pause
    )
    plan = budget.first_plan(speed(0.0), now)
    plans, step, since, started = [plan], 0, 0, 0.0
    while step < plan.max_steps and not budget.spent(now):
        if step % interval == 0:
            now += pause
            started += pause
        now += speed(now)
        step += 1
        if step % log_interval == 0:
            budget.observe_steps(step - since, now - started)
            since, started = step, now
            corrected = budget.corrected(plan, step, now)
            if corrected != plan:
                plan = corrected
                plans.append(plan)
    return now + pause, step, plan, plans


@pytest.mark.parametrize("step_seconds", [0.005, 0.1, 1.7])
def test_a_steady_machine_uses_the_budget_and_keeps_its_plan(step_seconds):
    used, _, _, plans = simulate(lambda now: step_seconds)
    assert 0.9 * 180 <= used <= 1.05 * 180
    assert len(plans) == 1


@pytest.mark.parametrize("factor", [1.5, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("moment", [0.02, 0.3, 0.5, 0.75])
def test_a_machine_that_slows_down_in_mid_run_overruns_by_at_most_a_quarter(factor, moment):
    used, step, plan, plans = simulate(lambda now: 0.05 * (factor if now > moment * 180 else 1.0))
    assert used <= MOST_OVERRUN * 180 + 0.05 * factor + 2.0  # the step and the pause under way are finished
    assert len(plans) > 1
    assert step == plan.max_steps or used > 180 * MOST_OVERRUN


def test_slowing_down_before_the_decay_still_ends_in_a_whole_decay():
    used, step, plan, _ = simulate(lambda now: 0.05 * (2.0 if now > 60 else 1.0))
    assert step == plan.max_steps
    assert used <= 1.1 * 180
    assert plan.decay_steps >= 0.15 * plan.max_steps


def test_slowing_down_within_the_decay_stops_at_a_quarter_over():
    used, step, plan, _ = simulate(lambda now: 0.05 * (30.0 if now > 0.9 * 180 else 1.0))
    assert step < plan.max_steps
    assert used <= MOST_OVERRUN * 180 + 1.5 + 2.0


def test_a_machine_that_gets_faster_trains_longer():
    _, step, _, plans = simulate(lambda now: 0.1 if now < 30 else 0.05)
    assert plans[-1].max_steps > 1.5 * plans[0].max_steps
    assert step == plans[-1].max_steps


def test_other_schedules_keep_their_first_plan():
    used, _, _, plans = simulate(lambda now: 0.05 * (1.1 if now > 60 else 1.0), schedule="cosine")
    assert len(plans) == 1
    assert used <= 1.25 * 180


def test_a_corrected_run_repeats_from_its_final_plan():
    """Before the decay the learning rate depends on no plan, so the final plan alone gives every learning rate of the run."""
    options = OptimizerOptions(schedule="wsd", warmup_steps=50)
    now, step, seen = 0.0, 0, []
    budget = Budget(seconds=100.0, start=0.0, pause_interval=10**9, options=options)
    plan = budget.first_plan(0.05, now)
    while step < plan.max_steps:
        seen.append(learning_rate(step, plan, options))
        took = 0.05 * (1.0 if now < 20 else 2.0 if now < 60 else 0.7)
        now, step = now + took, step + 1
        budget.observe_steps(1, took)
        plan = budget.corrected(plan, step, now)
    assert seen == [learning_rate(step, plan, options) for step in range(plan.max_steps)]
