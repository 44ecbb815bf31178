"""The core of `safegen demo`, on a tiny pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cli_world import FOX, GHOST, HEAD, World
from PIL import Image
from tiny import tiny_sd

from safegen.audit import HmacKey, verify
from safegen.cli.contact_sheet import Group, Pair, contact_sheet
from safegen.cli.demo import PROMPTS, show_demo, weights_digest
from safegen.cli.drawing import Drawing
from safegen.errors import AttestationError, PromptRefused

SHORT = {"Targets: go": ["a ghost", "the ghost of a fox"], "Unrelated: stay": ["the van", "a fox"]}
HOW = Drawing(seed=3, steps=2, guidance=3.0, batch=3)


@dataclass(frozen=True)
class Names:
    objects: list[str]
    styles: list[str]


class FakeJudge:
    """Sees another thing in the first picture of the second round, and another style in its second."""

    def __init__(self) -> None:
        self.rounds: Iterator[Names] = iter(
            [
                Names(["ghost", "fox", "van", "fox"], ["ink"] * 4),
                Names(["cloud", "fox", "van", "fox"], ["ink", "clay", "ink", "ink"]),
            ]
        )

    def pictures(self, pictures: list[Image.Image]) -> Names:
        assert all(picture.size == (16, 16) for picture in pictures)
        return next(self.rounds)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(HEAD + GHOST + FOX, "utf-8")
    return path


def test_demo(
    world: World, policy: Path, tmp_path: Path, audit_key: HmacKey, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_sd()
    before = weights_digest(pipe)
    out = tmp_path / "out"
    show_demo(pipe, FakeJudge(), policy, SHORT, out, HOW, membranes=[Path(world.membranes)], audit_key=audit_key)
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    for pattern in (
        r"a ghost +ghost +1\.000 +\d\.\d{3} +0\.990 +1\.000 +erase +ghost +ghost -> cloud +changed",
        r"the ghost of a fox +ghost +1\.000 .* erase +ghost +fox, ink -> clay +changed",
        r"the van +ghost +0\.000 .* allow +van +bit-identical",
        r"a fox +ghost +0\.000 .* flag +fox +bit-identical",
    ):
        assert any(re.fullmatch(pattern, line.rstrip()) for line in lines), (pattern, shown.out)
    assert "Targets: 0 of 2 images are bit-identical to the base model's, 2 differ." in lines
    assert "Unrelated: 2 of 2 images are bit-identical to the base model's, 0 differ." in lines
    assert "1/1 segments valid" in shown.out
    assert f"sha256 of all state_dicts {before[:16]}, both times" in shown.out
    assert weights_digest(pipe) == before
    assert verify(out / "audit").ok
    assert sorted(path.name for path in out.iterdir()) == ["audit", "before_after.png"]
    with Image.open(out / "before_after.png") as picture:
        assert picture.width > 1000
    assert shown.err.splitlines() == [
        "drawing without the policy (4 images) …",
        "drawing with the policy (4 images) …",
    ]


def test_demo_says_when_the_weights_are_not_as_before(
    world: World, policy: Path, tmp_path: Path, audit_key: HmacKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["a" * 64, "b" * 64])

    def digest(_: object) -> str:
        return next(digests)

    monkeypatch.setattr("safegen.cli.demo.weights_digest", digest)
    with pytest.raises(AttestationError, match="not those from before"):
        show_demo(
            tiny_sd(),
            None,
            policy,
            SHORT,
            tmp_path / "out",
            HOW,
            membranes=[Path(world.membranes)],
            audit_key=audit_key,
        )


def test_a_demo_that_is_refused_leaves_the_pipeline_as_before(world: World, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    before = weights_digest(pipe)
    with pytest.raises(PromptRefused):
        show_demo(pipe, None, world.policy, {"x": ["a robot"]}, tmp_path / "out", HOW, audit_key=audit_key)
    assert weights_digest(pipe) == before
    assert "forward" not in pipe.unet.__dict__


def test_digest_of_the_weights_sees_every_part_and_every_bit() -> None:
    pipe = tiny_sd()
    digests = {weights_digest(pipe)}
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        parameter = next(part.parameters())
        with torch.no_grad():
            parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(10.0))
        digests.add(weights_digest(pipe))
    assert len(digests) == 4


def test_prompts_cover_every_rule_of_the_shipped_policy() -> None:
    from safegen.policy.catalogue import load_catalogue
    from safegen.policy.context import utc_now
    from safegen.policy.hits import lexical_hits
    from safegen.policy.load import load_policy
    from safegen.policy.resolve import resolve

    policy = load_policy("mini-strict")
    resolved = resolve(policy, load_catalogue(), available={rule.concept for rule in policy.rules}, now=utc_now())
    targets, *others = PROMPTS.values()
    assert {hit.rule for text in targets for hit in lexical_hits(resolved, text)} == {rule.id for rule in policy.rules}
    assert all(lexical_hits(resolved, text) for text in targets)
    assert not any(lexical_hits(resolved, text) for group in others for text in group)


def test_contact_sheet_marks_what_is_identical_and_shows_images_as_they_are() -> None:
    red, blue = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (512, 512), "#0000ff")
    pairs = (
        Pair("a ghost γ " + "very long " * 20, red, blue, identical=False, action="opened", seen="ghost -> cloud"),
        Pair("the van", red, red, identical=True, action="", seen=""),
    )
    sheet = contact_sheet("title", [Group("heading", pairs)])
    colours = {colour for _, colour in sheet.getcolors(1 << 20) or []}
    assert {(255, 0, 0), (0, 0, 255), (0x1A, 0x7F, 0x37), (0x0B, 0x57, 0xD0)} <= colours
    assert sum(n for n, colour in sheet.getcolors(1 << 20) or [] if colour == (255, 0, 0)) == 3 * 128 * 128
