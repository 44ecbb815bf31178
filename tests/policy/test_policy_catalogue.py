"""The shipped catalogue and the strict policy: sane content, quiet on ordinary captions, awake on names."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from safegen.errors import PolicyNotFoundError, PolicyValidationError
from safegen.mini.catalogue import OBJECTS, STYLES
from safegen.policy.catalogue import Catalogue, _shipped_catalogue, load_catalogue
from safegen.policy.compiled import compile_folder, read_compiled
from safegen.policy.context import utc_now
from safegen.policy.hits import lexical_hits
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.resources import shipped
from safegen.text import normalise, phrase_matches

CONCEPTS = shipped("policies") / "concepts"

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
Anders and Maria at the beach.
A green lantern hanging from the ceiling of a porch.
A grumpy bear in the woods.
A bucket of Popeyes chicken on the counter.
A rainbow dash of colour on the wall.
The wine maker has to degas the wine.
Un topolino grigio mangia il formaggio.
Una linterna verde en la mesa.
Солдаты гибли под Москвой
天花板上吊灯很亮
A carta de despido del trabajador.
A child with a water gun and a glue gun.
A man cutting himself a slice of bread.
Poppies, flour and a syringe on the table.
オートマティスムの詩
""".strip().splitlines()

# Words of everyday captions: a name that is one of them must at least have harmless uses listed.
WORDS = """
able about above air all and animal apple arm art baby back bag ball bank bar bat bath beach bear bed bee bell bench big
bike bird black blank block blue board boat body book bottle bowl box boy branch bread bridge brown bus cake camera can
candle cap car cars cat chair child church city clay clean clock close cloud coast coat coffee cold colour comb computer
corner couch couple cow cup cut dark dash day deer desk dog door drum duck ear elf eye face fall family fan farm fast
father feet fence field figure film fire fish flag flash flat floor flower fly foot forest fork fox frog front frozen
fruit game garden gift girl glass goat good grass grey ground group gun hair hammer hand hat head heart hill hold home
horse hot hotel house hulk ice ink iron jack jar joker jump kettle key king kirby kiss kitchen kite knife lake lamp land
lane large laptop leaf left leg light line link lion lit loki long look love lunch magic man many map market marvel men
metal miss moment money monkey moon mother motor mountain mouse mouth move mug naked navy near neck net night nude
ocean office old olive open orange oven owl page paint pan paper park party pen people phone photo piano picture pie pig
pink pizza plane plant plate play player pluto pole pond pool pot predator prince princess pulp race rain raphael ray
read red ring river road robin rock rocket roof room rope rose round row rug run running salt sand scene school sea seat
shadow shark sheep ship shirt shoe shop sign silver sink sit ski sky sleep small smile snow sofa sonic spider spoon
sport square stand star station steel step stern stitch stone stop storm stove street style suit summer sun surf swan
table tail tall tea teddy tennis tent the thing thor tie tiger time toast toilet top touch towel tower toy track traffic
train tray tree truck tub turner turtle umbrella van vase venom view wall warm wash watch water wave white wild wind
window wine wing winter wolf wolverine woman women wood woody word work yard yellow young zebra zoo
"""

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


@pytest.fixture(scope="module")
def checked() -> Catalogue:
    return load_catalogue(CONCEPTS)


def test_the_shipped_catalogue_has_no_fault_between_its_phrases_and_its_compiled_form_is_fresh(
    catalogue: Catalogue, checked: Catalogue
) -> None:
    assert (CONCEPTS / "compiled.json").read_text("utf-8") == compile_folder(CONCEPTS), (
        "the catalogue was edited: run python -m safegen.policy.compiled"
    )
    assert catalogue == checked


def test_an_edited_file_counts_and_not_its_compiled_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(CONCEPTS, tmp_path / "policies" / "concepts"))
    monkeypatch.setattr("safegen.policy.catalogue.shipped", tmp_path.joinpath)
    path = folder / "memorised.yaml"
    assert read_compiled(folder).keys() == {one.name for one in folder.glob("*.yaml")}
    path.write_text(path.read_text("utf-8").replace("the Gioconda", "the smiling lady"), "utf-8")
    assert "memorised.yaml" not in read_compiled(folder)
    (folder / "compiled.json").write_text('{"memorised.yaml": {"sha256"', "utf-8")
    assert read_compiled(folder) == {}
    _shipped_catalogue.cache_clear()
    try:
        assert "the smiling lady" in load_catalogue().concepts["mona-lisa"].aliases
        _shipped_catalogue.cache_clear()
        for one in folder.glob("*.yaml"):
            one.unlink()
        with pytest.raises(PolicyNotFoundError, match="no concept file"):
            load_catalogue()
    finally:
        _shipped_catalogue.cache_clear()


@pytest.fixture(scope="module")
def kids(catalogue: Catalogue) -> ResolvedPolicy:
    return resolve(load_policy("kids"), catalogue, available=(), now=utc_now())


def test_counts(catalogue: Catalogue) -> None:
    counts = Counter(catalogue.concepts[name].category for name in catalogue.world)
    assert counts["explicit"] >= 1
    assert counts["artist-style"] >= 40
    assert counts["ip-character"] >= 60
    assert counts["memorised"] >= 10


def test_living_artists_are_flagged(catalogue: Catalogue) -> None:
    living = {c.id for c in catalogue.concepts.values() if c.living}
    assert {"rutkowski", "mckernan", "miyazaki", "banksy", "kusama", "kiefer"} <= living
    assert not {"van-gogh", "picasso", "warhol", "toriyama", "kim-jung-gi", "kinkade", "wyeth"} & living
    artists = {name for name in catalogue.world if catalogue.concepts[name].category == "artist-style"}
    assert {c.id for c in catalogue.concepts.values() if c.living is not None} == artists


LANGUAGES = {"es", "fr", "de", "pt", "it", "ja", "zh", "ko", "ru", "ar", "hi"}


def test_nudity_and_what_is_kept_from_children_speak_many_languages(catalogue: Catalogue) -> None:
    for name in ("nudity", "gore", "self-harm", "firearms", "drugs", "hate-symbols"):
        assert set(catalogue.concepts[name].languages) >= LANGUAGES, name


def test_names_that_differ_between_scripts_are_there_for_most(catalogue: Catalogue) -> None:
    world = [catalogue.concepts[name] for name in catalogue.world]
    mini = [c for c in catalogue.concepts.values() if c.id not in catalogue.world]
    for code, share in {"ru": 0.7, "ja": 0.7, "zh": 0.6, "ko": 0.5}.items():
        assert sum(code in c.languages for c in world) >= share * len(world), code
    for code in LANGUAGES:
        assert sum(code in c.languages for c in mini) >= 0.7 * len(mini), code


def test_every_concept_has_neighbours_to_keep(catalogue: Catalogue) -> None:
    assert [c.id for c in catalogue.concepts.values() if not c.neighbours] == []


def test_no_name_is_an_ordinary_english_word_without_a_guard(catalogue: Catalogue) -> None:
    ordinary = set(WORDS.split())
    assert len(ordinary) > 250
    for concept in catalogue.concepts.values():
        mini = concept.id not in catalogue.world
        foreign = [phrase for phrases in concept.languages.values() for phrase in phrases]
        caught = {normalise(phrase) for phrase in (foreign if mini else concept.phrases)} & ordinary
        assert not caught or concept.benign, (concept.id, caught)


def test_mini_has_one_concept_per_name(catalogue: Catalogue) -> None:
    mini = {name for name in catalogue.concepts if name not in catalogue.world}
    expected = {o.name.replace(" ", "-"): "ip-character" if o.character else "object" for o in OBJECTS}
    expected |= {style.name: "artist-style" for style in STYLES}
    assert {name: catalogue.concepts[name].category for name in mini} == expected
    for thing in OBJECTS:
        concept = catalogue.concepts[thing.name.replace(" ", "-")]
        assert {concept.name, *concept.aliases} == {thing.name, *thing.synonyms}
    drawn = {o.name for o in OBJECTS} | {s.name for s in STYLES}
    assert [(c, n) for c in sorted(mini) for n in catalogue.concepts[c].neighbours if n not in drawn] == []


def test_mini_styles_are_found_in_every_caption_of_theirs(catalogue: Catalogue) -> None:
    for style in STYLES:
        for caption in style.phrases:
            text = caption.format("fox", a="a fox")
            found = {s.name for s in STYLES if any(phrase_matches(p, text) for p in catalogue.concepts[s.name].phrases)}
            assert found == {style.name}, text


@pytest.mark.parametrize("caption", ORDINARY)
def test_strict_and_kids_are_quiet_on_ordinary_captions(
    strict: ResolvedPolicy, kids: ResolvedPolicy, caption: str
) -> None:
    assert lexical_hits(strict, caption) == ()
    assert lexical_hits(kids, caption) == ()


@pytest.mark.parametrize(("prompt", "concept"), TRIGGERS)
def test_strict_hears_names(strict: ResolvedPolicy, prompt: str, concept: str) -> None:
    assert concept in {hit.concept for hit in lexical_hits(strict, prompt)}


def test_every_name_is_heard(strict: ResolvedPolicy, kids: ResolvedPolicy, catalogue: Catalogue) -> None:
    policy = {rule.concept.id: resolved for resolved in (kids, strict) for rule in resolved.rules}
    assert policy.keys() == catalogue.world
    for name in catalogue.world:
        for phrase in catalogue.concepts[name].phrases:
            assert name in {hit.concept for hit in lexical_hits(policy[name], f"x {phrase} y")}, phrase


def test_wildcards_take_the_world_only(catalogue: Catalogue) -> None:
    assert {concept.id for concept in catalogue.select("artist-style/*")} <= catalogue.world
    assert [concept.id for concept in catalogue.select("popart")] == ["popart"]
    assert catalogue.select("object/*") == ()


HEAD = "apiVersion: safegen.dev/v1\nkind: Concepts\ncollection: world\nsources: [made up]\nconcepts:\n"


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
    assert faults[0] == "7:19: name: phrase '!?' has no letter or digit; found '!?'"
    assert faults[1].startswith("7:35: unknown category 'objekt'. Did you mean 'object'?")
    assert faults[2].startswith("7:43: unknown key 'aliasses'. Did you mean 'aliases'?")
    assert faults[3].startswith("8:")


def test_faults_between_concepts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEAD + "  - {id: a, name: A, category: artist-style}\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text(HEAD + "  - {id: a, name: B, category: object, living: true}\n", encoding="utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        load_catalogue(tmp_path)
    first, second, third = map(str, caught.value.problems)
    assert first.endswith("a.yaml:6:10: concept 'a': state `living: true` or `living: false`")
    assert "b.yaml:6:10: concept id 'a' is taken at" in second
    assert third.endswith("`living` is for artists only; remove it")


PHRASE_FAULTS = [
    (
        "  - {id: a, name: Snoopy, category: object}\n  - {id: b, name: B, category: object, aliases: [SNO-OPY]}\n",
        "7:50: phrase 'SNO-OPY' is a name of concept 'a' too (",
    ),
    (
        "  - {id: a, name: A b, category: object, languages: {ru: [Оу, Ёж], fr: [Ou]}}\n"
        "  - {id: b, name: Еж, category: object}\n",
        "7:19: phrase 'Еж' is a name of concept 'a' too (",
    ),
    (
        "  - {id: a, name: nude, category: object, benign: [nude pump, nudge]}\n",
        "6:63: benign phrase 'nudge' holds no phrase of concept 'a', so it excuses nothing; remove or correct it",
    ),
    (
        "  - {id: a, name: van gogh, category: object, benign: [van gogh mug], neighbours: [a van, like van gogh]}\n",
        "6:91: neighbour 'like van gogh' names concept 'a' ('van gogh'); expected what must still be drawn",
    ),
    (
        "  - {id: a, name: van gogh, category: object, aliases: [gogh], benign: [van gogh museum, gogh]}\n",
        "6:57: phrase 'gogh' stands in a benign phrase of its own concept, so it never counts; remove one",
    ),
    (
        "  - {id: a, name: A, category: object, languages: {jp: [b]}}\n",
        "6:52: unknown language 'jp'; expected a code of ISO 639-1 (ja for Japanese, zh for Chinese)",
    ),
    ("  - {id: a, name: A, category: object, neighbours: ['?']}\n", "6:52: neighbours: phrase '?' has no letter"),
]


@pytest.mark.parametrize(("text", "message"), PHRASE_FAULTS)
def test_faults_between_phrases(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        load_catalogue(tmp_path)
    (fault,) = (str(problem).removeprefix(f"{path}:") for problem in caught.value.problems)
    assert fault.startswith(message), fault


def test_a_catalogue_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    concept = "  - {id: a, name: A, category: object}\n"
    for head, message in (
        (HEAD.replace("sources: [made up]\n", ""), "1:1: missing key 'sources'"),
        (HEAD.replace("[made up]", "[]"), "4:10: sources: expected at least one entry"),
    ):
        path.write_text(head + concept, encoding="utf-8")
        with pytest.raises(PolicyValidationError, match=message):
            load_catalogue(tmp_path)


def test_an_empty_folder_is_no_catalogue(tmp_path: Path) -> None:
    with pytest.raises(PolicyNotFoundError, match="no concept file"):
        load_catalogue(tmp_path)
