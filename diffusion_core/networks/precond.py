"""F inside EDM's preconditioner: D(x; sigma) = c_skip x + c_out F(c_in x; ln sigma, condition)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_core.networks.local_unet import (
    NUM_CHANNELS,
    LocalUNet,
    effective_sigma,
    filled,
    local_detail,
    stem_of,
)
from diffusion_core.protocols import Denoiser, Sigma, Signal

_CONDITION_WEIGHTS = "network.features.hidden.weight"
"""Its last columns belong to the conditions, one each."""
_GUIDE_WEIGHTS = "network.guide_stem."
STEM = "network.stem.weight"


class Preconditioned(nn.Module):
    """The denoiser network over three padded channels, and its uncertainty head for training.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1; the log-variance head u(sigma) is
    that of Karras et al. 2024 (arXiv:2312.02696), section 2, with the condition added.
    """

    def __init__(self, network: LocalUNet, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.log_variance = nn.Linear(network.config["num_features"], 1)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.zeros_(self.log_variance.bias)

    def forward(
        self,
        x: Float[Tensor, "b 3 h w"],
        sigma: Float[Tensor, " b"],
        condition: Int[Tensor, " b"],
        *,
        inputs: Float[Tensor, "b inputs h w"] | None = None,
        guide: Float[Tensor, "b guides h w"] | None = None,
        missing: Float[Tensor, "b 3 h w"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """D(x; sigma) in float32, whatever precision F computes in; h, w divide by the stride.

        Args:
            x: noisy images.
            sigma: their noise.
            condition: index of each image's condition.
            inputs: what a student is shown besides (student.py).
            guide: another image of the same thing, on [-1, 1], about, NaN where it is not given.
            missing: 1 where x holds nothing, for networks that are told of it; the estimate is of
                the whole image then, from the other pixels.
        """
        s = sigma[:, None, None, None]
        c_in = (s**2 + self.sigma_data**2).rsqrt()
        if missing is not None:
            x, s = filled(x, missing), effective_sigma(sigma, missing)
        norm = s**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / norm
        c_out = s * self.sigma_data / norm.sqrt()
        dtype = next(self.network.parameters()).dtype
        detail = local_detail(x, sigma)
        shown = detail if inputs is None else torch.cat([detail, inputs], dim=1)
        F_x = self.network(
            (c_in * x).to(dtype),
            shown.to(dtype),
            sigma.log().to(dtype),
            condition,
            None if guide is None else guide.to(dtype),
            None if missing is None else missing.to(dtype),
        )
        D_x: Tensor = c_skip * x + c_out * F_x.to(x.dtype)
        return D_x

    def begin_from(self, other: Preconditioned, conditions: Sequence[int]) -> None:
        """Take over the weights of a network that differs in its conditions and guides at most.

        Where it knows no guides, ours begin without an influence.

        One of the two may be told of missing pixels and the other not.

        Args:
            other: same widths, depths and features; the same guides, or none.
            conditions: for each of our conditions the index of the one in `other` to begin as.
        """
        weights = {**self._of_guides(), **other.state_dict()}
        before = weights[_CONDITION_WEIGHTS]
        num_phases = before.shape[1] - other.network.features.num_conditions
        chosen = [num_phases + index for index in conditions]
        weights[_CONDITION_WEIGHTS] = before[:, [*range(num_phases), *chosen]]
        sees_missing = "sees_missing" in self.network.config
        if sees_missing != ("sees_missing" in other.network.config):
            weights[STEM] = stem_of(weights[STEM], sees_missing=sees_missing)
        self.load_state_dict(weights)

    def _of_guides(self) -> dict[str, Tensor]:
        """The weights that a network without guides lacks."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(_GUIDE_WEIGHTS)}

    def uncertainty(self, sigma: Tensor, condition: Tensor) -> Float[Tensor, " b"]:
        """u(sigma, condition): the learned log of the expected weighted loss."""
        features = self.network.features(sigma.log(), condition)
        return self.log_variance(features.detach()).squeeze(1)


class ConditionedDenoiser:
    """A protocols.Denoiser: one condition of the network, any image size, c channels.

    Pads the channels to three with zeros and the canvas to the network's stride by reflection at
    the far edges, so that pixel (0, 0) keeps its phase, and crops again.
    """

    def __init__(self, network: Preconditioned, condition: int, num_channels: int) -> None:
        self._network = network
        self._condition = condition
        self._num_channels = num_channels

    @property
    def stride(self) -> int:
        """Total stride of the network in pixels."""
        return self._network.network.stride

    @property
    def reach(self) -> int:
        """Radius in pixels of the window an output pixel depends on."""
        return self._network.network.reach

    def __call__(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"]) -> Tensor:
        """D(x; sigma); shape, dtype and device of x.

        Raises:
            ValueError: if x does not have the condition's number of channels.
        """
        return self._denoised(x, sigma, None)

    def _denoised(self, x: Tensor, sigma: Tensor, guide: Tensor | None) -> Tensor:
        b, c, h, w = x.shape
        if c != self._num_channels:
            raise ValueError(f"this condition has {self._num_channels} channels, x has {c}")
        padded = F.pad(x.float(), (0, 0, 0, 0, 0, NUM_CHANNELS - c))
        padded = pad_to_multiple(padded, self.stride)
        index = torch.full((b,), self._condition, dtype=torch.long, device=x.device)
        if guide is not None:
            guide = pad_to_multiple(guide.float(), self.stride)
        D_x = self._network(padded, sigma.float(), index, guide=guide)
        return D_x[:, :c, :h, :w].to(x.dtype)


class CarryingDenoiser(ConditionedDenoiser):
    """D of images that carry their guides as further channels; gives back those as they came.

    (b c+g h w) in and out: what cuts an image into tiles, or puts several into a batch, does the
    same to its guides, and knows nothing of them.
    """

    @property
    def num_guides(self) -> int:
        """Channels that are guides, the last ones."""
        return self._network.network.num_guides

    def __call__(self, x: Float[Tensor, "b c_g h w"], sigma: Float[Tensor, " b"]) -> Tensor:
        """D(x; sigma, guides) and the guides, which are NaN where they are not given.

        Raises:
            ValueError: if x does not have the condition's channels and all guides.
        """
        image, guide = x.tensor_split([x.shape[1] - self.num_guides], dim=1)
        return torch.cat([self._denoised(image, sigma, guide), guide], dim=1)


def guided(carrying: Denoiser, guide: Float[Tensor, "b g h w"]) -> Denoiser:
    """The denoiser of bare images by one that takes them with their guides.

    Args:
        carrying: CarryingDenoiser, or what tiles or batches one.
        guide: of the batch that the denoiser will be called on, in its order; of one image it
            serves any batch.
    """

    def call(x: Signal, sigma: Sigma) -> Signal:
        shown = guide.to(x).expand(len(x), *guide.shape[1:])
        return carrying(torch.cat([x, shown], dim=1), sigma)[:, : x.shape[1]]

    return call


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Grow the bottom and right edges by reflection until h and w divide by `multiple`."""
    h, w = x.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    if bottom == right == 0:
        return x
    mode = "reflect" if bottom < h and right < w else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def to_channels_last(module: nn.Module) -> None:
    """Lay out convolution weights channels-last, in place: about twice as fast in bfloat16."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
