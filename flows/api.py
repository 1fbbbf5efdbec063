"""The public Python functions, one a command: what notebooks and other programs import.

    from flows import api
    result = api.restore(RestoreSettings(input="meas.zarr", output="out"))

Each is imported when it is first asked for, so that this module costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.api_calibrate import calibrate
    from flows.api_data import ingest, samples, simulate
    from flows.api_distill import distill
    from flows.api_evaluate import evaluate
    from flows.api_explain import explain
    from flows.api_generate import generate
    from flows.api_inspect import inspect
    from flows.api_nightly import nightly
    from flows.api_restore import restore
    from flows.api_review import review
    from flows.api_train import train
    from flows.api_upkeep import gc, quarantined, retry_quarantined, verify
    from flows.api_view import view
    from flows.demo import demo
    from flows.registry import models, promote, register_model, resolve_model, rollback

_HOMES = {
    "samples": "flows.api_data",
    "ingest": "flows.api_data",
    "inspect": "flows.api_inspect",
    "simulate": "flows.api_data",
    "train": "flows.api_train",
    "distill": "flows.api_distill",
    "calibrate": "flows.api_calibrate",
    "evaluate": "flows.api_evaluate",
    "restore": "flows.api_restore",
    "explain": "flows.api_explain",
    "generate": "flows.api_generate",
    "review": "flows.api_review",
    "nightly": "flows.api_nightly",
    "verify": "flows.api_upkeep",
    "view": "flows.api_view",
    "gc": "flows.api_upkeep",
    "quarantined": "flows.api_upkeep",
    "retry_quarantined": "flows.api_upkeep",
    "demo": "flows.demo",
    "models": "flows.registry",
    "promote": "flows.registry",
    "register_model": "flows.registry",
    "resolve_model": "flows.registry",
    "rollback": "flows.registry",
}

__all__ = [
    "calibrate",
    "demo",
    "distill",
    "evaluate",
    "explain",
    "gc",
    "generate",
    "ingest",
    "inspect",
    "models",
    "nightly",
    "promote",
    "quarantined",
    "register_model",
    "resolve_model",
    "restore",
    "retry_quarantined",
    "review",
    "rollback",
    "samples",
    "simulate",
    "train",
    "verify",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flows.api' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
