"""MLflow, kept quiet and kept out of the way: runs, metrics, pictures and files.

A run is a list of *entries* (params, tags, metrics, files, end). While MLflow answers, each entry
is sent as it is made. When it does not answer, at the start or in mid-run, the entries go to a
JSONL file under `HOME/mlflow-spool/` with a warning, and the next run that finds MLflow sends
them. So losing MLflow never loses a result and never fails the work that is being tracked.

    HOME/mlflow.db                 the default store (sqlite); SASHIKO_MLFLOW_URI names another
    HOME/mlflow-artifacts/         pictures and files of the default store
    HOME/mlflow-spool/RUN.jsonl    entries not sent yet; RUN.open: written by a live (or killed) run
    HOME/mlflow-spool/RUN/         the files those entries name

Nothing of this leaves the machine but to the store that was configured: MLflow's own telemetry
is off (flows.quiet).
Importing this module imports no MLflow; that takes seconds and happens on first use.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from flows.config import Home

if TYPE_CHECKING:
    import numpy as np
    from mlflow.tracking import MlflowClient

Entry = dict[str, Any]

_LOG = logging.getLogger(__name__)
_PATIENCE = {
    # The defaults (7 retries, doubling from 2 s, of 120 s each) would hold work up for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_TIMEOUT_S = 3.0
_MAX_PARAM_CHARS = 6000
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # of one log_batch call


class TrackingUnavailableError(RuntimeError):
    """The tracking store cannot be reached or opened."""


def open_client(home: Home | None = None) -> MlflowClient:
    """Connect to the configured tracking store, silently.

    The first use of an sqlite store creates its tables, which takes a few seconds.

    Args:
        home: where things are kept; default: the environment's.
    Returns:
        A client bound to the store; no global state of MLflow is changed.
    Raises:
        TrackingUnavailableError: if the store does not answer or cannot be opened.
    """
    home = home or Home()
    uri = home.tracking_uri
    _probe(uri)
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            # mlflow 3.17 uses options that SQLAlchemy 2.1 deprecates; the reader can do nothing.
            warnings.simplefilter("ignore")
            from mlflow.tracking import MlflowClient

            for noisy in ("mlflow", "alembic"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            if uri.startswith("sqlite:"):
                home.home.mkdir(parents=True, exist_ok=True)
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except Exception as error:
        raise TrackingUnavailableError(_first_line(error)) from error


@contextmanager
def track_run(
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    home: Home | None = None,
) -> Iterator[TrackedRun]:
    """Track one run; its failures to reach MLflow are spooled, never raised.

    Args:
        experiment: name of the experiment, made if it is missing.
        name: the run's display name.
        params: settings of the run; values are cut at 6000 characters.
        tags: labels of the run. Neither may hold a file path or a person's name.
        home: where things are kept; default: the environment's.
    Yields:
        The run, to log to. It ends FINISHED, FAILED (an exception passes) or KILLED (Ctrl-C).
    """
    home = home or Home()
    run = TrackedRun(home, experiment, name)
    run.set_tags({"mlflow.source.name": "sashiko", **(tags or {})})
    run.log_params(params or {})
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


class TrackedRun:
    """One run being tracked. Every method returns at once and raises nothing about MLflow."""

    def __init__(self, home: Home, experiment: str, name: str) -> None:
        self._home = home
        self._start: Entry = {
            "kind": "run",
            "experiment": experiment,
            "name": name,
            "run_id": None,
            "time_ms": _now_ms(),
        }
        self._sink: _Sink = self._open()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while it is only spooled."""
        return self._start["run_id"]

    @property
    def spool_path(self) -> Path | None:
        """The JSONL file that the entries go to; None while MLflow answers."""
        return self._sink.path if isinstance(self._sink, _Spool) else None

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set labels of the run."""
        self._write({"kind": "tags", "values": {k: str(v) for k, v in tags.items()}})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings of the run."""
        values = {_key(k): str(v)[:_MAX_PARAM_CHARS] for k, v in params.items()}
        self._write({"kind": "params", "values": values})

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log numbers of one step, in one batch; None is left out."""
        values = {_key(k): float(v) for k, v in metrics.items() if v is not None}
        self._write({"kind": "metrics", "values": values, "step": step, "time_ms": _now_ms()})

    def log_picture(self, name: str, pixels: np.ndarray[Any, Any]) -> None:
        """Log a picture.

        Args:
            name: artifact path ending in .png, "pictures/ct-sparse60.png".
            pixels: uint8, (h, w) or (h, w, 3).
        """
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            Image.fromarray(pixels).save(path)
            self.log_file(path, str(Path(name).parent))

    def log_json(self, name: str, value: Any) -> None:
        """Log a JSON-able value as the artifact `name`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_text(json.dumps(value, indent=1))
            self.log_file(path, str(Path(name).parent))

    def log_file(self, path: Path, folder: str = ".") -> None:
        """Log a file as the artifact folder/NAME."""
        self._write({"kind": "file", "path": str(path), "folder": folder})

    def end(self, status: str) -> None:
        """End the run; entries spooled by earlier runs are sent if MLflow answers."""
        self._write({"kind": "end", "status": status, "time_ms": _now_ms()})
        if isinstance(self._sink, _Spool):
            self._sink.close()
        if isinstance(self._sink, _Mlflow):
            send_spooled(self._home)

    def _open(self) -> _Sink:
        try:
            sink = _Mlflow(open_client(self._home), self._home, self._start)
        except Exception as error:
            return self._spool(error)
        self._start["run_id"] = sink.run_id
        return sink

    def _write(self, entry: Entry) -> None:
        try:
            self._sink.write(entry)
        except Exception as error:
            if isinstance(self._sink, _Mlflow):
                self._sink = self._spool(error)
                self._write(entry)
                return
            _LOG.warning("a tracking entry is lost: %s", _first_line(error))

    def _spool(self, error: Exception) -> _Sink:
        try:
            spool = _Spool(_spool_folder(self._home), self._start)
        except OSError as full:
            _LOG.warning("neither MLflow nor a spool file can be written: %s", _first_line(full))
            return _Nowhere()
        _LOG.warning(
            "MLflow at %s cannot be used (%s): the work goes on, and what would be logged is kept"
            " in %s until a later run finds MLflow",
            _public(self._home.tracking_uri),
            _first_line(error),
            spool.path.with_suffix(".jsonl"),
        )
        return spool


def send_spooled(home: Home | None = None) -> int:
    """Send what earlier runs could not; returns how many runs were sent.

    Each file is claimed by renaming it, so two processes never send one run twice. A run that
    fails half-way is put back and, next time, sent anew as a run of its own.
    """
    home = home or Home()
    waiting = sorted(_spool_folder(home).glob("*.jsonl"))
    if not waiting:
        return 0
    try:
        client = open_client(home)
    except TrackingUnavailableError:
        return 0
    return sum(_send_one(client, home, path) for path in waiting)


class _Sink(Protocol):
    """Where the entries of a run go."""

    def write(self, entry: Entry) -> None: ...


class _Mlflow:
    """Entries as calls of MLflow."""

    def __init__(self, client: MlflowClient, home: Home, start: Entry) -> None:
        self._client = client
        self.run_id = start["run_id"] or _create_run(client, home, start)

    def write(self, entry: Entry) -> None:
        """Send one entry."""
        getattr(self, f"_{entry['kind']}")(entry)

    def _tags(self, entry: Entry) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(k, v) for k, v in entry["values"].items()]
        for part in _batches(tags, _MAX_PARAMS):
            self._client.log_batch(self.run_id, tags=part)

    def _params(self, entry: Entry) -> None:
        from mlflow.entities import Param

        params = [Param(k, v) for k, v in entry["values"].items()]
        for part in _batches(params, _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=part)

    def _metrics(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        when, step = entry["time_ms"], entry["step"]
        metrics = [Metric(k, v, when, step) for k, v in entry["values"].items()]
        for part in _batches(metrics, _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=part)

    def _file(self, entry: Entry) -> None:
        folder = None if entry["folder"] == "." else entry["folder"]
        self._client.log_artifact(self.run_id, entry["path"], folder)

    def _end(self, entry: Entry) -> None:
        self._client.set_terminated(self.run_id, entry["status"], entry["time_ms"])


class _Spool:
    """Entries as lines of JSON; files are copied beside them."""

    def __init__(self, folder: Path, start: Entry) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self.path = folder / f"{stamp}-{uuid.uuid4().hex[:8]}.open"
        folder.mkdir(parents=True, exist_ok=True)
        self._num_files = 0
        self.write(start)

    def write(self, entry: Entry) -> None:
        """Append one entry."""
        if entry["kind"] == "file":
            entry = {**entry, "path": self._keep(Path(entry["path"]))}
        with self.path.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Mark the run as complete, ready to be sent."""
        self.path.rename(self.path.with_suffix(".jsonl"))

    def _keep(self, source: Path) -> str:
        """Copy a file beside the entries; returns its path relative to the spool's folder."""
        self._num_files += 1
        target = self.path.with_suffix("") / str(self._num_files) / source.name
        target.parent.mkdir(parents=True)
        shutil.copyfile(source, target)
        return str(target.relative_to(self.path.parent))


class _Nowhere:
    """Where entries go when the disk takes no spool either: the work itself goes on."""

    def write(self, entry: Entry) -> None:
        """Drop one entry; the loss was told when this sink was chosen."""


def _send_one(client: MlflowClient, home: Home, path: Path) -> bool:
    """Send one spooled run and remove it; False if another process has it, or MLflow fails."""
    claimed = path.with_suffix(f".sending-{os.getpid()}")
    try:
        path.rename(claimed)
    except FileNotFoundError:
        return False
    try:
        start, *entries = [json.loads(line) for line in claimed.read_text().splitlines()]
        sink = _Mlflow(client, home, start)
        for entry in entries:
            if entry["kind"] == "file":
                entry["path"] = str(path.parent / entry["path"])
            sink.write(entry)
    except Exception as error:
        claimed.rename(path)
        _LOG.warning("the spooled run %s could not be sent: %s", path.name, _first_line(error))
        return False
    claimed.unlink()
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    return True


def _create_run(client: MlflowClient, home: Home, start: Entry) -> str:
    """Make the run of a start entry, and its experiment if need be; returns its id."""
    experiment_id = _experiment_id(client, home, start["experiment"])
    run = client.create_run(experiment_id, start_time=start["time_ms"], run_name=start["name"])
    return str(run.info.run_id)


def _experiment_id(client: MlflowClient, home: Home, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    local = home.mlflow_uri is None
    folder = home.home.resolve() / "mlflow-artifacts" / re.sub(r"[^\w.-]", "-", name)
    try:
        return str(client.create_experiment(name, folder.as_uri() if local else None))
    except Exception:
        # Another process may have made it since we asked.
        known = client.get_experiment_by_name(name)
        if known is None:
            raise
        return str(known.experiment_id)


def _probe(uri: str) -> None:
    """Raise TrackingUnavailableError within seconds if the host of `uri` does not listen."""
    parts = urlsplit(uri)
    port = parts.port or _PORTS.get(parts.scheme.split("+")[0])
    if not parts.hostname or port is None:
        return
    try:
        socket.create_connection((parts.hostname, port), _PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise TrackingUnavailableError(f"no answer: {error}") from error


def _public(uri: str) -> str:
    """The address without its user name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _spool_folder(home: Home) -> Path:
    return home.home / "mlflow-spool"


def _key(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return re.sub(r"[^\w./: -]", "_", str(name))[:250]


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _now_ms() -> int:
    return int(time.time() * 1000)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
