"""The Prefect flow `review`: compares, pauses for a person's answer, and promotes on a yes.

It is a flow of its own because nothing scheduled may wait on a person. On a server the answer is
given in the form of the paused run; no answer within the timeout means no.
"""

from __future__ import annotations

import math

from prefect import flow, pause_flow_run, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.states import Running
from pydantic import Field

from flows.api_review import Comparison, ReviewResult, compare, decide
from flows.config import ReviewSettings
from flows.watch import asker, flow_events

POLL_S = 10


class ReviewAnswer(RunInput):
    """The form of the paused run."""

    promote: bool = Field(False, description="make the candidate the champion")


@flow(name="review")
def review_flow(settings: ReviewSettings) -> ReviewResult:
    """Compare a candidate with the champion, ask a person, and promote it on a yes."""
    on_event = flow_events("review-progress")
    comparing = task(name="compare", cache_policy=NO_CACHE)(lambda: compare(settings, on_event))
    comparison = comparing()
    create_markdown_artifact(f"```\n{comparison.sentences()}\n```", key="review-comparison")
    return decide(comparison, _answer(settings, comparison))


def _answer(settings: ReviewSettings, comparison: Comparison) -> bool | None:
    """From the settings, the person at the terminal, or the paused run's form."""
    if settings.answer is not None:
        return settings.answer == "yes"
    ask = asker()
    if ask is not None:
        return ask(comparison)
    return _pause(comparison, timeout_s=max(1, math.ceil(settings.timeout_days * 86400)))


def _pause(comparison: Comparison, timeout_s: int) -> bool | None:
    form = ReviewAnswer.with_initial_data(
        description=f"```\n{comparison.sentences()}\n```", promote=False
    )
    try:
        answer = pause_flow_run(
            wait_for_input=form, timeout=timeout_s, poll_interval=min(POLL_S, timeout_s)
        )
    except FlowPauseTimeout:
        _leave_pause()
        return None
    return bool(answer.promote)


def _leave_pause() -> None:
    """Let the run end as completed: from a pause that timed out the server only lets it fail."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(context.flow_run.id, Running(), force=True)
