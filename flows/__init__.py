"""Orchestration: the only place that knows Prefect, Ray, MLflow and Zarr."""
