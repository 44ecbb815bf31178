"""What the families with one text encoder of their own share: its states go to the denoiser as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from safegen.backend.base import Call, Strand
from safegen.backend.families.family import Family, masked, reads_more, real_mean, several, timestep_of


class SingleEncoder(Family):
    """A denoiser that reads the states of one text encoder.

    The gate scores the mean of the states over the tokens that are read. Packed conditioning is [rows, tokens, width],
    0 where nothing is read.

    Attributes:
        states: The denoiser's argument that carries the states.
        mask: Its argument that says which of them it reads; "" where it reads all.
        clock: The sign with which its timestep falls during a run.
        told: Whether the text encoder is told which ids are padding.
        options: Further arguments of the text encoder.
        result: How many things `encode_prompt` returns, and which are the prompts and the negative prompts (-1: none).
    """

    states: ClassVar[str] = "encoder_hidden_states"
    mask: ClassVar[str] = ""
    clock: ClassVar[int] = 1
    told: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}
    result: ClassVar[tuple[int, int, int]] = (4, 0, 2)
    encoder = "text_encoder"

    def taken(self, output: Any) -> Tensor:
        """Returns the states [n, tokens, width] that the pipeline takes of the text encoder's output."""
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    def cut(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the part of the states that goes to the denoiser; by default all.

        Args:
            states: [n, tokens, width].
            mask: What the text encoder was told, [n, tokens].
        """
        return states

    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`."""
        found: list[Tensor] = []
        for part, output in zip(ids.split(self.batch), self._encoded(ids), strict=True):
            mask = self.reader.mask(part)
            states = self.taken(output)
            found.append(self.cut(masked(states, mask) if self.told or self.mask else states, mask))
        longest = max(part.shape[1] for part in found)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in found])

    def _encoded(self, ids: Tensor) -> list[Any]:
        return self.run_encoder(self.encoder, ids, masked=self.told, **self.options)

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """See `TextReader`."""
        return (real_mean(states),)

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        if self.options and getattr(output, "hidden_states", None) is None:
            return
        states, mask = self.taken(output), given.get("attention_mask")
        if not isinstance(mask, Tensor):
            mask = self.reader.mask(given["input_ids"]) if self.mask else None
        for found in (states, masked(states, mask)):
            yield found
            yield self.cut(found, mask)

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""
        count, prompts, negatives = self.result
        found = several(result, count)
        if not found:
            return (), ()
        return self.strands(found[prompts]), self.strands(found[negatives] if negatives >= 0 else None)

    def strands(self, states: Any) -> tuple[Strand, ...]:
        """Returns conditioning as strands; none for none."""
        return (Strand(self.encoder, states),) if isinstance(states, Tensor) else ()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states, mask = self.read(given, self.states), given.get(self.mask)
        tensors = (states,) if mask is None else (states, mask)
        read = masked(states, mask if mask is not None and mask.ndim == 2 else None)
        time = self.clock * timestep_of(given)
        return Call(read, time, self.strands(states), tensors, reads_more(given), self.inputs(given))


def vocabulary_of(encoder: Any) -> int:
    """Returns the number of rows of a text encoder's embedding."""
    return int(encoder.get_input_embeddings().num_embeddings)
