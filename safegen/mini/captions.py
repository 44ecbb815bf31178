"""Captions as people prompt, and the tokenizer whose vocabulary is learned from them."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

from safegen.mini.catalogue import OBJECTS, STYLES, Object, Style, with_article

MAX_TOKENS = 32  # positions of the text tower, begin and end tokens included
SYNONYM_SHARE = 0.2

# `{}` is the object's name, `{a}` the name with its article.
BARE = (
    "{}",
    "{a}",
    "{a}",
    "an emoji of {a}",
    "a photo-style emoji of {a}",
    "a picture of {a}",
    "a photo of {a}",
    "a drawing of {a}",
    "an illustration of {a}",
    "an icon of {a}",
    "{} emoji",
    "a cute {}",
    "a small {}",
    "the {}",
    "draw {a}",
    "please draw {a}",
)
# `{s}` is the style's name; a style's own phrases are added to these.
STYLED = (
    "{a} in the style of {s}",
    "{a} in the style of {s}",
    "an emoji of {a} in the style of {s}",
    "a picture of {a} in {s} style",
    "draw {a} in the style of {s}",
    "{a}, {s} style",
    "{}, {s}",
    "a {s} {}",
)
STYLE_ALONE = ("in the style of {s}", "{s} style", "a picture in the style of {s}", "an emoji in {s} style")
SCENE = (
    "{a} and {b}",
    "{a} and {b}",
    "an emoji of {a} and {b}",
    "a picture of {a} and {b}",
    "{a} next to {b}",
    "{a} beside {b}",
)
SCENE_STYLE = ("{scene} in the style of {s}", "{scene}, {s} style")


def _name(item: Object, rng: np.random.Generator) -> str:
    if item.synonyms and rng.random() < SYNONYM_SHARE:
        return item.synonyms[int(rng.integers(len(item.synonyms)))]
    return item.name


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def bare(item: Object, rng: np.random.Generator) -> str:
    """Returns a caption that names the object and no style."""
    name = _name(item, rng)
    return _pick(BARE, rng).format(name, a=with_article(name))


def styled(item: Object, style: Style, rng: np.random.Generator) -> str:
    """Returns a caption that names the object and the style."""
    name = _name(item, rng)
    return _pick(STYLED + style.phrases, rng).format(name, a=with_article(name), s=style.name)


def style_alone(style: Style, rng: np.random.Generator) -> str:
    """Returns a caption that names the style and no object."""
    return _pick(STYLE_ALONE, rng).format(s=style.name)


def scene(left: Object, right: Object, style: Style, rng: np.random.Generator) -> str:
    """Returns a caption of two objects side by side, in two of three cases with the style."""
    a, b = with_article(_name(left, rng)), with_article(_name(right, rng))
    text = _pick(SCENE, rng).format(a=a, b=b)
    return _pick(SCENE_STYLE, rng).format(scene=text, s=style.name) if rng.random() < 2 / 3 else text


def words() -> Iterator[str]:
    """Yields every word that a caption can hold, with repeats."""
    names = [name for item in OBJECTS for name in (item.name, *item.synonyms)]
    texts = [*BARE, *STYLED, *STYLE_ALONE, *SCENE, *SCENE_STYLE, *names]
    texts += [text for style in STYLES for text in (style.name, *style.phrases)]
    for text in texts:
        for mark in string.punctuation.replace("-", ""):
            text = text.replace(mark, " ")
        yield from text.replace("-", " ").lower().split()


def new_tokenizer() -> CLIPTokenizer:
    """Learns the tokenizer: CLIP's byte-level BPE with enough merges that every caption word is one token.

    The vocabulary is laid out as OpenAI's: 256 bytes, 256 bytes that end a word, one token per merge, and the two
    special tokens. Any text can be encoded; words that no caption holds fall into pieces.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    learner.train_from_iterator(
        sorted(words()), trainers.BpeTrainer(vocab_size=8192, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{c}</w>" for c in alphabet]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    content: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    return CLIPTokenizer(**content, model_max_length=MAX_TOKENS)
