"""A sentence encoder beside the model's own: for the score `semantic`, which compares meanings rather than words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from safegen.errors import UnsupportedBackendError, UsageError
from safegen.transport.encoding import weights_digest

_PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")


class SentenceEncoder:
    """A transformers encoder with mean pooling over its last hidden state, as sentence-transformers models are used."""

    def __init__(self, source: str) -> None:
        """Loads it.

        Args:
            source: A model folder, or a hub id with its commit (`owner/name@<40 hex digits>`).

        Raises:
            UsageError: No such folder, a hub id without a commit, or nothing there that transformers can load.
        """
        from transformers import AutoModel, AutoTokenizer

        pinned = _PINNED.fullmatch(source)
        if pinned is None and not (source and Path(source).is_dir()):
            raise UsageError(
                f"sentence encoder {source!r}: expected a model folder, or a hub id with its commit "
                "(owner/name@<40 hex digits>), so that what is compared cannot change unnoticed"
            )
        name, revision = pinned.groups() if pinned else (source, None)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
            self._model: Any = AutoModel.from_pretrained(name, revision=revision).eval()
        except Exception as error:  # transformers raises many classes, for missing files, networks and formats
            raise UsageError(
                f"sentence encoder {source!r} cannot be loaded ({type(error).__name__}: {error}); expected the files "
                "of a transformers encoder and its tokenizer"
            ) from error
        self._kept: dict[str, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        """Digest of vocabulary and weights, `sha256:<hex>`."""
        vocabulary = hashlib.sha256(repr(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest()
        return weights_digest(self._model, vocabulary)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns unit vectors of texts, [n, width]; a text that was encoded before costs nothing.

        Raises:
            UnsupportedBackendError: The encoder returns NaN or infinity, which no threshold would let through.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if len(self._kept) + len(new) > 4096:
            self._kept, new = {}, list(dict.fromkeys(texts))
        if new:
            batch = self._tokenizer(new, padding=True, truncation=True, return_tensors="pt")
            states = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            if not bool(torch.isfinite(pooled).all()):
                raise UnsupportedBackendError(
                    f"the sentence encoder returns NaN or infinity for {len(new)} texts, so no prompt can be compared; "
                    "expected finite numbers: check its weights"
                )
            self._kept |= dict(zip(new, normalize(pooled, dim=1), strict=True))
        return torch.stack([self._kept[text] for text in texts])
