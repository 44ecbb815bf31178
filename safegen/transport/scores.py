"""Transport scores, one pure function each, with its equation and source.

All take text encodings as the denoiser reads them: the last hidden state, [rows, tokens, width], begin and padding
positions included. How a score becomes a permeability is `safegen.transport.curve`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def clip_cosine(prompts: Tensor, concepts: Tensor) -> Tensor:
    """Cosine of text encodings, `s_cf` of SPM (arXiv 2312.16145, §3.3); a part of the score `paper`.

    As the reference code computes it: over the flattened last hidden state, begin, end and padding positions included.
    Unrelated prompts do not reach 0, and short prompts look alike.

    Args:
        prompts: [rows, tokens, width].
        concepts: [concepts, tokens, width].

    Returns:
        [rows, concepts], in [-1, 1].
    """
    return normalize(prompts.float().flatten(1), dim=1) @ normalize(concepts.float().flatten(1), dim=1).T


def token_overlap(prompts: Sequence[Collection[int]], concepts: Sequence[Collection[int]]) -> Tensor:
    """Share of the concept's tokens found in the prompt, SPM Eq. 10: |T(c) ∩ T(p)| / |T(c)|; a part of `paper`.

    Args:
        prompts: Token ids of each prompt, without begin, end and padding.
        concepts: Token ids of each concept's name, likewise.

    Returns:
        [rows, concepts], in [0, 1]; 0 for a concept without tokens.
    """
    columns = {token: k for k, token in enumerate(dict.fromkeys(token for ids in concepts for token in ids))}
    wanted, held = (_incidence(ids, columns) for ids in (concepts, prompts))
    return (held @ wanted.T) / wanted.sum(dim=1).clamp(min=1)


def _incidence(rows: Sequence[Collection[int]], columns: dict[int, int]) -> Tensor:
    """Returns which of some tokens each row holds, [rows, columns], as 0 and 1."""
    found = torch.zeros(len(rows), len(columns))
    places = [(k, columns[token]) for k, ids in enumerate(rows) for token in ids if token in columns]
    if places:
        index = torch.tensor(places)
        found[index[:, 0], index[:, 1]] = 1.0
    return found


def change(states: Tensor, empty: Tensor) -> Tensor:
    """What a text changes in the encoding of the empty prompt: mean over positions of E(p) - E(""), made unit length.

    The begin position is the same for all texts and drops out. The end position and the padding behind it stay in:
    they carry a summary of the text, and the denoiser reads them too.

    Args:
        states: E(p), [rows, tokens, width]; a row with fewer tokens than `empty` is compared with as many of it.
        empty: E(""), [tokens, width].

    Returns:
        [rows, width], of length 1; 0 for the empty prompt itself.
    """
    return normalize(states.float().mean(dim=1) - empty[: states.shape[1]].float().mean(dim=0), dim=1)


def direction(prompts: Tensor, concepts: Tensor) -> Tensor:
    """Cosine between the changes that prompt and concept make to the empty prompt's encoding.

    After the concept direction of Semantic Surgery (`a_c = mean_t cos(E(c)_t - E("")_t, E(p)_t)`), with two departures
    (docs/decisions/0009): the prompt's own distance from the empty prompt is taken, and the mean is taken
    before the cosine, so that it does not matter at which position a word stands.

    Args:
        prompts: `change` of the prompts, [rows, width].
        concepts: `change` of the concepts' names, [concepts, width].

    Returns:
        [rows, concepts], in [-1, 1]; near 0 for unrelated texts.
    """
    return prompts @ concepts.T


def lexical(found: Sequence[Collection[int]], targets: int) -> Tensor:
    """1 where a whole phrase of the concept stands in the text, else 0; no partial credit (docs/decisions/0008).

    Args:
        found: For each row, the indices of the targets that have a phrase in its text (`safegen.text.PhraseMatcher`).
        targets: How many targets there are.

    Returns:
        [rows, targets], 0 or 1.
    """
    return _incidence(found, {k: k for k in range(targets)})


def evidence(whole: Tensor, without: Tensor) -> Tensor:
    """Leave-one-token-out evidence: how far a score falls when one token is taken out of the prompt.

    After the trigger tokens of SAFREE (arXiv 2410.12761), which masks one token at a time; here the score itself is
    compared, so that the evidence is in the units of the thresholds.

    Args:
        whole: Score of the whole prompt, [targets].
        without: Score of the prompt without token i, [tokens, targets].

    Returns:
        [tokens, targets]; positive where the token speaks for the concept.
    """
    return whole - without


def largest(scores: Tensor, owners: Tensor, targets: int) -> Tensor:
    """Returns the largest score over the names of each target.

    Args:
        scores: [rows, names], in [-1, 1].
        owners: The target of each name, [names].
        targets: How many targets there are.

    Returns:
        [rows, targets]; -1 for a target without names.
    """
    found = torch.full((len(scores), targets), -1.0)
    return found.scatter_reduce(1, owners.expand(len(scores), -1), scores, "amax")
