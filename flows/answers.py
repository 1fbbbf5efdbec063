"""What the commands answer, in words for people; --json has it for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flows.console import duration, size, table

if TYPE_CHECKING:
    from flows.api_restore import RestoreResult
    from flows.engine.plan import Plan
    from flows.registry import ModelRow


def plan_text(plan: Plan) -> str:
    """What a plan would do, for people."""
    rows = [[i.item_id, i.task, i.method.name, i.num_blocks, i.cost.seconds] for i in plan.items]
    total = (
        f"{len(plan.items)} items, {plan.num_blocks} blocks, {plan.num_workers} workers: about "
        f"{duration(plan.predicted_seconds)}, {size(plan.predicted_peak_bytes)} of memory, "
        f"{size(plan.predicted_bytes)} written"
    )
    return f"{table(['item', 'task', 'method', 'blocks', 's a block'], rows)}\n{total}"


def restored_text(result: RestoreResult) -> str:
    """What was restored and where it is, for people."""
    bad = [f"quarantined: {q.source or q.item_id}: {q.reason}" for q in result.quarantined]
    before = f", {result.num_reused} of them before" if result.num_reused else ""
    files = f"; files in {result.output / 'files'}" if result.files else ""
    return "\n".join(
        [*bad, f"restored: {len(result.published)} items{before}, in {result.output}{files}"]
    )


def models_text(models: Sequence[ModelRow]) -> str:
    """The registered models as a table."""
    if not models:
        return "no model is registered yet"
    rows = [
        [m.name, m.version, " ".join(m.aliases), m.digest[:12], m.created, _figures(m.metrics)]
        for m in models
    ]
    return table(["name", "version", "alias", "digest", "created", "figures"], rows)


def _figures(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.2f}" for name, value in metrics.items())
