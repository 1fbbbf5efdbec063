"""The Prefect flow `nightly`: on the schedule of `sashiko serve`, restores what is new."""

from __future__ import annotations

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact

from flows.api_nightly import NightlyResult, nightly
from flows.config import NightlySettings
from flows.watch import finished, flow_events


@flow(name="nightly")
def nightly_flow(settings: NightlySettings) -> NightlyResult | State[NightlyResult]:
    """Restore what is new in the inbox, measure what can be without a truth, and report."""
    result = nightly(settings, on_event=flow_events("nightly-progress"))
    create_markdown_artifact(f"```\n{result.summary()}\n```", key="nightly-report")
    return finished(result)
