"""The text encoder's seam: where rows of conditioning came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import same_state, state_of, tiny_sd, tiny_tokenizer
from torch import Tensor

import safegen.backend.conditioning as module
from safegen.backend import backend_of
from safegen.backend.base import Strand
from safegen.backend.conditioning import NOTHING, Encoding, Origin, TextSeam
from safegen.backend.words import ClipWords
from safegen.errors import AttestationError


@pytest.fixture
def pipe() -> Any:
    return tiny_sd()


@pytest.fixture
def seam(pipe: Any) -> Any:
    found = TextSeam(backend_of(pipe))
    found.attach(lambda: None)
    return found


def ids_of(pipe: Any, text: str) -> Tensor:
    return backend_of(pipe).tokenise([text])


def encode(pipe: Any, text: str) -> Tensor:
    with torch.no_grad():
        return pipe.text_encoder(ids_of(pipe, text))[0][0]


def origin(seam: TextSeam, row: Tensor, encoding: Encoding = NOTHING) -> Origin | None:
    return seam.trace([("text_encoder", row)], encoding)


def strands(*rows: Tensor) -> tuple[Strand, ...]:
    return (Strand("text_encoder", torch.stack(rows)),) if rows else ()


def test_rows_are_traced_through_repeating_joining_and_moving(pipe: Any, seam: TextSeam) -> None:
    ghost, fox = encode(pipe, "a ghost"), encode(pipe, "a fox")
    joined = torch.stack([fox, ghost, fox]).repeat(2, 1, 1)[1:4].clone().contiguous()
    found = [origin(seam, row) for row in joined]
    texts = [backend_of(pipe).text_of(o.ids) if o else None for o in found]
    assert texts == ["a ghost", "a fox", "a fox"]
    assert origin(seam, torch.nextafter(ghost, ghost + 1)) is None
    assert origin(seam, ghost.double()) is not None  # the same values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_are_traced(dtype: torch.dtype, pipe: Any) -> None:
    pipe.text_encoder.to(dtype)
    seam = TextSeam(backend_of(pipe))
    seam.attach(lambda: None)
    row = encode(pipe, "a ghost")
    assert row.dtype == dtype
    assert origin(seam, row) is not None


def test_a_tuple_is_read_too(pipe: Any, seam: TextSeam) -> None:
    with torch.no_grad():
        states = pipe.text_encoder(input_ids=ids_of(pipe, "a ghost"), return_dict=False)[0]
    assert origin(seam, states[0]) is not None


def test_the_oldest_rows_are_forgotten_and_what_is_used_again_is_not(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_KEPT", 3)
    seam = TextSeam(backend_of(pipe))
    seam.attach(lambda: None)
    rows = {text: encode(pipe, text) for text in ("a", "fox", "ghost", "a", "van", "the")}
    assert {text: origin(seam, row) is not None for text, row in rows.items()} == {
        "a": True,
        "fox": False,
        "ghost": False,
        "van": True,
        "the": True,
    }


def test_announced_texts_are_kept_as_written(pipe: Any, seam: TextSeam) -> None:
    token = seam.announce([("A  GHOST",)])
    row = encode(pipe, "a ghost")
    seam.returned(strands(row), ())
    seam.end_announcement(token)
    found = origin(seam, row, seam.last())
    assert found is not None
    assert (found.text, found.negative) == ("A  GHOST", False)
    plain = origin(seam, encode(pipe, "fox"))
    assert plain is not None
    assert plain.text is None


def test_negative_is_what_this_encoding_returned_as_negative_only(pipe: Any, seam: TextSeam) -> None:
    ghost, fox = encode(pipe, "a ghost"), encode(pipe, "a fox")
    seam.returned(strands(fox, ghost), strands(ghost, ghost))
    both = seam.last()
    seam.returned(strands(fox), strands(ghost))
    one = seam.last()
    found = [origin(seam, ghost, encoding) for encoding in (both, one, NOTHING)]
    assert [o.negative for o in found if o] == [False, True, False]


def test_encoding_by_hand_ends_what_was_known(pipe: Any, seam: TextSeam) -> None:
    ghost, fox = encode(pipe, "a ghost"), encode(pipe, "a fox")
    seam.returned(strands(fox), strands(ghost))
    first = seam.last()
    assert first.negatives
    encode(pipe, "a mouse")
    second = seam.last()
    assert second is not first
    assert not second.negatives
    assert second.following(first) is second
    seam.returned(strands(ghost), ())
    assert not seam.last().following(first).negatives  # what is a prompt now is not negative any more
    seam.returned(strands(encode(pipe, "robot")), ())
    assert seam.last().following(first).negatives == first.negatives


def test_two_seams_do_not_take_each_others_encodings(pipe: Any, seam: TextSeam) -> None:
    other = TextSeam(backend_of(tiny_sd()))
    seam.returned(strands(encode(pipe, "a fox")), strands(encode(pipe, "a ghost")))
    assert seam.last().negatives
    assert other.last() is NOTHING


def test_ids_beyond_the_base_vocabulary_have_no_meaning(pipe: Any, seam: TextSeam) -> None:
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + 1)
    ids = ids_of(pipe, "a ghost").clone()
    ids[0, 2] = len(pipe.tokenizer)
    with torch.no_grad():
        row = pipe.text_encoder(ids)[0][0]
    assert origin(seam, row) is None
    assert origin(seam, encode(pipe, "a ghost")) is not None


def test_what_is_not_announced_is_proved_first(pipe: Any) -> None:
    seam = TextSeam(backend_of(pipe))

    def fail() -> None:
        raise AttestationError("gone")

    seam.attach(fail)
    with pytest.raises(AttestationError):
        encode(pipe, "a fox")
    token = seam.announce([("a fox",)])
    encode(pipe, "a fox")
    seam.end_announcement(token)
    seam.detach()
    encode(pipe, "a fox")


def test_detaching_is_the_exact_inverse() -> None:
    pipe = tiny_sd()
    before = state_of(pipe.text_encoder)
    seam = TextSeam(backend_of(pipe))
    seam.attach(lambda: None)
    assert seam.attached
    seam.detach()
    seam.detach()
    assert not seam.attached
    assert same_state(before, state_of(pipe.text_encoder))


def test_the_tokenizer_is_a_copy_that_reads_as_the_original(pipe: Any) -> None:
    backend = backend_of(pipe)
    texts = ["a ghost", "gh0st, in the style of VAN gogh!", "", "fox " * 40, "émigré 梵高 👻"]
    wanted = pipe.tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    pipe.tokenizer(texts, padding="longest")  # changes the settings of the original
    assert torch.equal(backend.tokenise(texts), wanted)
    for row in wanted.tolist():
        assert backend.text_of(row) == pipe.tokenizer.decode(row, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("a ghost", {"a ghost"}),
        ("gh0st", {"gh 0 st", "gh0st"}),
        ("gho-st", {"gho - st", "gho-st"}),
        ("g h", {"g h"}),
        ("a fox, a van", {"a fox , a van", "a fox,a van"}),
    ],
)
def test_readings_with_and_without_the_spaces_that_tokens_lose(text: str, readings: set[str], pipe: Any) -> None:
    backend = backend_of(pipe)
    assert set(backend.readings(ids_of(pipe, text)[0].tolist())) == readings


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_an_end_token_in_a_prompt_hides_nothing(pad: str) -> None:
    words, others = (ClipWords(tiny_tokenizer(), size=600) for _ in range(2))
    for each, token in ((words, pad), (others, "!")):
        each._tokenizer.pad_token = token
    for text, wanted in (
        ("a fox", "a fox"),
        ("a fox<|endoftext|> ghost", "a fox ghost"),
        ("wow!!", "wow !!"),
        ("", ""),
        ("fox " * 40, " ".join(["fox"] * 14)),
    ):
        ids = words.tokenise([text])
        assert words.text_of(ids[0].tolist()) == wanted
        assert torch.equal(words.padded_as(ids, others), others.tokenise([text]))
