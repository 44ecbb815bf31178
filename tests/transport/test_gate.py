"""The gate on a real text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_sd

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.errors import UnsupportedBackendError
from safegen.text import PhraseMatcher
from safegen.transport.curve import Curve
from safegen.transport.scores import token_overlap
from safegen.transport.transport import Gate, Reading, Score, Target

EXACT = {"paper": Curve(1.0, 1.0)}  # only the whole name, or all its tokens
EQ_11 = {"paper": Curve(0.0, 1.0)}


@pytest.fixture(scope="module")
def backend() -> Backend:
    return backend_of(tiny_sd())


def words(backend: Backend, text: str) -> tuple[tuple[int, str], ...]:
    return backend.words(backend.tokenise([text])[0].tolist())


@pytest.mark.parametrize(
    ("prompt", "concept", "wanted"),
    [
        ("a white van", "van gogh", 0.5),
        ("in the style of van gogh", "van gogh", 1.0),
        ("VAN   GOGH", "van gogh", 1.0),
        ("a photo of the fox", "van gogh", 0.0),  # begin, end and padding are shared by all texts and must not count
        ("", "van gogh", 0.0),
        ("the mouse", "mickey mouse", 0.5),
        ("a ghost " + "fox " * 30, "ghost", 1.0),
        ("fox " * 30 + "ghost", "ghost", 0.0),  # past the last token that the model reads
    ],
)
def test_eq_10_on_real_tokens(prompt: str, concept: str, wanted: float, backend: Backend) -> None:
    ids = [[token for token, _ in words(backend, text)] for text in (prompt, concept)]
    assert token_overlap(ids[:1], ids[1:]).item() == wanted


def test_words_leave_the_special_tokens_out(backend: Backend) -> None:
    ids = backend.tokenise(["a ghost"])
    assert ids.shape == (1, 16)
    assert [word for _, word in words(backend, "a ghost")] == ["a", "ghost"]
    assert backend.text_of(ids[0].tolist()) == "a ghost"
    assert words(backend, "") == ()
    # A full row has no end token to stop at but the last.
    assert len(words(backend, "fox " * 40)) == 14


def test_tokens_have_their_places_and_are_never_cut(backend: Backend) -> None:
    text = "A  GHOST, gh\u200bost " + "fox " * 30
    tokens = backend.tokens(text)
    assert len(tokens) > 30
    assert text[tokens[1].start : tokens[1].end] == "GHOST"
    assert [token.id for token in tokens[:14]] == [token for token, _ in words(backend, text)]


def gate(backend: Backend, *targets: Target, phrases: tuple[str, ...] = ()) -> Gate:
    matcher = PhraseMatcher(phrases) if phrases else None

    def find(text: str) -> Mapping[int, tuple[str, ...]]:
        found = tuple(m.phrase for m in matcher.find(text)) if matcher else ()
        return {0: found} if found else {}

    return Gate(backend, targets, find)


def reading(backend: Backend, gate: Gate, *texts: str, known: bool = True, every: bool = False) -> Reading:
    ids = backend.tokenise(texts)
    return gate.read(backend.encode(ids), [row if known else None for row in ids.tolist()], every=every)


def read(backend: Backend, gate: Gate, *texts: str, known: bool = True) -> list[list[Score]]:
    found = reading(backend, gate, *texts, known=known)
    return [[found.score(row, k) for k in range(len(gate.targets))] for row in range(len(texts))]


def test_eq_11_takes_the_larger_score(backend: Backend) -> None:
    low = gate(backend, Target(("van gogh",), EQ_11))
    (named,), (half,), (none,) = read(backend, low, "van gogh fox", "a van", "fox")
    assert (named.token, named.paper, named.permeability) == (1.0, 1.0, 1.0)
    assert half.token == 0.5
    assert half.permeability == half.paper == max(half.clipcos or 0, 0.5)
    assert none.token == 0.0
    assert none.permeability == none.clipcos
    assert none.permeability > 0
    assert (named.words, half.words, none.words) == (("van", "gogh"), ("van",), ())


def test_below_its_threshold_a_membrane_is_exactly_shut(backend: Backend) -> None:
    ((score,),) = read(backend, gate(backend, Target(("van gogh",), EXACT)), "a white van")
    assert (score.clipcos or 0) > 0.5
    assert score.permeability == 0.0
    assert score.words == ()


def test_the_largest_score_over_a_targets_names_counts(backend: Backend) -> None:
    both = gate(backend, Target(("ghost", "van gogh"), EXACT), Target(("fox",), EXACT))
    first, second = read(backend, both, "a van gogh", "the fox")
    assert [s.permeability for s in first] == [1.0, 0.0]
    assert [s.permeability for s in second] == [0.0, 1.0]
    for score in ("direction", "paper"):
        alone = [
            reading(backend, gate(backend, Target((name,), {})), "a van gogh", every=True).graded[score].item()
            for name in ("ghost", "van gogh")
        ]
        assert reading(backend, both, "a van gogh", every=True).graded[score][0, 0].item() == max(alone)


def test_the_name_itself_has_the_full_direction_and_the_empty_prompt_none(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {"direction": Curve(0.9, 1.0)}))
    (name,), (other,), (empty,) = read(backend, looking, "ghost", "the fox in a photo", "")
    assert (name.direction, name.permeability) == (1.0, 1.0)
    assert (other.direction or 0) < 0.9
    assert (empty.direction, empty.permeability) == (0.0, 0.0)
    assert (name.clipcos, name.token) == (None, None)  # what nothing opens by is not computed


def test_between_its_thresholds_a_membrane_opens_in_proportion(backend: Backend) -> None:
    value = reading(backend, gate(backend, Target(("ghost",), {})), "a ghost", every=True).graded["direction"].item()
    ((score,),) = read(
        backend, gate(backend, Target(("ghost",), {"direction": Curve(value - 0.1, value + 0.3)})), "a ghost"
    )
    assert score.permeability == pytest.approx(0.25, abs=1e-5)


def test_the_score_that_opens_furthest_counts(backend: Backend) -> None:
    curves = {"direction": Curve(0.999, 1.0), "paper": Curve(0.4, 0.8)}
    ((score,),) = read(backend, gate(backend, Target(("van gogh",), curves)), "a van in the photo")
    assert score.paper is not None
    assert score.permeability == pytest.approx(min(1.0, (score.paper - 0.4) / 0.4), abs=1e-5)


def test_least_holds_for_every_prompt(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {}, least=0.25), Target(("fox",), {}, least=1.0))
    found = reading(backend, looking, "ghost", "", known=False)
    assert found.permeability.tolist() == [[0.25, 1.0], [0.25, 1.0]]


@pytest.mark.parametrize("text", ["g h o s t", "gh0st", "ｇhｏst", "g\u200bhost", "gh\u00f6st", "GHOST", "gho-st"])
def test_an_obfuscated_spelling_opens_by_the_lexical_part(text: str, backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {}), phrases=("ghost",))
    ((score,),) = read(backend, looking, text)
    assert (score.lexical, score.permeability) == (1.0, 1.0)
    assert "ghost" in score.words


def test_words_open_only_where_they_are_asked(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {}, lexical=False), phrases=("ghost",))
    ((score,),) = read(backend, looking, "a ghost")
    assert (score.lexical, score.permeability) == (0.0, 0.0)


def test_the_lexical_part_reads_what_the_model_reads(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {}), phrases=("ghost",))
    ((score,),) = read(backend, looking, "fox " * 30 + "ghost")
    assert (score.lexical, score.permeability) == (0.0, 0.0)


def test_of_a_row_of_unknown_origin_only_the_encoding_is_known(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {"paper": Curve(0.9, 0.999)}), phrases=("ghost",))
    ((score,),) = read(backend, looking, "ghost", known=False)
    assert (score.token, score.lexical, score.known, score.words) == (None, None, False, ())
    assert score.clipcos == score.permeability == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_is_told_and_its_neighbours_are_read(value: float, backend: Backend) -> None:
    ids = backend.tokenise(["a fox", "a ghost"])
    states = backend.encode(ids)
    looking = gate(backend, Target(("ghost",), {"direction": Curve(0.5, 1.0), "paper": Curve(0.5, 1.0)}))
    sound = looking.read(states, ids.tolist())
    broken = states.clone()
    broken[0, 3, 3] = value
    found = looking.read(broken, ids.tolist())
    assert (list(sound.finite), list(found.finite)) == ([True, True], [False, True])
    assert found.permeability[0].tolist() == [1.0]
    assert torch.equal(found.permeability[1], sound.permeability[1])
    assert (found.score(0, 0).direction, found.score(0, 0).paper) == (None, None)


def test_an_encoder_that_returns_no_numbers_is_refused() -> None:
    pipe = tiny_sd()
    pipe.text_encoder.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(UnsupportedBackendError, match="NaN or infinity"):
        gate(backend_of(pipe), Target(("ghost",), {}))


def test_without_membranes_there_are_no_scores(backend: Backend) -> None:
    assert read(backend, gate(backend), "ghost", "fox") == [[], []]
    assert reading(backend, gate(backend), "ghost", every=True).permeability.shape == (1, 0)


def joined(backend: Backend, *chunks: str) -> tuple[torch.Tensor, list[int]]:
    """Conditioning of a long prompt, encoded in chunks as hosts for long prompts do."""
    ids = backend.tokenise(chunks)
    return backend.encode(ids).flatten(0, 1)[None], ids.flatten().tolist()


def test_of_long_conditioning_the_largest_score_of_the_chunks_counts(backend: Backend) -> None:
    curves = {"direction": Curve(0.0, 1.0), "paper": Curve(0.0, 1.0)}
    looking = gate(backend, Target(("ghost",), curves), phrases=("ghost",))
    chunks = ("a fox in the style of the photo", "the van", "the ghost in a photo")
    states, ids = joined(backend, *chunks)
    assert states.shape[1] == 3 * looking.window
    found = looking.read(states, [ids])
    each = reading(backend, looking, *chunks)
    for score in ("direction", "paper"):
        assert found.graded[score].item() == pytest.approx(each.graded[score].max().item(), abs=1e-5)
    assert found.lexical.item() == 1.0
    assert looking.read(states, [None]).graded["direction"].item() == found.graded["direction"].item()


def test_a_phrase_may_go_on_in_the_next_chunk(backend: Backend) -> None:
    looking = gate(backend, Target(("van gogh",), {}), phrases=("van gogh",))
    states, ids = joined(backend, "in the style of van", "gogh, a fox")
    assert looking.read(states, [ids]).permeability.item() == 1.0


def test_conditioning_of_any_length_is_read(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), {"direction": Curve(0.5, 1), "paper": Curve(0.5, 1)}))
    states = backend.encode(backend.tokenise(["ghost"]))
    for length in (1, 5, 16, 17, 31):
        row = torch.cat([states, states], dim=1)[:, :length]
        found = looking.read(row, [None])
        assert found.permeability.shape == (1, 1)
        assert bool(torch.isfinite(found.permeability).all())


@given(
    noise=st.text(st.sampled_from("\u200b\u200c\u200d\u00ad\u2060\ufeff\u0301\u034f"), max_size=6), at=st.integers(0, 5)
)
@settings(max_examples=40, deadline=None)
def test_invisible_characters_never_shut_a_membrane(backend: Backend, noise: str, at: int) -> None:
    looking = gate(backend, Target(("ghost",), {}), phrases=("ghost",))
    plain = "a ghost"
    text = plain[: 2 + at] + noise + plain[2 + at :]
    ids = backend.tokenise([text])[0].tolist()
    if len(backend.words(ids)) >= 14:
        return  # so much noise that the name falls behind the last token that the model reads
    ((score,),) = read(backend, looking, text)
    assert score.permeability == 1.0


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), min_size=1, max_size=6), data=st.data()
)
@settings(max_examples=30, deadline=None)
def test_permuting_rows_permutes_permeabilities(backend: Backend, texts: list[str], data: st.DataObject) -> None:
    looking = gate(
        backend,
        Target(("ghost",), {"direction": Curve(0.2, 0.9), "paper": Curve(0.2, 0.9)}),
        Target(("van gogh",), {"direction": Curve(0.0, 0.5)}),
        phrases=("ghost",),
    )
    order = data.draw(st.permutations(range(len(texts))))
    ids = backend.tokenise(texts)
    states = backend.encode(ids)
    found = looking.read(states, ids.tolist()).permeability
    permuted = looking.read(states[list(order)], [ids[k].tolist() for k in order]).permeability
    assert bool(((found >= 0) & (found <= 1)).all())
    torch.testing.assert_close(permuted, found[list(order)], atol=2e-6, rtol=0)


def test_reading_does_not_depend_on_the_batch(backend: Backend) -> None:
    curves = {"direction": Curve(0.2, 1.0), "paper": Curve(0.5, 1.0)}
    looking: Any = gate(backend, Target(("ghost",), curves), Target(("van gogh",), curves))
    texts = ["a ghost", "the fox", "van"]
    together = read(backend, looking, *texts)
    for text, scores in zip(texts, together, strict=True):
        (alone,) = read(backend, looking, text)
        assert [s.permeability for s in alone] == pytest.approx([s.permeability for s in scores], abs=1e-6)
