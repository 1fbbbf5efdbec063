"""Keep the libraries underneath silent: nothing leaves the machine, and the user sees our words.

Both work by environment variables, because Ray, Prefect and MLflow read theirs at import and
their worker processes inherit them. A value that the user has set wins.
"""

from __future__ import annotations

import os
import warnings

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}

NOISE_OFF = {
    # The console handler alone: a server still gets the log lines of a run.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",  # into our own server.log
    "PREFECT_CLI_COLORS": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "FATAL",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore",
}


def debugging() -> bool:
    """Whether SASHIKO_DEBUG=1 asks for tracebacks and the libraries' own output."""
    return os.environ.get("SASHIKO_DEBUG", "") not in ("", "0")


def no_telemetry() -> None:
    """Switch off usage reports of every library that would send one."""
    _default(TELEMETRY_OFF)


def hush() -> None:
    """Leave the terminal to the command's own output, unless SASHIKO_DEBUG=1."""
    if not debugging():
        _default(NOISE_OFF)
        warnings.simplefilter("ignore")


def _default(values: dict[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)
