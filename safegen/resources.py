"""Where the files that travel with safegen lie: in an installed wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safegen.errors import SafegenError

_PACKAGE = Path(__file__).resolve().parent


def shipped(kind: Literal["policies", "membranes"]) -> Path:
    """Returns the folder of shipped policies or membranes.

    Args:
        kind: Which folder.

    Returns:
        `safegen/_data/<kind>` of an installed wheel if it exists, else `<kind>` next to the package in a checkout.

    Raises:
        SafegenError: Neither exists: the installation is damaged.
    """
    places = (_PACKAGE / "_data" / kind, _PACKAGE.parent / kind)
    for place in places:
        if place.is_dir():
            return place
    looked = " nor ".join(str(place) for place in places)
    raise SafegenError(f"the shipped {kind} are missing: found neither {looked}; reinstall safegen")
