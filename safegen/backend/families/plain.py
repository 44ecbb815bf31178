"""A denoiser that is not of diffusers: plain torch modules, put together by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safegen.backend.base import Call, Capabilities, Strand
from safegen.backend.families.family import Family, several, timestep_of
from safegen.backend.families.single import vocabulary_of
from safegen.backend.words import ClipWords, Words

_ENCODER = "text_encoder"


class TorchPipeline:
    """What safegen must be told of a denoiser that it does not know; give it to `apply_policy` in place of a pipeline.

    The denoiser's argument for the prompt's states must be passed in every call, one row per row of the batch, exactly
    as the text encoder made them: a row that is anything else has no known origin, and opens every membrane.

    Attributes:
        denoiser: Predicts the noise; called with latents first.
        text_encoder: Called with token ids [n, tokens]; returns states [n, tokens, width], first where it returns more.
        tokenizer: One of transformers.
        blocks: Classes of the denoiser's blocks: every Linear and Conv2d inside them is a site, and must run in every
            call of the denoiser, over as many rows as the call has.
        latent_shape: Channels, (frames,) height and width of the latents.
        states: The denoiser's argument that carries the prompt's states.
        timestep: Its argument that carries the timestep, which falls during a run.
        decoder: Turns latents into images in [-1, 1] with its method `decode`, which returns a tuple or an object with
            `sample`; with it, images are recorded.
        name: What the audit log calls the model.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        blocks: type[nn.Module] | tuple[type[nn.Module], ...],
        latent_shape: tuple[int, ...],
        *,
        states: str = "states",
        timestep: str = "timestep",
        decoder: nn.Module | None = None,
        name: str = "torch",
    ) -> None:
        self.denoiser, self.text_encoder, self.tokenizer = denoiser, text_encoder, tokenizer
        self.blocks = blocks if isinstance(blocks, tuple) else (blocks,)
        self.latent_shape, self.states, self.timestep = latent_shape, states, timestep
        self.vae = decoder
        self.config = {"_name_or_path": name}

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes prompts; what a policy says of them is then said of the caller's own words.

        Args:
            prompt: One or several texts.
            negative_prompt: As many; None for none.

        Returns:
            States [n, tokens, width] of the prompts and of the negative prompts.
        """
        return self._encoded(prompt), None if negative_prompt is None else self._encoded(negative_prompt)

    def _encoded(self, texts: str | Sequence[str]) -> Tensor:
        rows = [texts] if isinstance(texts, str) else list(texts)
        size = {"max_length": self.tokenizer.model_max_length, "padding": "max_length", "truncation": True}
        ids = self.tokenizer(rows, return_tensors="pt", **size).input_ids
        return states_of(self.text_encoder(ids.to(next(self.text_encoder.parameters()).device)))


def states_of(output: Any) -> Tensor:
    """Returns the states [n, tokens, width] of a text encoder's output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


class PlainTorch(Family):
    """A `TorchPipeline`; the gate scores the states as they are."""

    stem = "torch"
    looked_for = "a safegen.backend.TorchPipeline (any denoiser of torch)"
    slot = "denoiser"

    def __init__(self, pipe: TorchPipeline) -> None:
        self.blocks = pipe.blocks
        self.capabilities = Capabilities(trains=True, negatives=True, calls=2)
        super().__init__(pipe)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return isinstance(pipe, TorchPipeline)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        size = vocabulary_of(pipe.text_encoder)
        if any(token.endswith("</w>") for token in pipe.tokenizer.get_vocab()):  # as CLIP's
            return {_ENCODER: ClipWords(pipe.tokenizer, size=size)}
        return {_ENCODER: Words(pipe.tokenizer, size=size, length=int(pipe.tokenizer.model_max_length))}

    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`."""
        with torch.no_grad():
            device = next(self.text_encoder.parameters()).device
            return torch.cat([states_of(self.text_encoder(part.to(device))) for part in ids.split(self.batch)])

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        yield states_of(output)

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""
        found = several(result, 2)
        return (_strands(found[0]), _strands(found[1])) if found else ((), ())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`."""
        return self.pipe.latent_shape

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        return self.denoiser(x_t, **{self.pipe.timestep: t, self.pipe.states: states})

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states = self.read(given, self.pipe.states)
        return Call(states, timestep_of(given, self.pipe.timestep), _strands(states), (states,))


def _strands(states: Tensor | None) -> tuple[Strand, ...]:
    return () if states is None else (Strand(_ENCODER, states),)
