"""The Prefect flow `train`: typed settings in, a model directory out."""

from __future__ import annotations

from prefect import flow

from flows.api_train import TrainResult, train
from flows.config import TrainSettings
from flows.watch import flow_events


@flow(name="train")
def train_flow(settings: TrainSettings) -> TrainResult:
    """Train a model, or go on where a killed run of the same name was."""
    return train(settings, on_event=flow_events("train-progress"))
