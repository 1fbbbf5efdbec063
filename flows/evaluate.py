"""The Prefect flow `evaluate`: our solvers and the classical methods on the same measurements."""

from __future__ import annotations

from prefect import State, flow

from flows.api_evaluate import EvaluateResult, evaluate
from flows.config import EvaluateSettings
from flows.watch import finished, flow_events


@flow(name="evaluate")
def evaluate_flow(settings: EvaluateSettings) -> EvaluateResult | State[EvaluateResult]:
    """Damage clean images as the tasks say, restore them by every method, and compare."""
    return finished(evaluate(settings, on_event=flow_events("evaluate-progress")))
