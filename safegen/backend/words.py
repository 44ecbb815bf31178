"""Tokenizers, as the gates need them: texts to ids as the host makes them, and ids back to words."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safegen.transport.encoding import Token

_SPACE_BESIDE_A_MARK = re.compile(r"(?<![^\W\d_]) | (?![^\W\d_])")


class Words:
    """One tokenizer whose ids keep a text (T5, Gemma, Qwen, Mistral, and all that keep white space).

    Attributes:
        window: Ids that the encoder reads at once.
        vocabulary: Number of ids with a known meaning: those that the text encoder was trained with.
    """

    def __init__(
        self, tokenizer: Any, *, size: int, length: int, before: str = "", after: str = "", special: bool = True
    ) -> None:
        """Takes copies of a tokenizer, whose settings stay.

        A tokenizer whose padding or truncation changes cannot be used by two threads, and pipelines change them in
        every run.

        Args:
            tokenizer: The pipeline's.
            size: Rows of the text encoder's embedding.
            length: Ids that rows are padded and cut to; 0 pads to the longest and cuts nothing.
            before: What the pipeline puts before each prompt (a chat template).
            after: What it puts behind it.
            special: Whether the tokenizer adds begin and end by itself.
        """
        self._tokenizer: Any = copy.deepcopy(tokenizer)
        self._whole: Any = copy.deepcopy(tokenizer)  # never cuts
        self._length, self._special = length, special
        self._before, self._after = before, after
        self._spelled: dict[int, str] = {}  # the text of tokens that were decoded alone
        self.window = length or 1 << 20
        self.vocabulary = self._base_vocabulary(size)
        self._head, self._tail = (self._plain(text) for text in (before, after))
        self.tokenise([""])

    def _base_vocabulary(self, size: int) -> int:
        """Counts the ids with a known meaning: those below the first that was added, save the special ones."""
        special = set(self._tokenizer.all_special_ids)
        added = [i for i in self._tokenizer.get_added_vocab().values() if i not in special]
        # A chat model's own markers are added tokens too, and come with the published tokenizer.
        return min([size, *added]) if self._special and not self._before else size

    def _plain(self, text: str) -> list[int]:
        return list(self._whole(text, add_special_tokens=False)["input_ids"]) if text else []

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """See `TextReader`."""
        sized: dict[str, Any] = (
            {"padding": "max_length", "max_length": self._length, "truncation": True}
            if self._length
            else {"padding": "longest"}
        )
        rows = [f"{self._before}{text}{self._after}" for text in texts]
        return self._tokenizer(rows, return_tensors="pt", add_special_tokens=self._special, **sized).input_ids

    def mask(self, ids: Tensor) -> Tensor:
        """Returns which ids are a text's own, [n, tokens]; the others are padding."""
        return (ids != self._tokenizer.pad_token_id).long()

    def real(self, ids: Sequence[int]) -> list[int]:
        """Cuts a row to its own tokens: without padding, template and special tokens, wherever those stand."""
        nothing = {self._tokenizer.pad_token_id, *self._tokenizer.all_special_ids}
        row, head, tail = ([i for i in part if i not in nothing] for part in (ids, self._head, self._tail))
        row = row[self._shared(head, row) :]
        return row[: len(row) - self._shared(tail[::-1], row[::-1])]

    @staticmethod
    def _shared(part: Sequence[int], row: Sequence[int]) -> int:
        """Returns how many ids of a template a row begins with: all of them, but for one that joined the text's."""
        same = next((k for k, (one, other) in enumerate(zip(part, row, strict=False)) if one != other), len(part))
        return min(same, len(row)) if same >= len(part) - 1 else 0

    def tokens(self, text: str) -> tuple[Token, ...]:
        """See `TextReader`."""
        found = self._whole(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return tuple(Token(token, start, end) for token, (start, end) in places)

    @property
    def digest(self) -> str:
        """Digest of the vocabulary, in hex."""
        return hashlib.sha256(repr(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest()

    def words(self, ids: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """See `TextReader`."""
        return tuple((i, self._word(i)) for i in self.real(ids))

    def _word(self, token: int) -> str:
        if token not in self._spelled:
            self._spelled[token] = self._decoded([token])
        return self._spelled[token]

    def text_of(self, ids: Sequence[int]) -> str:
        """See `TextReader`."""
        return self._decoded(self.real(ids))

    def readings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """See `TextReader`."""
        return (self.text_of(ids),)

    def wrote(self, text: str, ids: Sequence[int]) -> bool:
        """Tells whether a row of ids is this text, whole or cut; letter case and white space aside."""
        held, whole = ("".join(part.casefold().split()) for part in (self.text_of(ids), text))
        return whole.startswith(held) and (bool(held) or not whole)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids).strip()


class ClipWords(Words):
    """CLIP's tokenizer, which loses the white space beside digits and marks."""

    def __init__(self, tokenizer: Any, *, size: int) -> None:
        super().__init__(tokenizer, size=size, length=int(tokenizer.model_max_length))

    def real(self, ids: Sequence[int]) -> list[int]:
        """Cuts a row to its real tokens: no padding at its end, and no begin and end tokens, wherever they stand.

        An end token can be written into a prompt; what comes behind it reaches the denoiser all the same.
        """
        tokenizer = self._tokenizer
        return [i for i in ids[: self._end(ids)] if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]

    def wrote(self, text: str, ids: Sequence[int]) -> bool:
        """See `Words`; by the ids, which keep less than a text."""
        held, whole = self.real(ids), [token.id for token in self.tokens(text)]
        return held == whole[: len(held)] and (bool(held) or not whole)

    def _end(self, ids: Sequence[int]) -> int:
        """Returns where the padding begins, which may be more end tokens, behind the last real token."""
        nothing = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        end = len(ids)
        while end and ids[end - 1] in nothing:
            end -= 1
        row = list(ids[end:])
        return end + row.index(self._tokenizer.eos_token_id) + 1 if self._tokenizer.eos_token_id in row else end

    def padded_as(self, ids: Tensor, other: ClipWords) -> Tensor:
        """Returns the ids that another tokenizer of the same vocabulary gives, which pads with another one."""
        found = ids.clone()
        for row, values in zip(found, ids.tolist(), strict=True):
            row[self._end(values) :] = other._tokenizer.pad_token_id
        return found

    def readings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """See `TextReader`. CLIP's tokens end words at every digit and mark, whether or not white space stood there."""
        text = self.text_of(ids)
        return tuple(dict.fromkeys((text, _SPACE_BESIDE_A_MARK.sub("", text))))

    def _decoded(self, ids: Sequence[int]) -> str:
        # A copied tokenizer shows the ends of words as they stand in its vocabulary.
        return self._tokenizer.decode(ids).replace("</w>", " ").strip()
