"""The Prefect flow `ingest`: files in, one dataset out."""

from __future__ import annotations

from prefect import State, flow

from flows.api_data import IngestResult, ingest
from flows.config import IngestSettings
from flows.watch import finished, flow_events


@flow(name="ingest")
def ingest_flow(settings: IngestSettings) -> IngestResult | State[IngestResult]:
    """Read images into one dataset; files that cannot be used are quarantined with a reason."""
    return finished(ingest(settings, on_event=flow_events("ingest-progress")))
