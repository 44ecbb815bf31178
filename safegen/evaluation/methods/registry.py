"""All erasing methods by name, each with the settings that it is compared with on safegen-mini."""

from __future__ import annotations

from collections.abc import Sequence

from safegen.errors import UsageError, did_you_mean
from safegen.evaluation.methods.ablation import ConceptAblation
from safegen.evaluation.methods.base import Method
from safegen.evaluation.methods.esd import EsdU, EsdX
from safegen.evaluation.methods.leco import Leco
from safegen.evaluation.methods.nothing import Nothing
from safegen.evaluation.methods.shipped import Safegen
from safegen.evaluation.methods.sld import Sld
from safegen.evaluation.methods.spm import SpmPublished, SpmReleased
from safegen.evaluation.methods.uce import Uce
from safegen.evaluation.methods.words import BlockList, NegativePrompt

_ALL: tuple[Method, ...] = (
    Nothing(),
    Safegen(),
    SpmReleased(),
    SpmPublished(),
    EsdX(),
    EsdU(),
    Uce(),
    ConceptAblation(),
    Leco(),
    Sld(),
    NegativePrompt(),
    BlockList(),
)
METHODS = {method.name: method for method in _ALL}


def find(names: Sequence[str]) -> tuple[Method, ...]:
    """Returns methods by name; all of them for no names.

    Raises:
        UsageError: There is no such method.
    """
    for name in names:
        if name not in METHODS:
            raise UsageError(f"no method {name!r}.{did_you_mean(name, METHODS)}")
    return tuple(METHODS[name] for name in names or METHODS)
