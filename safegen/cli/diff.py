"""`safegen diff`: what is different between two policies, and which prompts are decided otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from safegen.cli import options
from safegen.cli.describe import DecisionValues, decision_values
from safegen.cli.render import Column, Line, Sheet, say, show, show_json, warn

if TYPE_CHECKING:
    from safegen.gatekeeper import Gatekeeper
    from safegen.policy.compare import Difference
    from safegen.prompts import PromptRow

EXAMPLE = "Example: safegen diff strict my-policy.yaml --prompts prompts.txt --fail-on looser"
FOUND = 1  # exit code
BATCH = 64


class FailOn(StrEnum):
    """What makes the exit code 1."""

    LOOSER = "looser"
    ANY = "any"


class DifferenceValues(TypedDict):
    """One thing that is different; `direction` is stricter, looser or different."""

    part: str
    text: str
    direction: str
    where: str


class ChangeValues(TypedDict):
    """One prompt that is decided otherwise."""

    line: int
    prompt: str
    old: DecisionValues
    new: DecisionValues


Old = Annotated[str, typer.Argument(metavar="OLD", help="Name of a shipped policy, or a path.")]
New = Annotated[str, typer.Argument(metavar="NEW", help="The policy to compare it with.")]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Prompts that both decide on (as for audit); loads the text encoder only."),
]
Threshold = Annotated[
    FailOn | None,
    typer.Option(
        help="Exit with code 1 if NEW is looser somewhere, or different at all (in a rule or on a prompt).",
        show_default="never",
    ),
]
_COLUMNS = (
    Column("line", width=6),
    Column("prompt", share=4),
    Column("old", width=7),
    Column("by", share=2),
    Column("new", width=7),
    Column("by", share=2),
)


def diff(
    old: Old,
    new: New,
    prompts: Prompts = None,
    model: options.Model = options.MINI,
    revision: options.Revision = None,
    membranes: options.Membranes = None,
    context: options.Context = None,
    fail_on: Threshold = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what is different between two policies, and which prompts they decide otherwise on a model."""
    from safegen.policy.catalogue import load_catalogue
    from safegen.policy.compare import differences
    from safegen.policy.load import load_policy

    caller = options.context_of(context)
    found = differences(load_policy(old), load_policy(new), load_catalogue())
    changes: list[ChangeValues] | None = None
    if prompts is not None:
        from safegen.prompts import read_prompts

        rows = list(read_prompts(prompts))
        changes = _changes(rows, (old, new), model, revision, membranes or [], caller)
    if as_json:
        show_json({"differences": [_values(one) for one in found], "prompts": changes})
    else:
        _print(found, changes)
    looser = any(one.direction == "looser" for one in found)
    if (fail_on == FailOn.LOOSER and looser) or (fail_on == FailOn.ANY and (found or changes)):
        raise typer.Exit(FOUND)


def _values(one: Difference) -> DifferenceValues:
    return {"part": one.part, "text": one.text, "direction": one.direction, "where": one.where}


def _changes(
    rows: Sequence[PromptRow],
    policies: tuple[str, str],
    model: str,
    revision: str | None,
    membranes: Sequence[Path],
    context: Mapping[str, str],
) -> list[ChangeValues]:
    """Decides on every prompt under both policies; returns those that are decided otherwise."""
    from safegen.cli.host import load_host

    pipe = load_host(model, revision, text_only=True)
    before, after = (_gatekeeper(pipe, policy, membranes, context) for policy in policies)
    changes: list[ChangeValues] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = [row.text for row in batch]
        for row, old, new in zip(batch, _decided(before, texts), _decided(after, texts), strict=True):
            if _decisive(old) != _decisive(new):
                changes.append({"line": row.line, "prompt": row.text, "old": old, "new": new})
    return changes


def _gatekeeper(pipe: Any, policy: str, membranes: Sequence[Path], context: Mapping[str, str]) -> Gatekeeper:
    from safegen.guard import prepare

    _, resolved, gatekeeper = prepare(pipe, policy, membranes=membranes, context=context)
    for notice in (*resolved.notices, *gatekeeper.notices):
        warn(notice)
    return gatekeeper


def _decided(gatekeeper: Gatekeeper, texts: Sequence[str]) -> list[DecisionValues]:
    view = gatekeeper.view()
    return [decision_values(decision, view) for decision in gatekeeper.decide_texts(texts)]


def _decisive(decision: DecisionValues) -> tuple[object, ...]:
    """Returns what is compared: what follows, whether it is enforced, the rules touched, how far membranes open."""
    opened = {one["concept"]: one["permeability"] for one in decision["membranes"] if one["opened"]}
    enforced = decision["action"]["enforced"] or decision["outcome"] == "allow"
    return decision["outcome"], enforced, sorted(decision["fired"]), opened


def _print(found: Sequence[Difference], changes: Sequence[ChangeValues] | None) -> None:
    for one in found:
        show(f"{one.direction:<9} {one.part}: {one.text} ({one.where})")
    counts = {way: sum(one.direction == way for one in found) for way in ("stricter", "looser", "different")}
    say("no rule or setting is different" if not found else ", ".join(f"{n} {way}" for way, n in counts.items()))
    if changes is None:
        return
    if changes:
        sheet = Sheet(_COLUMNS, "Prompts that are decided otherwise")
        sheet.add(Line((str(c["line"]), c["prompt"], *_cells(c["old"]), *_cells(c["new"]))) for c in changes)
    say(f"{len(changes)} prompt{'s are' if len(changes) != 1 else ' is'} decided otherwise")


def _cells(decision: DecisionValues) -> tuple[str, str]:
    would = "" if decision["action"]["enforced"] or decision["outcome"] == "allow" else "~"  # ~ is not enforced
    return would + decision["outcome"], decision["rule"] or "-"
