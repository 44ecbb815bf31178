"""The digest of a policy: what decides, in canonical form."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rfc8785

from safegen.policy.schema import Policy

if TYPE_CHECKING:
    from safegen.policy.resolve import ResolvedException, ResolvedRule


def digest_of(policy: Policy, rules: Sequence[ResolvedRule], exceptions: Sequence[ResolvedException]) -> str:
    """Returns the SHA-256, in hex, of the RFC 8785 form of all that decides, whoever asks and whenever.

    Args:
        policy: The policy.
        rules: What its rules come to for a caller without exceptions.
        exceptions: Its exceptions; what they are for is not part of it.
    """
    return hashlib.sha256(rfc8785.dumps(_canonical(policy, rules, exceptions))).hexdigest()


def _canonical(
    policy: Policy, rules: Sequence[ResolvedRule], exceptions: Sequence[ResolvedException]
) -> dict[str, Any]:
    return {
        "apiVersion": policy.apiVersion,
        "id": policy.metadata.id,
        "version": policy.metadata.version,
        "mode": policy.mode,
        "on_unknown": policy.defaults.on_unknown,
        "sentence_encoder": policy.defaults.sentence_encoder,
        "audit": policy.audit.model_dump(mode="json"),
        "rules": [
            {
                "id": rule.id,
                "concept": rule.concept.id,
                "phrases": list(rule.concept.phrases),
                "benign": list(rule.concept.benign),
                "category": rule.category,
                "severity": rule.severity.value,
                "action": rule.action,
                "effective": rule.effective,
                "strength": rule.strength,
                "transport": rule.transport.model_dump(mode="json"),
                "on_missing": rule.on_missing,
                "applies_to": sorted(set(rule.applies_to)),
                "has_membrane": rule.has_membrane,
            }
            for rule in rules
        ],
        "exceptions": [
            {
                "id": exception.stated.id,
                "rules": sorted(exception.rules),
                "when": {key: sorted(set(values)) for key, values in exception.stated.when.items()},
                "action": exception.stated.action,
                "expires": exception.stated.expires.isoformat(),
            }
            for exception in exceptions
        ],
    }
