"""The student: the local U-Net that is also shown what a measurement leaves open (distilled.py).

Its stem reads NUM_INPUTS further channels beside x and its detail. Their weights begin at zero, so
that a student begins as its teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_core.networks.local_unet import NUM_CHANNELS, LocalUNet
from diffusion_core.networks.precond import Preconditioned, pad_to_multiple

NUM_INPUTS = 1 + NUM_CHANNELS
"""How well each pixel is determined, and a draw of the start's error (posterior/distilled.py)."""
_STEM, _CELL = "network.stem.weight", 4
_BORDER_PX = 48
"""From the bottom and the right border, where a canvas does not divide by the network's stride;
the network's reach at most, as halos are that wide: tiles of these pixels see the border too."""


class StudentUNet(LocalUNet):
    """A local U-Net whose `x_detail` has `num_inputs` more channels; without them they are 0.

    Args:
        num_inputs: further channels.
        num_conditions: see LocalUNet, as the others.
        widths: at each resolution.
        depths: at each resolution.
        num_features: of the modulation.
    """

    def __init__(
        self,
        num_conditions: int,
        widths: Sequence[int] = (64, 96, 192),
        depths: Sequence[int] = (3, 2, 2),
        num_features: int = 128,
        num_inputs: int = NUM_INPUTS,
    ) -> None:
        super().__init__(num_conditions, widths, depths, num_features)
        self.config["num_inputs"] = num_inputs
        self.stem = nn.Conv2d(_CELL * (2 * NUM_CHANNELS + num_inputs), widths[0], 3, padding=1)

    def forward(
        self,
        x_scaled: Tensor,
        x_detail: Tensor,
        ln_sigma: Tensor,
        condition: Tensor,
        guide: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> Tensor:
        """F; see LocalUNet."""
        lacking = NUM_CHANNELS + self.config["num_inputs"] - x_detail.shape[1]
        shown = F.pad(x_detail, (0, 0, 0, 0, 0, lacking))
        return super().forward(x_scaled, shown, ln_sigma, condition, guide, missing)


def student_of(teacher: Preconditioned, num_inputs: int = NUM_INPUTS) -> Preconditioned:
    """A student with the weights of its teacher, which it equals until it is trained.

    The head u(sigma, condition) begins at 0: it weighs another loss than the teacher's.

    Args:
        teacher: stays as it is.
        num_inputs: further channels of the student.
    """
    network = StudentUNet(**teacher.network.config, num_inputs=num_inputs)
    student = Preconditioned(network, teacher.sigma_data)
    weights = {**teacher.state_dict(), **_head_of(student)}
    stem = weights[_STEM]
    extra = stem.new_zeros(stem.shape[0], _CELL * num_inputs, *stem.shape[2:])
    weights[_STEM] = torch.cat([stem, extra], dim=1)
    student.load_state_dict(weights)
    return student


def _head_of(student: Preconditioned) -> dict[str, Tensor]:
    return {n: v for n, v in student.state_dict().items() if n.startswith("log_variance.")}


class StudentDenoiser:
    """A protocols.Denoiser of images with a student's inputs beside them: (b, c + inputs, h, w).

    The inputs come back as they are behind the estimate: so tiles, halos and batches, which know
    images only, serve it too.
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

    def __call__(
        self, x: Float[Tensor, "b channels h w"], sigma: Float[Tensor, " b"]
    ) -> Float[Tensor, "b channels h w"]:
        """The estimate in place of the image, the inputs behind it; dtype and device of x.

        Raises:
            ValueError: if x has other channels than the image's and the inputs'.
        """
        count, c = x.shape[1], self._num_channels
        num_inputs = self._network.network.config["num_inputs"]
        if count != c + num_inputs:
            raise ValueError(
                f"a student of {c} channels takes {num_inputs} inputs beside them, not {count - c}"
            )
        image = F.pad(x[:, :c].float(), (0, 0, 0, 0, 0, NUM_CHANNELS - c))
        D_x = self._to_the_borders(torch.cat([image, x[:, c:].float()], dim=1), sigma.float())
        return torch.cat([D_x[:, :c].to(x.dtype), x[:, c:]], dim=1)

    def _to_the_borders(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of a canvas of any size, every border of it the border of a window.

        A student learned what its start has wrong at the borders of a canvas, and sees them by the
        convolutions' zeros there: what is padded to the network's stride hides the bottom and the
        right one. So a second window ends with the canvas and gives the pixels near to it.
        """
        for axis in (-2, -1):
            size, over = x.shape[axis], x.shape[axis] % self.stride
            if over == 0 or size < self.stride:
                continue
            near = min(_BORDER_PX, self.reach, size // 2)
            depth = -(-(near + self.reach) // self.stride) * self.stride
            depth = min(size - over, depth)
            first = self._to_the_borders(x.narrow(axis, 0, size - over), sigma)
            last = self._to_the_borders(x.narrow(axis, size - depth, depth), sigma)
            kept = first.narrow(axis, 0, size - near), last.narrow(axis, depth - near, near)
            return torch.cat(kept, dim=axis)
        h, w = x.shape[-2:]
        padded = pad_to_multiple(x, self.stride)
        index = torch.full((len(x),), self._condition, dtype=torch.long, device=x.device)
        D_x: Tensor = self._network(
            padded[:, :NUM_CHANNELS], sigma, index, inputs=padded[:, NUM_CHANNELS:]
        )
        return D_x[..., :h, :w]
