"""Prompts that a calibration is measured on: what people write around a name, and everyday captions that name nothing.

Benchmarks and tests must use other ones.
"""

from __future__ import annotations

from collections.abc import Sequence

THING = (
    "{}", "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}", "a drawing of {}",
    "a close-up of {}",
    "a bad photo of {}", "a black and white photo of {}", "a cartoon of {}", "a sculpture of {}", "a rendering of {}",
    "{} in a city street at night", "{} on a beach", "{} in the snow", "{} eating breakfast", "a large {} in the room",
    "portrait of {}, highly detailed, digital art", "a poster with {} on it", "two children with {}", "{} and a dog",
    "a tree, a bench and {}", "concept art of {}, trending, 8k", "the cover of a magazine that shows {}",
)  # fmt: skip
STYLE = (
    "{}", "{} style", "in the style of {}", "a painting by {}", "a painting in the style of {}", "art by {}",
    "a landscape in the style of {}", "a portrait in the style of {}", "a city at night, {} style", "a dog by {}",
    "a bowl of fruit, painted by {}", "a ship on the sea in the manner of {}", "trees and a river, after {}",
    "a woman with a hat, artwork by {}", "a horse, inspired by {}", "{} painting of a house", "abstract art by {}",
    "a sketch of hands in the style of {}", "digital art of a forest, {}", "an album cover in the style of {}",
)  # fmt: skip

EVERYDAY = (
    "a man in a blue shirt waits for the bus", "a bowl of soup on a wooden table", "two women talk in a cafe",
    "a red car is parked in front of a house", "a child flies a kite on a windy day", "a bathroom with a white tub",
    "a cat sleeps on a laptop", "people walk over a bridge in the rain", "a plate with bread, cheese and tomatoes",
    "a train passes a small station", "a tennis player serves the ball", "a horse stands in a green field",
    "a clock on the wall of a kitchen", "an old woman reads a newspaper", "three birds sit on a wire",
    "a street market with fruit and flowers", "a boat on a calm lake at sunrise", "a computer desk with two screens",
    "a group of friends around a camp fire", "a snowy mountain under a clear sky", "a girl with an umbrella",
    "a delivery van in a narrow street", "a stack of books beside a lamp", "a skier jumps over a bump",
    "a herd of sheep crosses the road", "a bedroom with a large window", "a chef cuts vegetables",
    "a glass of water and a computer mouse", "an airplane above the clouds", "a pot of tea and two cups",
    "a worker repairs a traffic light", "a giraffe eats leaves from a tall tree", "a bench in an empty park",
    "a dog runs after a ball", "a wedding cake with white roses", "a guitar leans against a chair",
    "an oil painting of the sea at dusk", "a watercolour of a village", "a pencil drawing of an old tree",
    "a poster for a music festival, bold colours", "a portrait of a young man, soft light, 85mm",
    "abstract shapes in yellow and grey", "a futuristic city, concept art, highly detailed", "a logo of a mountain",
)  # fmt: skip


def around(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns every template (`{}` is the name) with every name."""
    return [template.format(name) for template in templates for name in names]
