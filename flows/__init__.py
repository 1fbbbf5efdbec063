"""Orchestration: the only place that knows Prefect, Ray, MLflow and Zarr."""

from flows import quiet

quiet.no_telemetry()
