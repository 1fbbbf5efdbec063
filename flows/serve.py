"""`sashiko serve`: a persistent Prefect server, our flows on it as typed forms, nightly by cron.

With PREFECT_API_URL the flows are registered on that server; else one is started here, on
loopback, with its database under the home folder, and stopped when this command stops. The
schedule needs no catch-up: a nightly run takes whatever the inbox holds that is not restored yet,
and at most one of them runs at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from domains.base import BadInputError
from flows.config import Home, NightlySettings, ServeSettings
from flows.launch import set_prefect_home
from flows.prefect_server import healthy, start, stop, wait_until_healthy

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

HEARTBEAT_S = 120
ZOMBIE_S = 600  # several heartbeats missed: 540 s is the least that the server tells apart reliably
ZOMBIE_NAME = "sashiko: crash runs whose process is gone"
_END_STATES = ("Completed", "Failed", "Cancelled", "Crashed")


def serve(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Args:
        settings: where, and when the nightly run is.
        say: takes one line a step.

    Raises:
        BadInputError: if PREFECT_API_URL names a server that does not answer.
    """
    set_prefect_home()
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_S))
    with _server(settings, say) as api_url:
        # Prefect reads this at import: not before here.
        os.environ["PREFECT_API_URL"] = api_url
        from prefect import serve as serve_flows

        flows = deployments(settings)
        end_zombies()
        say(f"flows: {', '.join(d.flow_name or d.name for d in flows)}")
        say(f"nightly at '{settings.cron}' ({settings.timezone}) from {_nightly(settings).inbox}")
        say(f"forms and runs: {api_url.removesuffix('/api')}  (Ctrl-C stops)")
        with suppress(KeyboardInterrupt):
            serve_flows(*flows, print_starting_message=False, pause_on_shutdown=False)


def deployments(settings: ServeSettings) -> list[RunnerDeployment]:
    """Every flow as a deployment, whose settings are a typed form; nightly has a schedule."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.evaluate import evaluate_flow
    from flows.ingest import ingest_flow
    from flows.nightly import nightly_flow
    from flows.restore import restore_flow
    from flows.review import review_flow
    from flows.train import train_flow

    by_hand = (ingest_flow, train_flow, evaluate_flow, restore_flow, review_flow)
    made: list[Any] = [
        flow.to_deployment("sashiko", entrypoint_type=EntrypointType.MODULE_PATH)
        for flow in by_hand
    ]
    night: Any = nightly_flow.to_deployment(
        "sashiko",
        entrypoint_type=EntrypointType.MODULE_PATH,
        parameters={"settings": _nightly(settings).model_dump(mode="json")},
        schedule=Cron(settings.cron, timezone=settings.timezone),
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
        ),
    )
    return [*made, night]


def end_zombies() -> None:
    """Make the server mark runs as crashed whose heartbeat stopped; kill -9 leaves them Running."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ended = {f"prefect.flow-run.{state}" for state in _END_STATES}
    gone = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ended},
        match={"prefect.resource.id": ["prefect.flow-run.*"]},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=ZOMBIE_S),
    )
    crash = ChangeFlowRunState(
        state=StateType.CRASHED,
        name="Crashed",
        message="its process sends no heartbeat any more",
        force=False,
    )
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(ZOMBIE_NAME):
            client.create_automation(
                AutomationCore(name=ZOMBIE_NAME, description="", trigger=gone, actions=[crash])
            )


def _nightly(settings: ServeSettings) -> NightlySettings:
    home = Home().home.resolve()
    return NightlySettings(
        inbox=(settings.inbox or home / "inbox").resolve(),
        output=(settings.output or home / "outbox").resolve(),
        model=settings.model,
    )


@contextmanager
def _server(settings: ServeSettings, say: Callable[[str], None]) -> Iterator[str]:
    """The API address of a server: the configured one, one that runs here, or a new one."""
    configured = os.environ.get("PREFECT_API_URL")
    here = f"http://{settings.host}:{settings.port}/api"
    if configured:
        if not healthy(configured):
            raise BadInputError(
                f"no Prefect server answers at {configured} (PREFECT_API_URL): "
                "start it, or unset the variable to have one started here"
            )
        yield configured
    elif healthy(here):
        say(f"a Prefect server runs at {here} already: using it")
        yield here
    else:
        say("starting a Prefect server (15 to 30 s)")
        command = [sys.executable, "-m", "prefect", "server", "start"]
        command += ["--host", settings.host, "--port", str(settings.port)]
        log = Home().home / "prefect" / "server.log"
        process = start(command, log)
        try:
            wait_until_healthy(here, process, log)
            yield here
        finally:
            stop(process)
