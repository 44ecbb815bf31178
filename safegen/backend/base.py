"""The seam between safegen and a host: what guarding and training need to know of one model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from safegen.backend.sites import Sites
from safegen.transport.encoding import TextReader

Input = Literal["image", "mask", "control", "ip_adapter"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the denoiser, as the host makes it.

    Attributes:
        states: Conditioning, [rows, tokens, width]: what the denoiser reads of the prompts.
        foreign: Whether it reads other conditioning too, which no gate understands (a reference image).
        timestep: The (first) timestep of the call, in the scheduler's own units; falls during a run.
        inputs: What else than words it draws from, as far as the call shows: `image`, `mask`, `control`, `ip_adapter`.
    """

    states: Tensor
    timestep: float
    foreign: bool = False
    inputs: tuple[Input, ...] = ()


class Backend(TextReader, Protocol):
    """One host, seen through what safegen needs of it."""

    @property
    def family(self) -> str:
        """Id of the base family ("sd1", "mini"): membranes of one family share sites and shapes."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The model that predicts the noise."""
        ...

    @property
    def sites(self) -> Sites:
        """The denoiser's sites."""
        ...

    @property
    def text_encoder(self) -> nn.Module:
        """The model that makes conditioning from token ids."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the text encoder was trained with; an id beyond them has no known meaning."""
        ...

    @property
    def parts(self) -> Mapping[str, Any]:
        """By name, the pipeline's parts that this backend was made for: another one in their place is not guarded."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents that the denoiser was made for."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Calls the denoiser, without guidance.

        Args:
            x_t: Noisy latents, [rows, channels, h, w].
            t: Timesteps, [rows].
            states: Conditioning, [rows, tokens, width].

        Returns:
            Its prediction (eps, for a model that predicts the noise), [rows, channels, h, w].
        """
        ...

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Reads the arguments of a call of the denoiser.

        Raises:
            UnsupportedBackendError: The call carries no conditioning that safegen can read.
        """
        ...
