"""`sashiko distill`: a teacher's network becomes one that restores in one to four evaluations.

It is a training (api_train.py) with another objective, of measured patches: the same run folder,
checkpoints, Ray workers and MLflow. What it leaves is a model directory that the method
`distilled` restores with (diffusion_core/posterior/distilled.py), with the teacher's tables.
"""

from __future__ import annotations

import json
from typing import Any

from domains.base import BadInputError
from flows.api_train import OnEvent, TrainResult, resolved, train
from flows.config import DistillSettings


def distill(settings: DistillSettings, on_event: OnEvent | None = None) -> TrainResult:
    """Distil a model, or go on where a killed run of the same name was.

    Args:
        settings: see DistillSettings.
        on_event: told of progress.

    Returns:
        The finished model. Its metrics are PSNR in dB on validation crops by condition, kind of
        operator and evaluations; 0 is the start.

    Raises:
        BadInputError: as train, and if the teacher or an operator cannot be used.
    """
    from flows.training.distilling import check_operators

    network = _network_of_teacher(settings)
    settings = settings.model_copy(update={"network": network})
    check_operators(settings)
    return train(settings, on_event)


def _network_of_teacher(settings: DistillSettings) -> dict[str, Any]:
    """The network of the settings, or else the teacher's.

    Raises:
        BadInputError: if there is no teacher with the tables that data steps need.
    """
    from diffusion_core.model import CONFIG, BadModelError, model_digest

    teacher = resolved(settings).init_from
    if teacher is None:
        raise BadInputError(
            "the setting 'init_from' names no teacher: its covariance tables are needed; name a "
            "model directory, or starter"
        )
    try:
        model_digest(teacher)
    except (BadModelError, OSError) as error:
        raise BadInputError(f"the setting 'init_from' names no teacher: {error}") from error
    config = json.loads((teacher / CONFIG).read_text())
    lacking = [
        c for c in settings.conditions if not (teacher / f"covariance-{c}.safetensors").is_file()
    ]
    if lacking:
        raise BadInputError(
            f"{teacher} has no covariance table for '{lacking[0]}': leave out the condition, or "
            "train it with validation images"
        )
    added = {"num_conditions", "num_inputs"}  # by the conditions, and by being a student
    own = {name: value for name, value in config["network"].items() if name not in added}
    return settings.network or own
