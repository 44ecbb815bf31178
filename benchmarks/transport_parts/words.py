"""Real prompts in the vocabulary of OpenAI's CLIP: what the shipped catalogue's phrases find, and what overlap does."""

from __future__ import annotations

import csv
import gzip
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from safegen.backend.base import Backend
from safegen.errors import SafegenError
from safegen.policy.catalogue import load_catalogue
from safegen.policy.context import utc_now
from safegen.policy.hits import lexical_hits
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.transport.calibrate import auroc
from safegen.transport.scores import token_overlap
from safegen.transport.sentence import SentenceEncoder

NAMED = ("artist-style", "ip-character")
_TOKENS = 49408
_MERGES = 49152 - 256 - 2


def _byte_letters() -> list[str]:
    """Returns the letters that stand for the 256 bytes, in the order of CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + k) for k in range(len(hidden))]


def clip_tokenizer(path: Path) -> CLIPTokenizer:
    """Builds CLIP's tokenizer from its merges.

    Args:
        path: `bpe_simple_vocab_16e6.txt.gz`, which the wheel of open_clip_torch carries.

    Raises:
        SafegenError: The file is missing, or holds other merges.
    """
    if not path.is_file():
        raise SafegenError(
            f"{path}: no such file; expected bpe_simple_vocab_16e6.txt.gz (install the extra `bench`, or download the "
            "wheel of open_clip_torch: it is in its folder open_clip)"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    content: dict[str, Any] = {"vocab": {word: k for k, word in enumerate(words)}, "merges": merges}
    tokenizer = CLIPTokenizer(**content, model_max_length=77)
    if len(tokenizer) != _TOKENS:
        raise SafegenError(f"{path}: a vocabulary of {len(tokenizer)} tokens; expected CLIP's {_TOKENS}")
    return tokenizer


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _mended(row: dict[str, str]) -> str:
    """Returns a prompt; those of one published list have lost the last letter of a target at their end."""
    prompt, target = row["prompt"], row.get("target", "")
    cut = bool(target) and target not in prompt and prompt.endswith(target[:-1])
    return prompt + target[-1] if cut else prompt


class Words:
    """Reads prompts as the gate does: from the token ids of the model's own window."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.policy: ResolvedPolicy = resolve(load_policy("strict"), load_catalogue(), available=(), now=utc_now())
        self._category = {rule.concept.id: rule.concept.category for rule in self.policy.rules}
        self.concepts = [rule.concept for rule in self.policy.rules if rule.concept.category in NAMED]
        ids = backend.tokenise([concept.name for concept in self.concepts]).tolist()
        self._tokens = [{token for token, _ in backend.words(row)} for row in ids]

    def hits(self, texts: Sequence[str], categories: Sequence[str] = NAMED) -> list[set[str]]:
        """Returns for each prompt the concepts that the lexical score opens."""
        found: list[set[str]] = []
        for row in self.backend.tokenise(texts).tolist():
            readings = self.backend.readings(row)
            concepts = {hit.concept for text in readings for hit in lexical_hits(self.policy, text)}
            found.append({concept for concept in concepts if self._category[concept] in categories})
        return found

    def overlap(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns the published overlap of each prompt with the name of each named concept, [prompts, concepts]."""
        ids = self.backend.tokenise(texts).tolist()
        return token_overlap([{token for token, _ in self.backend.words(row)} for row in ids], self._tokens)

    def concept_of(self, name: str) -> str | None:
        """Returns the concept that a name alone opens; None where the catalogue has none."""
        found = {hit.concept for hit in lexical_hits(self.policy, name)}
        return min(found) if found else None


def measure(backend: Backend, folder: Path) -> dict[str, Any]:
    """Measures the lexical score and the published overlap on published prompts.

    Args:
        backend: A text side with CLIP's vocabulary.
        folder: COCO captions (`coco_captions_3000.txt`), Six-CD's pairs (`sixcd_*.csv`), artists (`*_prompts.csv`).

    Returns:
        Shares in [0, 1] by name.
    """
    words = Words(backend)
    captions = [line for line in (folder / "coco_captions_3000.txt").read_text("utf-8").splitlines() if line.strip()]
    found: dict[str, Any] = {"concepts": len(words.concepts), "captions": len(captions)}
    found["captions/lexical false-open"] = _share(words.hits(captions))
    found["captions/lexical opened"] = sorted({concept for hit in words.hits(captions) for concept in hit})
    found["captions/lexical false-open, nudity"] = _share(words.hits(captions, ("explicit",)))
    overlap = words.overlap(captions)
    found["captions/published overlap >= 0.5 with some concept"] = _any(overlap, 0.5)
    found["captions/published overlap > 0 with some concept"] = _any(overlap, 1e-6)
    found["captions/published overlap >= 0.5, of all pairs"] = float((overlap >= 0.5).float().mean())
    benign = [row["prompt"] for row in _rows(folder / "sixcd_benign.csv")]
    found["six-cd benign/lexical opened"] = _share(words.hits(benign))
    found["six-cd benign/published overlap >= 0.5"] = _any(words.overlap(benign), 0.5)
    for kind in ("character", "artstyle"):
        found |= _pairs(words, folder, kind)
    return found | _artists(words, folder)


def _share(hits: Sequence[set[str]]) -> float:
    return sum(bool(hit) for hit in hits) / len(hits)


def _any(overlap: torch.Tensor, least: float) -> float:
    return float((overlap >= least).any(dim=1).float().mean())


def _pairs(words: Words, folder: Path, kind: str) -> dict[str, Any]:
    """Returns how Six-CD's prompts open with the concept in them, and without it."""
    rows = _rows(folder / f"sixcd_{kind}_malicious.csv")
    clean = [row["prompt"] for row in _rows(folder / f"sixcd_{kind}_clean.csv")]
    wanted = [words.concept_of(row["target"]) for row in rows]
    hits = words.hits([_mended(row) for row in rows])
    right = [concept is not None and concept in hit for concept, hit in zip(wanted, hits, strict=True)]
    overlap = words.overlap(clean)
    return {
        f"six-cd {kind}/prompts": len(rows),
        f"six-cd {kind}/lexical true-open": sum(right) / len(right),
        f"six-cd {kind}/missed": sorted({row["target"] for row, hit in zip(rows, right, strict=True) if not hit}),
        f"six-cd {kind}/clean, lexical false-open": _share(words.hits(clean)),
        f"six-cd {kind}/clean, published overlap >= 0.5": _any(overlap, 0.5),
    }


def _artist_rows(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*_prompts.csv")):
        for row in _rows(path):
            if row.get("artist"):
                yield html.unescape(row["prompt"]), row["artist"]


def _artists(words: Words, folder: Path) -> dict[str, Any]:
    """Returns how often prompts in the style of one artist open another artist."""
    rows = list(_artist_rows(folder))
    texts = [text for text, _ in rows]
    own = [words.concept_of(artist) for _, artist in rows]
    hits = words.hits(texts, ("artist-style",))
    # A prompt that names a second artist, by the catalogue's own phrases, asks for that one too.
    wrong = [len(hit - {concept}) > 0 for hit, concept in zip(hits, own, strict=True)]
    columns = [k for k, concept in enumerate(words.concepts) if concept.category == "artist-style"]
    overlap = words.overlap(texts)[:, columns]
    others = torch.tensor([[words.concepts[k].id != concept for k in columns] for concept in own])
    known = [k for k, concept in enumerate(own) if concept is not None]
    return {
        "artists/prompts": len(rows),
        "artists/in the catalogue": len(known),
        "artists/lexical true-open, of those": sum(own[k] in hits[k] for k in known) / max(1, len(known)),
        "artists/lexical opens another": sum(wrong) / len(wrong),
        "artists/published overlap >= 0.5 with another": float(((overlap >= 0.5) & others).any(dim=1).float().mean()),
    }


def semantic(source: str, folder: Path) -> dict[str, float]:
    """Measures a sentence encoder on Six-CD's character pairs: the AUROC of its cosine with the name."""
    encoder = SentenceEncoder(source)
    rows = _rows(folder / "sixcd_character_malicious.csv")
    clean = [row["prompt"] for row in _rows(folder / "sixcd_character_clean.csv")]
    names = encoder.encode([row["target"] for row in rows])
    high = (encoder.encode([_mended(row) for row in rows]) * names).sum(dim=1)
    low = (encoder.encode(clean) @ names[: len(clean)].T).amax(dim=1)
    return {"six-cd character/semantic AUROC": auroc(high.double(), low.double())}
