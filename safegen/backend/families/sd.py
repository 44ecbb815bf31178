"""Stable Diffusion 1.x and 2.x, and every pipeline of the same architecture (community models, safegen-mini)."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from safegen.backend.base import Call, Input
from safegen.backend.sites import Sites, find_sites
from safegen.errors import UnsupportedBackendError
from safegen.transport.encoding import Token, weights_digest

_SPACE_BESIDE_A_MARK = re.compile(r"(?<![^\W\d_]) | (?![^\W\d_])")
_PARTS = ("unet", "text_encoder", "tokenizer", "vae")

# Channels that a model reads beside the latents: an image and its mask to fill in, an image to edit, a depth map.
_BESIDE_THE_LATENTS: dict[int, tuple[Input, ...]] = {5: ("image", "mask"), 4: ("image",), 1: ("control",)}
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

# Cross-attention width and block widths tell the families of this architecture apart.
_FAMILIES = {
    (768, (320, 640, 1280, 1280)): "sd1",
    (1024, (320, 640, 1280, 1280)): "sd2",
    (192, (64, 128, 160)): "mini",
}


class StableDiffusion:
    """A pipeline with one CLIP text encoder and a U-Net conditioned on its last hidden state."""

    def __init__(self, pipe: Any) -> None:
        """Takes a pipeline for which `detect` holds, with the denoiser that it has now."""
        self.pipe = pipe
        self.denoiser: Any = pipe.unet
        self.text_encoder: nn.Module = pipe.text_encoder
        # A copy of its own, whose settings stay: a tokenizer whose padding or truncation changes cannot be used by two
        # threads, and the pipeline changes them in every run.
        self._tokenizer: Any = copy.deepcopy(pipe.tokenizer)
        self.tokenise([""])
        self._whole: Any = copy.deepcopy(pipe.tokenizer)  # and one that never cuts
        self._fingerprint: str | None = None
        self._spelled: dict[int, str] = {}  # the text of tokens that were decoded alone
        self.vocabulary = self._base_vocabulary()
        self.parts: dict[str, Any] = {name: getattr(pipe, name, None) for name in _PARTS}
        self.sites: Sites = find_sites(pipe.unet, Transformer2DModel)
        config = pipe.unet.config
        key = (config.cross_attention_dim, tuple(config.block_out_channels))
        self.family: str = _FAMILIES.get(key, f"sd-{self.sites.architecture[:8]}")

    @staticmethod
    def detect(pipe: Any) -> bool:
        """Tells whether this is a pipeline of the family."""
        unet, encoder = getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None)
        return (
            isinstance(unet, UNet2DConditionModel)
            and isinstance(encoder, CLIPTextModel)
            and getattr(pipe, "tokenizer", None) is not None
            and getattr(pipe, "text_encoder_2", None) is None
            and unet.config.get("addition_embed_type") is None
        )

    def _base_vocabulary(self) -> int:
        """Counts the ids with a known meaning: those below the first that was added, save the special ones."""
        special = set(self._tokenizer.all_special_ids)
        added = [i for i in self._tokenizer.get_added_vocab().values() if i not in special]
        return min([int(self.pipe.text_encoder.config.vocab_size), *added])

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """See `Backend`."""
        tokenizer = self._tokenizer
        return tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def _real(self, ids: Sequence[int]) -> list[int]:
        """Cuts a row to its real tokens: after the begin token, before the first end token."""
        tokenizer = self._tokenizer
        row = list(ids)
        if row and row[0] == tokenizer.bos_token_id:
            row = row[1:]
        return row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row

    def tokens(self, text: str) -> tuple[Token, ...]:
        """See `TextReader`."""
        found = self._whole(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return tuple(Token(token, start, end) for token, (start, end) in places)

    @property
    def fingerprint(self) -> str:
        """See `TextReader`; as it was when first asked for."""
        if self._fingerprint is None:
            vocabulary = repr(sorted(self._tokenizer.get_vocab().items()))
            digest = hashlib.sha256(vocabulary.encode()).hexdigest()
            self._fingerprint = weights_digest(self.text_encoder, digest)
        return self._fingerprint

    def words(self, ids: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """See `Backend`."""
        return tuple((i, self._word(i)) for i in self._real(ids))

    def _word(self, token: int) -> str:
        if token not in self._spelled:
            self._spelled[token] = self._decoded([token])
        return self._spelled[token]

    def text_of(self, ids: Sequence[int]) -> str:
        """See `Backend`."""
        return self._decoded(self._real(ids))

    def readings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """See `TextReader`. CLIP's tokens end words at every digit and mark, whether or not white space stood there."""
        text = self.text_of(ids)
        return tuple(dict.fromkeys((text, _SPACE_BESIDE_A_MARK.sub("", text))))

    def _decoded(self, ids: Sequence[int]) -> str:
        # A copied tokenizer shows the ends of words as they stand in its vocabulary.
        return self._tokenizer.decode(ids).replace("</w>", " ").strip()

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`."""
        encoder: Any = self.pipe.text_encoder
        return encoder(ids.to(encoder.device))[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `Backend`."""
        config = self.denoiser.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        return self.denoiser(x_t, t, encoder_hidden_states=states).sample

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        names = ("sample", "timestep", "encoder_hidden_states")
        given = dict(zip(names, args, strict=False)) | kwargs
        states, timestep = given.get("encoder_hidden_states"), given.get("timestep")
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise UnsupportedBackendError(
                "the U-Net was called without encoder_hidden_states [rows, tokens, width]; safegen reads the prompt "
                "there and does not let a step pass unread"
            )
        first = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        images = "image_embeds" in (given.get("added_cond_kwargs") or {})  # IP-Adapter
        phrases = "gligen" in (given.get("cross_attention_kwargs") or {})
        return Call(states, float(first) if first is not None else 0.0, images or phrases, self._inputs(given))

    def _inputs(self, given: Mapping[str, Any]) -> tuple[Input, ...]:
        """Returns what else than words a call draws from, as far as its arguments show."""
        beside = int(self.denoiser.config.in_channels) - int(self.denoiser.config.out_channels)
        found = list(_BESIDE_THE_LATENTS.get(beside, ()))
        if any(given.get(name) is not None for name in _RESIDUALS):
            found.append("control")
        if "image_embeds" in (given.get("added_cond_kwargs") or {}):
            found.append("ip_adapter")
        return tuple(found)
