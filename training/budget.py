"""--budget_minutes: how many steps fit into a given time. Pure arithmetic on times that the caller measures.

The plan starts from the speed of a few discarded steps. With the warm-up–stable–decay schedule the learning rate before the
decay does not depend on max_steps, so until the decay begins the plan may follow the machine's speed, and the run can still be
repeated from its final max_steps and decay_steps. Other schedules keep the first plan. Past 125 % of the budget training stops.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.optim import OptimizerOptions, Plan, planned

MOST_OVERRUN = 1.25
TOLERANCE = 0.03  # plans that differ by less are left alone


@dataclass
class Budget:
    """seconds: the budget. start: when the training began, on the caller's clock. pause_interval: steps between evaluations."""

    seconds: float
    start: float
    pause_interval: int
    options: OptimizerOptions
    step_seconds: float = 0.0  # a smoothed average of the last fifty steps or so
    pause_seconds: float = 0.0  # what the last evaluation took, its sample and checkpoint included
    closing_seconds: float = 0.0  # what is kept for the evaluation of the whole val split after the last step

    def first_plan(self, step_seconds: float, now: float) -> Plan:
        """The plan from the measured seconds of one step, before the first."""
        self.step_seconds = step_seconds
        return planned(self._steps_left(now), self.options)

    def observe_steps(self, steps: int, seconds: float) -> None:
        weight = 1.0 - 0.98**steps
        self.step_seconds += weight * (seconds / steps - self.step_seconds)

    def corrected(self, plan: Plan, step: int, now: float) -> Plan:
        """The plan to go on with after `step` steps; the same one where it still holds or can no longer change."""
        if self.options.schedule != "wsd" or step >= plan.max_steps - plan.decay_steps:
            return plan
        left = self._steps_left(now)
        new = planned(step + left, self.options)
        if abs(new.max_steps - plan.max_steps) <= TOLERANCE * plan.max_steps:
            return plan
        return Plan(new.max_steps, min(left, new.decay_steps))  # a decay that is due already begins now

    def spent(self, now: float) -> bool:
        """Whether the time has run out beyond what a plan may overrun."""
        return now - self.start > MOST_OVERRUN * self.seconds

    def _steps_left(self, now: float) -> int:
        seconds_left = self.seconds - (now - self.start) - self.pause_seconds - self.closing_seconds
        return max(1, int(seconds_left / (self.step_seconds + self.pause_seconds / self.pause_interval)))
