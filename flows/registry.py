"""The model registry: reviewed models by name in MLflow, the champion by alias.

A model is a directory of safetensors and JSON. It is logged once as the artifacts of a run and
named by one version under each registered name (one network serves several domains); every
version carries the directory's digest as a tag, and the files are checked against it when the
model is resolved. Nothing is ever pickled.

    sashiko-ct   1  2  3        alias champion -> 3
                                tag sashiko.former-champions = [1, 2]: what rollback goes back to
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from domains.base import BadInputError
from flows.config import SHIPPED, STARTER, Home, config_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
MODEL_NAMES = {"ct": "sashiko-ct", "mri": "sashiko-mri", "city": "sashiko-city"}
EXPERIMENT = "sashiko-models"

_DIGEST = "sashiko.digest"
_FORMER = "sashiko.former-champions"
_METRIC = "metric."
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class ResolvedModel:
    """A model found: its directory, its digest as checked, its name and version ('' if none)."""

    path: Path
    digest: str
    name: str
    version: str


@dataclass(frozen=True)
class ModelRow:
    """One version of a registered model, as `sashiko models` shows it."""

    name: str
    version: str
    aliases: tuple[str, ...]
    digest: str
    created: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def register_model(
    path: Path,
    names: Sequence[str],
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Register a model directory under each of `names`; the same files never twice under one.

    Args:
        path: the model's directory.
        names: registered names, such as "sashiko-ct".
        run_id: the training run whose artifacts the directory becomes; a new run if None.
        tags: further tags of each version.
        metrics: figures to show beside each version.

    Returns:
        The version of each name, of before if it had this digest already.

    Raises:
        BadInputError: if the directory is not a whole model.
    """
    digest = _digest(path)
    client = _client()
    known = {v.name: v for v in _with_digest(client, digest)}
    source = next((str(v.source) for v in known.values()), None)
    all_tags = {_DIGEST: digest, **(tags or {})}
    all_tags |= {f"{_METRIC}{name}": repr(float(value)) for name, value in (metrics or {}).items()}
    versions: dict[str, str] = {}
    for name in names:
        if name not in known:
            if source is None:
                source, run_id = _log_files(client, path, digest, run_id)
            known[name] = _new_version(client, name, source, run_id, all_tags)
        versions[name] = str(known[name].version)
    return versions


def resolve_model(ref: str, domains: Iterable[str] = ()) -> ResolvedModel:
    """Find the model that `ref` names and check its files.

    Args:
        ref: "champion" (of `domains`; the starter while they have none), a shipped one
            ("starter"), a directory, "models:/NAME@ALIAS" or "models:/NAME/VERSION". An alias is
            followed once, here: a campaign keeps the version that it began with.
        domains: what the model is for.

    Raises:
        BadInputError: if there is no such model, its files differ from the registered digest, or
            the domains have different champions.
    """
    if ref == CHAMPION:
        return _champion_of(sorted(set(domains)))
    if ref.startswith("models:"):
        return _resolve_registered(ref)
    shipped = config_path("models", ref)
    path, name = (shipped, ref) if ref in SHIPPED else (Path(ref), Path(ref).resolve().name)
    return ResolvedModel(path=path, digest=_digest(path), name=name, version="")


def models() -> list[ModelRow]:
    """Every registered version, by name and then newest first."""
    client = _client()
    rows = []
    for model in client.search_registered_models():
        aliases: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        found = client.search_model_versions(f"name = '{model.name}'")
        versions = sorted(found, key=lambda v: -int(v.version))
        rows += [_row(v, tuple(sorted(aliases.get(str(v.version), ())))) for v in versions]
    return rows


def champion(name: str) -> str | None:
    """The version of `name` that is champion; None if there is none, or no such model."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = _client().get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return str(aliases[CHAMPION]) if CHAMPION in aliases else None


def promote(name: str, version: str | int) -> None:
    """Make a version the champion, and remember the one before it for `rollback`.

    The files are read and checked first: what cannot be loaded is not promoted.

    Raises:
        BadInputError: if there is no such version, or its files are not what was registered.
    """
    if not re.fullmatch(r"\d+", str(version)):
        raise BadInputError(
            f"'{version}' is no version of {name}: versions are numbers (see `sashiko models`)"
        )
    chosen = resolve_model(f"models:/{name}/{version}").version
    current = champion(name)
    if current == chosen:
        return
    client = _client()
    if current is not None:
        _set_former(client, name, [*_former(client, name), current])
    _crown(client, name, chosen)


def tag_version(name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version: facts about it, kept with it."""
    client = _client()
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)


def rollback(name: str) -> str:
    """Make the champion before the present one champion again; returns its version.

    Raises:
        BadInputError: if there is no champion before the present one.
    """
    client = _client()
    current = champion(name)
    if current is None:
        raise BadInputError(f"{name} has no champion to roll back: see `sashiko models`")
    former = [v for v in _former(client, name) if v != current]
    if not former:
        raise BadInputError(
            f"{name} has had no champion before version {current}: "
            "there is nothing to roll back to; `sashiko promote` can name another version"
        )
    resolve_model(f"models:/{name}/{former[-1]}")
    _crown(client, name, former[-1])
    _set_former(client, name, former[:-1])
    return former[-1]


def _client() -> MlflowClient:
    from flows.tracking import open_client

    return open_client()


def _digest(path: Path) -> str:
    from diffusion_core.model import model_digest

    if not path.is_dir():
        raise BadInputError(
            f"no model at {path}: give 'starter', a directory that `sashiko train` made, "
            "or models:/NAME@champion (see `sashiko models`)"
        )
    return model_digest(path)


def _champion_of(domains: Sequence[str]) -> ResolvedModel:
    """The one model that is champion of every domain, or the starter for those without one."""
    if not domains:
        raise BadInputError("no domain is named and so no champion: name a model with --model")
    uri = Home().tracking_uri
    # A store that nobody has made yet holds no champion, and to ask would make it.
    fresh = uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()
    found = []
    for domain in domains:
        name = MODEL_NAMES.get(domain, f"sashiko-{domain}")
        crowned = not fresh and champion(name) is not None
        if not crowned and domain not in MODEL_NAMES:  # the starter knows nothing of it
            raise BadInputError(
                f"the domain {domain} has no champion: name a model with --model, or promote "
                f"one that is registered as {name}"
            )
        found.append(resolve_model(f"models:/{name}@{CHAMPION}" if crowned else STARTER))
    if len({model.digest for model in found}) > 1:
        raise BadInputError(
            f"the domains {', '.join(domains)} have different champions: restore them one by one, "
            "or name a model with --model"
        )
    return found[0]


def _resolve_registered(ref: str) -> ResolvedModel:
    match = _URI.fullmatch(ref)
    if match is None:
        raise BadInputError(
            f"'{ref}' names no model: write models:/NAME@champion or models:/NAME/3"
        )
    version = _find_version(ref, **match.groupdict())
    path = _local_files(version)
    digest = _digest(path)
    if digest != version.tags.get(_DIGEST):
        raise BadInputError(
            f"the files of {version.name} version {version.version} at {path} are not those that "
            "were registered: their digest differs, so they are not loaded; register them anew"
        )
    return ResolvedModel(path, digest, version.name, str(version.version))


def _find_version(ref: str, name: str, version: str | None, alias: str | None) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    client = _client()
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        names = [m.name for m in client.search_registered_models()]
        if name in names:
            wanted = f"alias {alias}" if alias else f"version {version}"
            raise BadInputError(
                f"no model {ref}: {name} has no {wanted} (see `sashiko models`)"
            ) from error
        known = "registered are " + ", ".join(names) if names else "none is registered yet"
        raise BadInputError(f"no model {ref}: {known} (see `sashiko models`)") from error


def _local_files(version: ModelVersion) -> Path:
    """The directory of a version's files: where they lie, or a copy in the cache, fetched once."""
    from mlflow.artifacts import download_artifacts

    source = str(version.source)
    uri = Home().tracking_uri
    if source.startswith(("file:", "/")):
        return Path(download_artifacts(artifact_uri=source, tracking_uri=uri))
    kept = Home().cache / "models" / version.tags.get(_DIGEST, "unknown")
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept.parent, prefix=".fetching-") as draft:
            fetched = download_artifacts(artifact_uri=source, tracking_uri=uri, dst_path=draft)
            with suppress(OSError):  # another process was first
                Path(fetched).rename(kept)
    return kept


def _with_digest(client: MlflowClient, digest: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"tags.`{_DIGEST}` = '{digest}'"))


def _log_files(
    client: MlflowClient, path: Path, digest: str, run_id: str | None
) -> tuple[str, str]:
    """Log the directory as artifacts of a run; returns (artifact URI, run id)."""
    folder = f"model-{digest[:16]}"
    if run_id is None:
        run = client.create_run(_experiment(client), run_name=folder, tags={_DIGEST: digest})
        run_id = run.info.run_id
        client.log_artifacts(run_id, str(path), folder)
        client.set_terminated(run_id)
    else:
        client.log_artifacts(run_id, str(path), folder)
    return f"{client.get_run(run_id).info.artifact_uri}/{folder}", run_id


def _experiment(client: MlflowClient) -> str:
    """Id of the experiment that holds the models' files, beside the database if that is local."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    home = Home()
    local = home.mlflow_uri is None
    where = (home.home.resolve() / "mlflow-artifacts" / EXPERIMENT).as_uri() if local else None
    return client.create_experiment(EXPERIMENT, artifact_location=where)


def _new_version(
    client: MlflowClient, name: str, source: str, run_id: str | None, tags: Mapping[str, str]
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(name, source=source, run_id=run_id, tags=dict(tags))


def _row(version: ModelVersion, aliases: tuple[str, ...]) -> ModelRow:
    tags = version.tags
    return ModelRow(
        name=version.name,
        version=str(version.version),
        aliases=aliases,
        digest=tags.get(_DIGEST, ""),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(
            "T", "seconds"
        ),
        metrics={
            k.removeprefix(_METRIC): float(v) for k, v in tags.items() if k.startswith(_METRIC)
        },
    )


def _crown(client: MlflowClient, name: str, version: str) -> None:
    client.set_registered_model_alias(name, CHAMPION, version)
    now = datetime.now(UTC).isoformat("T", "seconds")
    client.set_model_version_tag(name, version, "sashiko.promoted", now)


def _former(client: MlflowClient, name: str) -> list[str]:
    """Former champions, oldest first; a crash may have left the present one at the end."""
    tags: dict[str, Any] = client.get_registered_model(name).tags
    return [str(v) for v in json.loads(tags.get(_FORMER, "[]"))]


def _set_former(client: MlflowClient, name: str, versions: Sequence[str]) -> None:
    client.set_registered_model_tag(name, _FORMER, json.dumps(list(versions)))
