"""Says which membranes of a `--membranes` folder nothing uses: somebody put them there to be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.cli.render import warn

if TYPE_CHECKING:
    from safegen.policy.resolve import ResolvedPolicy


def warn_of_unused(membranes: Sequence[Path], policy: ResolvedPolicy, family: str) -> None:
    """Warns of membranes in these folders that no rule of the policy uses.

    Args:
        membranes: The folders of `--membranes`.
        policy: The policy, resolved for the model.
        family: Base family of the model.
    """
    from safegen.bundle.store import concepts_in

    used = {rule.concept.id for rule in policy.rules if rule.uses_membrane}
    for root in membranes:
        found = concepts_in(root, family)
        idle = [concept for concept in found if concept not in used]
        if not found:
            warn(f"{root}: no membrane for this model in it; expected {root / family}/<concept id>/")
        elif idle:
            warn(
                f"{root}: no rule of policy {policy.id} erases {', '.join(idle)}, so nothing opens what lies there; "
                f"add a rule with `concept: {idle[0]}` to your policy"
            )
