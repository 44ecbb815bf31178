"""What the families of diffusers have in common; each family says the rest in a file of its own."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines import ModularPipeline
from torch import Tensor, nn

from safegen.backend.base import Call, Capabilities, Input, Strand
from safegen.backend.sites import Sites, find_sites
from safegen.backend.words import Words
from safegen.errors import UnsupportedBackendError
from safegen.transport.encoding import Token, weights_digest

_GUIDER_CALLS = 4  # at most, in one step


class Family(ABC):
    """One pipeline of diffusers.

    Attributes:
        stem: What the ids of its base families begin with.
        looked_for: The parts by which the family is told, for the message about an object that is of none.
        blocks: Classes of the denoiser's transformer blocks, which hold the sites.
        capabilities: See `Backend`.
        slot: Name of the pipeline's denoiser.
        batch: Rows that a text encoder is given at once.
        modular: Whether modular pipelines of the family are guarded too.
        channels: What its denoisers read of pictures beside the latents, by how many channels they take more than they
            return.
    """

    stem: ClassVar[str]
    looked_for: ClassVar[str]
    blocks: tuple[type[nn.Module], ...]
    capabilities: Capabilities
    slot: ClassVar[str] = "transformer"
    batch: ClassVar[int] = 64
    modular: ClassVar[bool] = False
    channels: ClassVar[Mapping[int, tuple[Input, ...]]] = {}

    def __init__(self, pipe: Any) -> None:
        """Takes a pipeline for which `detect` holds, with the parts that it has now.

        Raises:
            UnsupportedBackendError: A pipeline of the family that cannot be guarded; says why.
            NoMatchingSiteError: Its denoiser has no sites.
        """
        self.refuse(pipe)
        if isinstance(pipe, ModularPipeline):
            self._take_modular(pipe)
        self.pipe = pipe
        self.denoiser: Any = getattr(pipe, self.slot)
        self.readers: dict[str, Words] = self.read_by(pipe)
        self.text_encoders: dict[str, nn.Module] = {name: getattr(pipe, name) for name in self.readers}
        self.reader: Words = next(iter(self.readers.values()))
        self.window, self.vocabulary = self.reader.window, self.reader.vocabulary
        self.parts: dict[str, Any] = {name: getattr(pipe, name, None) for name in self._guarded(pipe)}
        self.sites: Sites = find_sites(self.denoiser, self.blocks)
        self.family: str = self.name()
        self._fingerprint: str | None = None
        self._arguments = tuple(inspect.signature(type(self.denoiser).forward).parameters)[1:]

    @staticmethod
    @abstractmethod
    def detect(pipe: Any) -> bool:
        """Tells whether this is a pipeline of the family."""

    @abstractmethod
    def read_by(self, pipe: Any) -> dict[str, Words]:
        """Returns the words of each text encoder by its name; the one that the gate reads first."""

    @abstractmethod
    def encode(self, ids: Tensor) -> Tensor:
        """See `TextReader`."""

    @abstractmethod
    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""

    @abstractmethod
    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""

    @abstractmethod
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""

    def name(self) -> str:
        """Returns the id of the base family: a published one's, or one of its own for each architecture."""
        return self.published() or f"{self.stem}-{self.sites.architecture[:8]}"

    def published(self) -> str | None:
        """Returns the id of the published models whose shape this denoiser has; by default none is told apart."""
        return None

    def refuse(self, pipe: Any) -> None:  # noqa: B027 - most families refuse nothing
        """Refuses a pipeline of the family that would not be guarded whole; by default none.

        Raises:
            UnsupportedBackendError: Says what cannot be guarded.
        """

    def _take_modular(self, pipe: Any) -> None:
        """Takes a modular pipeline, whose guiders call the denoiser once for each branch of guidance.

        Raises:
            UnsupportedBackendError: Modular pipelines of this family are not guarded.
        """
        if not self.modular:
            raise UnsupportedBackendError(
                f"{type(pipe).__name__}: modular pipelines of this family are not guarded, because what their blocks "
                "do between text encoder and denoiser has not been proved; expected its DiffusionPipeline"
            )
        self.capabilities = replace(self.capabilities, negatives=False, calls=_GUIDER_CALLS)

    def condition(self, texts: Sequence[str]) -> Tensor:
        """See `Backend`."""
        return self.encode(self.tokenise(texts))

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """See `TextReader`."""
        return (states,)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`."""
        config = self.denoiser.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    def _guarded(self, pipe: Any) -> list[str]:
        encoders = list(self.readers)
        return [self.slot, *encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders), "vae"]

    @property
    def text_encoder(self) -> nn.Module:
        """See `Backend`."""
        return next(iter(self.text_encoders.values()))

    @property
    def fingerprint(self) -> str:
        """See `TextReader`; as it was when first asked for."""
        if self._fingerprint is None:
            digest = self.reader.digest
            for name in self.graded():
                digest = weights_digest(self.text_encoders[name], digest.removeprefix("sha256:"))
            self._fingerprint = digest
        return self._fingerprint

    def graded(self) -> tuple[str, ...]:
        """Returns the names of the text encoders whose output the gate scores; by default the first."""
        return (next(iter(self.readers)),)

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """See `TextReader`."""
        return self.reader.tokenise(texts)

    def tokens(self, text: str) -> tuple[Token, ...]:
        """See `TextReader`."""
        return self.reader.tokens(text)

    def words(self, ids: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """See `TextReader`."""
        return self.reader.words(ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """See `TextReader`."""
        return self.reader.text_of(ids)

    def readings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """See `TextReader`."""
        return self.reader.readings(ids)

    def wrote(self, text: str, ids: Sequence[int]) -> bool:
        """See `Backend`."""
        return self.reader.wrote(text, ids)

    def known(self, encoder: str, ids: Sequence[int]) -> bool:
        """See `Backend`."""
        return max(ids) < self.readers[encoder].vocabulary

    def spelled(self, encoder: str, ids: Sequence[int]) -> str:
        """See `Backend`."""
        return self.readers[encoder].text_of(ids)

    @torch.no_grad()
    def run_encoder(self, name: str, ids: Tensor, *, masked: bool = False, **options: Any) -> list[Any]:
        """Runs a text encoder over rows of ids, a batch at a time.

        Args:
            name: The text encoder.
            ids: [n, tokens].
            masked: Whether the pipeline tells it which ids are padding.
            options: Further arguments.

        Returns:
            The output of each batch.
        """
        encoder: Any = getattr(self.pipe, name)
        found: list[Any] = []
        for part in ids.split(self.batch):
            given = part.to(encoder.device)
            mask = {"attention_mask": self.readers[name].mask(given)} if masked else {}
            found.append(encoder(given, **mask, **options))
        return found

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call of the denoiser by name."""
        return dict(zip(self._arguments, args, strict=False)) | kwargs

    def inputs(self, given: Mapping[str, Any]) -> tuple[Input, ...]:
        """Returns what else than words a call draws from, as far as the denoiser and its arguments show."""
        config = self.denoiser.config
        further = int(config.in_channels) - int(config.out_channels) if self.channels else 0
        return (*self.channels.get(further, ()), *beside(given))

    def read(self, given: Mapping[str, Any], name: str, ndim: int = 3) -> Tensor:
        """Returns an argument that carries conditioning.

        Raises:
            UnsupportedBackendError: It is not there, or not a tensor of that shape.
        """
        found = given.get(name)
        if not isinstance(found, Tensor) or found.ndim != ndim:
            shape = "[rows, tokens, width]" if ndim == 3 else "[rows, width]"
            raise UnsupportedBackendError(
                f"the {type(self.denoiser).__name__} was called without {name} {shape}; safegen reads the prompt there "
                "and does not let a step pass unread"
            )
        return found


def timestep_of(given: Mapping[str, Any], name: str = "timestep") -> float:
    """Returns the first timestep of a call."""
    timestep = given.get(name)
    first = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
    return float(first) if first is not None else 0.0


# Arguments by which denoisers read what no gate understands, by what their names hold: ControlNets and T2I-adapters.
_CONTROL = ("controlnet", "additional_residual")
_IP_ADAPTER = ("image_embeds", "ip_adapter_image_embeds", "ip_hidden_states")
_OPTIONS = ("added_cond_kwargs", "cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def _options(given: Mapping[str, Any]) -> set[str]:
    """Returns the names of what a call passes inside of other arguments."""
    held = [given.get(name) or {} for name in _OPTIONS]
    return {name for options in held for name, value in options.items() if value is not None}


def beside(given: Mapping[str, Any]) -> tuple[Input, ...]:
    """Returns what a denoiser reads as conditioning beside the prompts: a ControlNet's, an adapter's, an image's."""
    found: list[Input] = []
    if any(value is not None for name, value in given.items() if any(part in name for part in _CONTROL)):
        found.append("control")
    if not _options(given).isdisjoint(_IP_ADAPTER):
        found.append("ip_adapter")
    return tuple(found)


def reads_more(given: Mapping[str, Any]) -> bool:
    """Tells whether a denoiser reads conditioning beside the prompts.

    That is the image of an IP-Adapter or a ControlNet, and GLIGEN's phrases; what a picture shows is in no prompt.
    """
    return bool(beside(given)) or "gligen" in _options(given)


def masked(states: Tensor, mask: Tensor | None) -> Tensor:
    """Sets to 0 what the denoiser does not read.

    Args:
        states: [rows, tokens, width].
        mask: [rows, tokens], other than 0 where it reads; None where it reads all.
    """
    return states if mask is None else states.masked_fill(mask.to(states.device)[..., None] == 0, 0)


def real_mean(states: Tensor) -> Tensor:
    """Returns the mean over the tokens that are not all 0, [rows, 1, width]: padding and what is masked counts not."""
    real = states.ne(0).any(dim=-1, keepdim=True)
    return (states.float().sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)).to(states.dtype)


def mask_of(states: Tensor) -> Tensor:
    """Returns which tokens of packed conditioning are not all 0, [rows, tokens]."""
    return states.ne(0).any(dim=-1).long()


def several(result: Any, count: int) -> Sequence[Any]:
    """Returns what `encode_prompt` returned, or nothing where a host's own version of it returns something else."""
    return result if isinstance(result, tuple) and len(result) == count else ()


def side(pipe: Any, name: str, kind: type[Any] | tuple[type[Any], ...]) -> bool:
    """Tells whether a pipeline's part is of a class."""
    return isinstance(getattr(pipe, name, None), kind)
