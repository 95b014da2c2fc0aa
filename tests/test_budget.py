"""--budget_minutes on a simulated clock: the run ends near the budget even where the machine slows down midway."""

import pytest

from training.budget import MAX_OVERRUN, Budget
from training.optim import Plan, learning_rate
from training.options import OptimizerOptions


def make_budget(seconds, step_seconds, options, eval_interval, pause=0.0):
    budget = Budget(Plan(1, 1), options, eval_interval)
    eval_steps = 3 * pause / step_seconds  # a forward pass is a third of a step
    budget.limit(seconds, 0.0, step_seconds, 0.0, eval_steps, final_eval_steps=0.0)
    return budget


def simulate(speed, *, seconds=180.0, schedule="wsd", pause=2.0, interval=250, log_interval=10):
    """Runs a budget against `speed(now)`, the seconds of a step at that time → (seconds used, steps, final plan, all
    plans)."""
    now = 0.0
    budget = make_budget(seconds, speed(0.0), OptimizerOptions(schedule=schedule), interval, pause)
    plans, step, since, started = [budget.plan], 0, 0, 0.0
    while step < budget.plan.max_steps and not budget.is_spent(now):
        if step % interval == 0:
            now += pause
            started += pause
        now += speed(now)
        step += 1
        if step % log_interval == 0:
            if budget.observe(step, step - since, now - started, now):
                plans.append(budget.plan)
            since, started = step, now
    return now + pause, step, budget.plan, plans


@pytest.mark.parametrize("step_seconds", [0.005, 0.1, 1.7])
def test_a_steady_machine_uses_the_budget_and_keeps_its_plan(step_seconds):
    used, _, _, plans = simulate(lambda now: step_seconds)
    assert 0.9 * 180 <= used <= 1.05 * 180
    assert len(plans) == 1


@pytest.mark.parametrize("factor", [1.5, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("moment", [0.02, 0.3, 0.5, 0.75])
def test_a_machine_that_slows_down_in_mid_run_overruns_by_at_most_a_quarter(factor, moment):
    used, step, plan, plans = simulate(lambda now: 0.05 * (factor if now > moment * 180 else 1.0))
    assert used <= MAX_OVERRUN * 180 + 0.05 * factor + 2.0  # the current step and pause are finished
    assert len(plans) > 1
    assert step == plan.max_steps or used > 180 * MAX_OVERRUN


def test_slowing_down_before_the_decay_still_ends_in_a_whole_decay():
    used, step, plan, _ = simulate(lambda now: 0.05 * (2.0 if now > 60 else 1.0))
    assert step == plan.max_steps
    assert used <= 1.1 * 180
    assert plan.decay_steps >= 0.15 * plan.max_steps


def test_slowing_down_within_the_decay_stops_at_a_quarter_over():
    used, step, plan, _ = simulate(lambda now: 0.05 * (30.0 if now > 0.9 * 180 else 1.0))
    assert step < plan.max_steps
    assert used <= MAX_OVERRUN * 180 + 1.5 + 2.0


def test_a_machine_that_gets_faster_trains_longer():
    _, step, _, plans = simulate(lambda now: 0.1 if now < 30 else 0.05)
    assert plans[-1].max_steps > 1.5 * plans[0].max_steps
    assert step == plans[-1].max_steps


def test_other_schedules_keep_their_first_plan():
    used, _, _, plans = simulate(lambda now: 0.05 * (1.1 if now > 60 else 1.0), schedule="cosine")
    assert len(plans) == 1
    assert used <= 1.25 * 180


def test_a_corrected_run_repeats_from_its_final_plan():
    """Before the decay the learning rate depends on no plan, so the final plan alone gives every learning rate of the
    run."""
    options = OptimizerOptions(schedule="wsd", warmup_steps=50)
    now, step, seen = 0.0, 0, []
    budget = make_budget(100.0, 0.05, options, 10**9)
    while step < budget.plan.max_steps:
        seen.append(learning_rate(step, budget.plan, options))
        took = 0.05 * (1.0 if now < 20 else 2.0 if now < 60 else 0.7)
        now, step = now + took, step + 1
        budget.observe(step, 1, took, now)
    assert seen == [learning_rate(step, budget.plan, options) for step in range(budget.plan.max_steps)]
    assert budget.as_options() == {"max_steps": step, "decay_steps": budget.plan.decay_steps, "budget_minutes": None}


def test_without_a_time_limit_the_plan_stays():
    budget = Budget(Plan(100, 20), OptimizerOptions(schedule="wsd"), 10)
    assert not budget.observe(10, 10, 1e6, 1e6)
    assert not budget.is_spent(1e9)
    assert budget.plan == Plan(100, 20)
    assert budget.as_options() == {}
