"""What `safegen diff` says of two policies."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_samples import BASE, CATALOGUE

from safegen.policy.compare import differences
from safegen.policy.load import load_policy


def compared(folder: Path, old: str, new: str) -> list[str]:
    """`direction part: text` of each difference."""
    paths = (folder / "old.yaml", folder / "new.yaml")
    for path, text in zip(paths, (old, new), strict=True):
        path.write_text(text, encoding="utf-8")
    before, after = (load_policy(path, catalogue=CATALOGUE) for path in paths)
    return [f"{one.direction} {one.part}: {one.text}" for one in differences(before, after, CATALOGUE)]


CHANGES = [
    ("strength: 2.0", "strength: 3.5", ["stricter rule skin: strength 2 → 3.5"]),
    ("strength: 2.0", "strength: 1.0", ["looser rule skin: strength 2 → 1"]),
    ("action: refuse", "action: flag", ["looser rule art: action refuse → flag"]),
    (
        "action: refuse",
        "severity: critical",
        ["looser rule art: action refuse → erase", "stricter rule art: severity high → critical"],
    ),
    ("id: base, version: 1.0.0", "id: base, version: 1.1.0", ["different policy: metadata.version 1.0.0 → 1.1.0"]),
    ("defaults:", "mode: observe\ndefaults:", ["looser policy: mode enforce → observe"]),
    ("defaults:", "audit: {text: full}\ndefaults:", ["different policy: audit.text none → full"]),
    (
        "{lo: 0.3, hi: 0.6}",
        "{lo: 0.2, hi: 0.6}",
        ["stricter rule skin: transport.lo 0.3 → 0.2", "stricter rule art: transport.lo 0.3 → 0.2"],
    ),
    ("concept: explicit/*", "concept: explicit/nudity/*", ["looser rule skin: concept explicit/* → explicit/nudity/*"]),
    (
        "rules:\n",
        "rules:\n  - {id: idol, concept: pikachu, category: ip-character}\n",
        ["stricter rule idol: is new: erase pikachu"],
    ),
    (
        "rules:\n",
        "rules:\n  - {id: b, concept: banksy, category: artist-style, action: flag}\n",
        ["looser rule b: is new: flag banksy"],
    ),
    (
        "  - id: art\n    concept: artist-style/*\n    category: artist-style\n    action: refuse\n",
        "",
        ["looser rule art: is gone: refuse artist-style/*"],
    ),
    (
        "2027-01-31",
        "2027-02-01",
        [
            "looser exception atlas: flag for skin when tenant a or b until 2027-01-31 → "
            "flag for skin when tenant a or b until 2027-02-01"
        ],
    ),
    (
        "[a, b]",
        "[a]",
        [
            "stricter exception atlas: flag for skin when tenant a or b until 2027-01-31 → "
            "flag for skin when tenant a until 2027-01-31"
        ],
    ),
    ("id: atlas", "id: plates", [
        "looser exception plates: is new: flag for skin when tenant a or b until 2027-01-31",
        "stricter exception atlas: is gone: flag for skin when tenant a or b until 2027-01-31",
    ]),
    ("owner: o", "owner: somebody else", []),
    ("category: artist-style\n    action: refuse", "action: refuse\n    # a comment\n    category: artist-style", []),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), CHANGES)
def test_each_change_is_said_with_its_direction(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in BASE
    assert compared(tmp_path, BASE, BASE.replace(old, new, 1)) == expected


def test_a_difference_points_at_the_line_that_states_it(tmp_path: Path) -> None:
    for name, strength in (("old", "2.0"), ("new", "3.0")):
        (tmp_path / f"{name}.yaml").write_text(BASE.replace("2.0", strength), encoding="utf-8")
    before, after = (load_policy(tmp_path / f"{name}.yaml", catalogue=CATALOGUE) for name in ("old", "new"))
    (one,) = differences(before, after, CATALOGUE)
    assert one.where == f"{tmp_path / 'new.yaml'}:7"
