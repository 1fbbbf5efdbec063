"""What can be told of a request before anything is started: a Prefect server takes half a minute.

Each check is the first look of the command's own function, which takes it again: a path that is
mistyped, a domain or task that nobody knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from domains.base import BadInputError
from domains.registry import load_domain, require_domain
from flows.config import (
    EvaluateSettings,
    IngestSettings,
    NightlySettings,
    RestoreSettings,
    ReviewSettings,
    Settings,
    TrainSettings,
)

if TYPE_CHECKING:
    from pathlib import Path


def check(settings: Settings) -> None:
    """Refuse a request that names what is not there.

    Raises:
        BadInputError: as the command's own function.
    """
    match settings:
        case IngestSettings():
            _ingest(settings)
        case EvaluateSettings():
            _evaluate(settings)
        case RestoreSettings():
            _restore(settings)
        case TrainSettings():
            _train(settings)
        case ReviewSettings():
            _review(settings)
        case NightlySettings():
            _nightly(settings)


def _ingest(settings: IngestSettings) -> None:
    from flows.api_data import find_files
    from flows.store_files import require_new

    require_new(settings.output)
    find_files(settings.source, load_domain(settings.domain))


def _evaluate(settings: EvaluateSettings) -> None:
    from flows.api_evaluate import checked_tasks

    tasks = checked_tasks(settings)
    if settings.domain is not None:
        require_domain(settings.domain)
    _images(settings.input, settings.domain or next(iter(tasks.values())).domain)
    _model(settings.model)


def _restore(settings: RestoreSettings) -> None:
    from flows.api_data import find_files
    from flows.api_restore import check_request
    from flows.damage import Damage
    from flows.given import local_images, require_stated
    from flows.store_files import has_manifest

    check_request(settings)
    if settings.domain is not None and not has_manifest(settings.input):
        domain = load_domain(settings.domain)
        files = find_files(local_images(settings), domain)
        require_stated(settings, files, Damage.of(settings, domain), domain)
    _model(settings.model)


def _train(settings: TrainSettings) -> None:
    from flows.api_train import resolved
    from flows.training.checks import check_settings
    from flows.training.sources import open_sources

    settings = resolved(settings)
    open_sources(settings)
    check_settings(settings)


def _review(settings: ReviewSettings) -> None:
    from flows.api_review import contenders
    from flows.config import load_task

    for task in settings.tasks:
        load_task(task)
    if settings.input is not None and not settings.input.exists():
        raise BadInputError(f"{settings.input}: there is no such dataset; check the path")
    contenders(settings)


def _nightly(settings: NightlySettings) -> None:
    from flows.inbox import find_jobs

    find_jobs(settings.inbox)
    _model(settings.model)


def _model(ref: str) -> None:
    """A model by its directory; MLflow, which takes seconds to import, is asked later."""
    from flows.registry import CHAMPION, resolve_model

    if ref != CHAMPION and not ref.startswith("models:"):
        resolve_model(ref)


def _images(path: Path, domain: str) -> None:
    """A finished dataset, or a folder with files of the domain."""
    from flows.api_data import find_files
    from flows.store import Dataset

    if (path / "zarr.json").is_file() or path.suffix == ".zarr":
        Dataset(path)
    else:
        find_files(path, load_domain(domain))
