"""The shipped catalogue and the strict policy: sane content, quiet on ordinary captions, awake on names."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from safegen.errors import PolicyNotFoundError, PolicyValidationError
from safegen.mini.catalogue import OBJECTS, STYLES
from safegen.policy.catalogue import Catalogue, load_catalogue
from safegen.policy.context import utc_now
from safegen.policy.hits import lexical_hits
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.text import normalise, phrase_matches

ORDINARY = """
A kitchen with white cabinets and a grey counter top.
A glazed donut propped against a cup of coffee.
An old green fire hydrant sits on a grassy curb.
A white delivery van parked on the side of the road.
Two men in an iron, man-made boat on a lake.
A person riding skis across snow covered ground.
A computer mouse next to a keyboard.
A joker card lying on a poker table.
A woman with nude lipstick and a nude dress.
Stars visible to the naked eye above the desert.
A topless bus full of tourists in the city.
A group of baseball players, a bat, man and ball.
A cat, woman and child on a sofa.
A couple camping under the starry night sky.
A plastic elephant and a toy robot on a shelf.
A red flash of lightning over the mountains.
The hulk of a rusty ship on the beach.
Portrait with Rembrandt lighting, studio photo.
A black panther resting on a tree branch.
A black widow spider in its web.
A wolverine walking through the snow.
A goofy dog with its tongue out.
The planet Pluto seen from a probe.
A daisy in a field, a duck on the pond.
An athlete finishing the Ironman triathlon.
A turner working at the lathe, a constable beside him.
A pollock fillet on a plate with mucha salsa.
Chicken breasts on a grill.
A plate of sushi and a cup noodle.
A knot in a tie, un nudo de corbata.
Un garçon pieds nus sur la plage.
Barefoot child on grass, नंगे पैर बच्चा
カップヌードルとアネモネの花
咖啡杯和更高更快的汽车
레모네이드와 누드김밥
Голые деревья зимой
A boy climbs a spider web made of rope.
A pair of scissors, a thorn and a wall.
Snow white sheets on a hotel bed.
A man in an iron suit of medieval armour.
A shirtless man doing skateboarding tricks near a stream.
A robin and a raven on a garfield street sign.
""".strip().splitlines()

TRIGGERS = [
    ("a photo of a naked person", "nudity"),
    ("foto de una persona desnuda", "nudity"),
    ("une femme nue sur un lit", "nudity"),
    ("eine nackte Frau am Strand", "nudity"),
    ("uma mulher nua na praia", "nudity"),
    ("una donna nuda", "nudity"),
    ("全裸の女性", "nudity"),
    ("裸体女人的照片", "nudity"),
    ("알몸의 여자", "nudity"),
    ("обнажённая девушка", "nudity"),
    ("صورة امرأة عارية", "nudity"),
    ("नग्न महिला", "nudity"),
    ("a n u d e woman", "nudity"),
    ("n@ked woman with nude lipstick", "nudity"),
    ("a starry field in the style of Van Gogh", "van-gogh"),
    ("поле в стиле Ван Гога", "van-gogh"),
    ("梵高风格的星空", "van-gogh"),
    ("Picasso's Cubism", "picasso"),
    ("a melting city, style of Dali", "dali"),
    ("epic castle, Greg Rutkowski, artstation", "rutkowski"),
    ("a forest, Studio Ghibli", "miyazaki"),
    ("Mickey Mouse is eating a burger", "mickey-mouse"),
    ("м1ckey m0use at the beach", "mickey-mouse"),
    ("米老鼠在吃汉堡", "mickey-mouse"),
    ("spiderman on a swing", "spider-man"),
    ("Homem-Aranha na chuva", "spider-man"),
    ("tony stark in his lab", "iron-man"),
    ("the incredible hulk", "hulk"),
    ("ピカチュウの絵", "pikachu"),
    ("snoo-py dancing", "snoopy"),
    ("Bob Esponja cozinhando", "spongebob-squarepants"),
    ("Elsa from Frozen", "elsa"),
    ("Darth Vader holding a light saber", "darth-vader"),
    ("the Mona Lisa with sunglasses", "mona-lisa"),
    ("van gogh's starry night as a mug", "the-starry-night"),
    ("girl with the pearl earring, photo", "girl-with-a-pearl-earring"),
    ("Munch's scream", "the-scream"),
    ("The Great Wave off Kanagawa", "great-wave"),
]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


@pytest.fixture(scope="module")
def strict(catalogue: Catalogue) -> ResolvedPolicy:
    return resolve(load_policy("strict"), catalogue, available=(), now=utc_now())


def test_counts(catalogue: Catalogue) -> None:
    counts = Counter(catalogue.concepts[name].category for name in catalogue.world)
    assert counts["explicit"] >= 1
    assert counts["artist-style"] >= 40
    assert counts["ip-character"] >= 60
    assert counts["memorised"] >= 10


def test_living_artists_are_flagged(catalogue: Catalogue) -> None:
    living = {c.id for c in catalogue.concepts.values() if c.living}
    assert {"rutkowski", "mckernan", "miyazaki", "banksy", "kusama"} <= living
    assert not {"van-gogh", "picasso", "warhol", "toriyama", "kim-jung-gi", "kinkade"} & living


def test_nudity_speaks_many_languages(catalogue: Catalogue) -> None:
    assert {"es", "fr", "de", "pt", "it", "ja", "zh", "ko", "ru", "ar", "hi"} <= set(
        catalogue.concepts["nudity"].languages
    )


def test_no_two_world_concepts_share_a_phrase(catalogue: Catalogue) -> None:
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for name in catalogue.world:
        for phrase in catalogue.concepts[name].phrases:
            owners["".join(c for c in normalise(phrase) if c.isalnum())].add(name)
    assert {phrase: names for phrase, names in owners.items() if len(names) > 1} == {}


def test_every_benign_phrase_excuses_something(catalogue: Catalogue) -> None:
    idle = [
        (concept.id, benign)
        for concept in catalogue.concepts.values()
        for benign in concept.benign
        if not any(phrase_matches(phrase, benign) for phrase in concept.phrases)
    ]
    assert idle == []


def test_mini_has_one_concept_per_name(catalogue: Catalogue) -> None:
    mini = {name for name in catalogue.concepts if name not in catalogue.world}
    expected = {o.name.replace(" ", "-"): "ip-character" if o.character else "object" for o in OBJECTS}
    expected |= {style.name: "artist-style" for style in STYLES}
    assert {name: catalogue.concepts[name].category for name in mini} == expected
    for thing in OBJECTS:
        phrases = catalogue.concepts[thing.name.replace(" ", "-")].phrases
        assert set(phrases) == {thing.name, *thing.synonyms}


def test_mini_styles_are_found_in_every_caption_of_theirs(catalogue: Catalogue) -> None:
    for style in STYLES:
        for caption in style.phrases:
            text = caption.format("fox", a="a fox")
            found = {s.name for s in STYLES if any(phrase_matches(p, text) for p in catalogue.concepts[s.name].phrases)}
            assert found == {style.name}, text


@pytest.mark.parametrize("caption", ORDINARY)
def test_strict_is_quiet_on_ordinary_captions(strict: ResolvedPolicy, caption: str) -> None:
    assert lexical_hits(strict, caption) == ()


@pytest.mark.parametrize(("prompt", "concept"), TRIGGERS)
def test_strict_hears_names(strict: ResolvedPolicy, prompt: str, concept: str) -> None:
    assert concept in {hit.concept for hit in lexical_hits(strict, prompt)}


def test_every_name_is_heard(strict: ResolvedPolicy, catalogue: Catalogue) -> None:
    for name in catalogue.world:
        for phrase in catalogue.concepts[name].phrases:
            assert name in {hit.concept for hit in lexical_hits(strict, f"x {phrase} y")}, phrase


def test_wildcards_take_the_world_only(catalogue: Catalogue) -> None:
    assert {concept.id for concept in catalogue.select("artist-style/*")} <= catalogue.world
    assert [concept.id for concept in catalogue.select("popart")] == ["popart"]
    assert catalogue.select("object/*") == ()


HEAD = "apiVersion: safegen.dev/v1\nkind: Concepts\ncollection: world\nconcepts:\n"


def test_catalogue_faults_have_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        HEAD + "  - {id: a, name: A, category: artist-style}\n"
        "  - {id: a, name: '!?', category: objekt, aliasses: [x]}\n"
        "  - {id: c, name: C, category: object, languages: {english: [c]}}\n",
        encoding="utf-8",
    )
    with pytest.raises(PolicyValidationError) as caught:
        load_catalogue(tmp_path)
    faults = [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]
    assert faults[0] == "6:19: name: phrase '!?' has no letter or digit; found '!?'"
    assert faults[1].startswith("6:35: unknown category 'objekt'. Did you mean 'object'?")
    assert faults[2].startswith("6:43: unknown key 'aliasses'. Did you mean 'aliases'?")
    assert "7:" in faults[3]


def test_faults_between_concepts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEAD + "  - {id: a, name: A, category: artist-style}\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text(HEAD + "  - {id: a, name: B, category: object, living: true}\n", encoding="utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        load_catalogue(tmp_path)
    first, second, third = map(str, caught.value.problems)
    assert first.endswith("a.yaml:5:10: concept 'a': state `living: true` or `living: false`")
    assert "b.yaml:5:10: concept id 'a' is taken at" in second
    assert third.endswith("`living` is for artists only; remove it")


def test_an_empty_folder_is_no_catalogue(tmp_path: Path) -> None:
    with pytest.raises(PolicyNotFoundError, match="no concept file"):
        load_catalogue(tmp_path)
