"""The documentation's snippets run, its links lead somewhere, and what it names exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "README.md"]
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, kind: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text("utf-8")) if found == kind]


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_snippets_of_a_how_to_run_in_order(page: Path, tmp_path: Path) -> None:
    for code in _blocks(page, "python"):
        assert compile(code, str(page), "exec")
    code = "\n".join(_blocks(page, "python"))
    if code:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for block in _blocks(page, "console"):
        for line in block.splitlines():
            command = line.removeprefix("$ ").replace("safegen ", f"{shlex.quote(sys.executable)} -m safegen ", 1)
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
            allowed = (0, 1) if "--fail-on" in line else (0,)
            assert done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    pages = [page for page in folder.glob("*.md") if page.name != "README.md"]
    assert [
        page.name for page in pages if f"]({page.name}) {page.read_text('utf-8')[7:].splitlines()[0]}" not in index
    ] == []


def test_every_training_setting_is_in_the_reference() -> None:
    from safegen.training.config import TrainConfig

    page = (ROOT / "docs" / "reference" / "training.md").read_text("utf-8")
    assert [name for name in TrainConfig.model_fields if f"`{name}`" not in page] == []


def test_every_policy_key_and_record_kind_is_in_the_reference() -> None:
    from safegen.audit.events import REQUIRED
    from safegen.policy.schema import Audit, Defaults, Rule, Transport

    page = (ROOT / "docs" / "reference" / "policy.md").read_text("utf-8")
    for model in (Audit, Defaults, Rule, Transport):
        for name in model.model_fields:
            assert name in page, name
    audit = (ROOT / "docs" / "reference" / "audit.md").read_text("utf-8")
    assert [kind for kind in REQUIRED if f"`{kind}`" not in audit] == []
