"""The seam between safegen and a host: what guarding and training need to know of one model family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from safegen.backend.sites import Sites
from safegen.transport.encoding import TextReader

Input = Literal["image", "mask", "control", "ip_adapter"]
IMAGE: tuple[Input, ...] = ("image",)


@dataclass(frozen=True, slots=True)
class Strand:
    """What one text encoder contributes to conditioning.

    Attributes:
        encoder: Name of the text encoder, a key of `Backend.text_encoders`.
        rows: [rows, tokens, width], exactly as the encoder made it; a pooled vector is one token. Rows that are all 0
            say nothing (encoders left out, an unconditional row that was zeroed).
    """

    encoder: str
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the denoiser, as the host makes it.

    Attributes:
        states: Conditioning, [rows, tokens, width]: what the gate scores of the prompts.
        timestep: The (first) timestep of the call; falls during a run, whatever the scheduler's own sign.
        strands: All that the denoiser reads of texts, by encoder: a row's words are known where each strand's are.
        tensors: Those that say all this, as the host passed them; what stays the same in these stays the same.
        foreign: Whether it reads other conditioning too, which no gate understands (a reference image).
        inputs: What else than words it draws from, as far as the call shows: `image`, `mask`, `control`, `ip_adapter`.
    """

    states: Tensor
    timestep: float
    strands: tuple[Strand, ...]
    tensors: tuple[Tensor, ...]
    foreign: bool = False
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a family can do beside being guarded.

    Attributes:
        trains: Whether `safegen.training.Trainer` takes it: its noise schedule is one of variances (eps or v), and
            `encode` returns all that the denoiser reads.
        negatives: Whether it is known which rows are negative prompts, so that they open nothing; elsewhere every row
            is judged by its own words.
        calls: Calls of the denoiser in one step, at most: 2 where prompt and negative prompt come one after the other.
    """

    trains: bool
    negatives: bool
    calls: int = 1


class Backend(TextReader, Protocol):
    """One host, seen through what safegen needs of it."""

    @property
    def family(self) -> str:
        """Id of the base family ("sd1", "mini"): membranes of one family share sites and shapes."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What the family can do."""
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
        """The model that makes what the gate scores from token ids."""
        ...

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """All models that make conditioning, by name; the one that the gate reads first."""
        ...

    @property
    def parts(self) -> Mapping[str, Any]:
        """By name, the pipeline's parts that this backend was made for: another one in their place is not guarded."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, (frames,) height and width of the latents that `predict` takes."""
        ...

    def known(self, encoder: str, ids: Sequence[int]) -> bool:
        """Tells whether a text encoder was trained with all of these ids; another one has no known meaning."""
        ...

    def spelled(self, encoder: str, ids: Sequence[int]) -> str:
        """Returns the text that a row of a text encoder's ids stands for."""
        ...

    def wrote(self, text: str, ids: Sequence[int]) -> bool:
        """Tells whether a row of ids that the gate reads is this text, whole or cut at the window."""
        ...

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """Yields what the pipeline may take from a text encoder's output, each [n, tokens, width].

        Args:
            encoder: Name of the text encoder.
            given: Its arguments by name.
            output: What it returned.
        """
        ...

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """Returns the prompts and the negative prompts in what the pipeline's `encode_prompt` returned."""
        ...

    def condition(self, texts: Sequence[str]) -> Tensor:
        """Returns all that the denoiser reads of texts, packed as [n, tokens, width] for `predict`."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Calls the denoiser, without guidance.

        Args:
            x_t: Noisy latents, [rows, *latent_shape].
            t: Timesteps in the scheduler's own units, [rows].
            states: Conditioning, from `condition`.

        Returns:
            Its prediction, shaped as `x_t`: eps, v or a velocity, as the scheduler's configuration says.
        """
        ...

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Reads the arguments of a call of the denoiser.

        Raises:
            UnsupportedBackendError: The call carries no conditioning that safegen can read.
        """
        ...
