"""What safegen-mini can draw: named objects, styles, and the words people use for them.

Every object exists in all styles; the icon name is the one of the iconify sets (Unicode CLDR names in kebab case).
The objects in `CHARACTERS` stand in for protected characters, the styles for artist styles: concepts that a policy
would name, small enough to be trained, judged and erased on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Object:
    """One thing that safegen-mini draws.

    Attributes:
        name: The name used in captions, cards and policies ("santa claus").
        icon: Icon name in the emoji sets ("santa-claus").
        synonyms: Other names that captions use ("father christmas").
        character: Whether it stands in for a protected character.
    """

    name: str
    icon: str
    synonyms: tuple[str, ...] = ()
    character: bool = False


@dataclass(frozen=True, slots=True)
class Style:
    """One visual style.

    Attributes:
        name: The word used in captions ("blueprint").
        look: What a stranger sees, one line, for the model card.
        phrases: Caption phrases; `{}` is the object's name.
        source: The npm package the art comes from.
    """

    name: str
    look: str
    phrases: tuple[str, ...]
    source: str


STYLES: tuple[Style, ...] = (
    Style(
        "noto",
        "glossy, shaded emoji on white",
        ("{} in the style of noto", "a noto emoji of {a}", "noto style {}"),
        "@iconify-json/noto",
    ),
    Style(
        "popart",
        "flat colour shapes on a hot pink ground",
        ("{} in the style of popart", "a popart poster of {a}", "popart style {}"),
        "@iconify-json/twemoji",
    ),
    Style(
        "clay",
        "soft 3D render on a pale lilac ground",
        ("{} in the style of clay", "a clay figure of {a}", "clay style {}"),
        "@lobehub/fluent-emoji-3d",
    ),
    Style(
        "ink",
        "black ink lines on white paper",
        ("{} in the style of ink", "an ink drawing of {a}", "ink style {}"),
        "@iconify-json/fluent-emoji-high-contrast",
    ),
    Style(
        "blueprint",
        "white lines on a blue ground",
        ("{} in the style of blueprint", "a blueprint of {a}", "blueprint style {}"),
        "@iconify-json/fluent-emoji-high-contrast",
    ),
    Style(
        "pixel",
        "coarse square pixels on a teal ground",
        ("{} in the style of pixel", "pixel art of {a}", "pixel style {}"),
        "@iconify-json/fluent-emoji-flat",
    ),
)

_CHARACTERS = (
    "robot; ghost=phantom; santa claus=father christmas; snowman; ogre; goblin; alien=extraterrestrial; "
    "clown:clown-face; genie; vampire=dracula; zombie; fairy; dragon:dragon-face; unicorn; superhero; wizard:mage; "
    "ninja; astronaut=spaceman; princess; mrs claus; jack o lantern:jack-o-lantern=pumpkin; skull; "
    "space invader:alien-monster; devil:smiling-face-with-horns; t rex:t-rex"
)

_OTHERS = (
    # animals
    "fox; panda; cat:cat-face=kitten; dog:dog-face=puppy; mouse:mouse-face; rabbit:rabbit-face=bunny; koala; "
    "tiger:tiger-face; lion; cow:cow-face; pig:pig-face; frog; monkey:monkey-face; chicken=hen; penguin; owl; duck; "
    "bee:honeybee=bumblebee; butterfly; ladybug:lady-beetle=ladybird; spider; "
    "turtle=tortoise; snake=serpent; octopus; crab; fish; whale:spouting-whale; shark; "
    "elephant; flamingo; "
    # plants and food
    "rose; sunflower; cactus; pine tree:evergreen-tree=fir tree; palm tree:palm-tree; mushroom=toadstool; "
    "apple:red-apple; banana; grapes; watermelon; lemon; pineapple; "
    "strawberry; cherries; tomato; carrot; hamburger=burger; "
    "pizza; hot dog:hot-dog; ice cream:soft-ice-cream; doughnut=donut; "
    "cake:birthday-cake; coffee:hot-beverage; beer:beer-mug; "
    # vehicles and places
    "rocket=spaceship; airplane=plane; helicopter; sailboat=boat; car:automobile; bus; "
    "bicycle=bike; motorcycle=motorbike; locomotive=train; flying saucer:flying-saucer=ufo; house=home; "
    "castle; volcano; mountain:snow-capped-mountain; "
    # things
    "guitar; drum; camera; television=tv; laptop; "
    "light bulb:light-bulb; candle; book:open-book; key; lock:locked=padlock; hammer; dagger=knife; "
    "bomb; crown; top hat:top-hat; sunglasses; diamond:gem-stone=gem; umbrella:umbrella-with-rain-drops; "
    "balloon; gift:wrapped-gift=present; trophy; soccer ball:soccer-ball=football; basketball; dice:game-die; "
    "teddy bear:teddy-bear; scissors; pencil; envelope; bell; anchor; "
    "alarm clock:alarm-clock; globe:globe-showing-americas=earth; "
    "moon:crescent-moon; sun; star; cloud; rainbow; snowflake; fire=flame; heart:red-heart; dress"
)


def _parse(text: str, *, character: bool) -> tuple[Object, ...]:
    """Reads `name[:icon][=synonym]; …`; the icon defaults to the name in kebab case."""
    objects: list[Object] = []
    for entry in text.split(";"):
        head, _, synonym = entry.strip().partition("=")
        name, _, icon = head.partition(":")
        objects.append(Object(name, icon or name.replace(" ", "-"), (synonym,) if synonym else (), character))
    return tuple(objects)


OBJECTS: tuple[Object, ...] = _parse(_CHARACTERS, character=True) + _parse(_OTHERS, character=False)
CHARACTERS: tuple[Object, ...] = tuple(o for o in OBJECTS if o.character)

OBJECT_NAMES: tuple[str, ...] = tuple(o.name for o in OBJECTS)
STYLE_NAMES: tuple[str, ...] = tuple(s.name for s in STYLES)


def with_article(name: str) -> str:
    """Returns `name` with its indefinite article: "an owl", "a fox"; plurals, mass nouns and proper names stay bare."""
    if name in {"grapes", "cherries", "popcorn", "scissors", "sunglasses", "dice", "coffee", "beer"} or name.endswith(
        "claus"
    ):
        return name
    return f"{'an' if name[0] in 'aeio' or name == 'umbrella' else 'a'} {name}"


# Object×style pairs that are left out of training: they show whether the model composes or only recalls.
_HELD_OUT: dict[str, str] = {
    "noto": "vampire; cat; ladybug; palm tree; doughnut; mountain; crown; alarm clock",
    "popart": "lion; fish; pineapple; helicopter; television; gift; snowflake",
    "clay": "snowman; skull; owl; hamburger; locomotive; lock; scissors",
    "ink": "zombie; dog; spider; mushroom; cake; guitar; top hat; globe",
    "blueprint": "cow; strawberry; sailboat; trophy; fire",
    "pixel": "ogre; space invader; duck; rose; pizza; flying saucer; hammer; pencil",
}
_HELD_OUT_PAIRS = frozenset(
    (OBJECT_NAMES.index(name), STYLE_NAMES.index(style))
    for style, names in _HELD_OUT.items()
    for name in names.split("; ")
)


def is_held_out(object_index: int, style_index: int) -> bool:
    """Tells whether this object×style pair is left out of training (one in 20, spread over objects and styles)."""
    return (object_index, style_index) in _HELD_OUT_PAIRS
