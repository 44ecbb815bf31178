"""`safegen explain`: why a policy decides what it decides for one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from safegen.cli import options
from safegen.cli.describe import DecisionValues, MembraneValues, decision_values, graded, policy_values
from safegen.cli.render import Column, Line, Sheet, show, show_json, show_weighed, warn
from safegen.errors import UsageError

if TYPE_CHECKING:
    from safegen.explain import Explanation
    from safegen.policy.resolve import ResolvedPolicy

EXAMPLE = 'Example: safegen explain --policy mini-strict --prompt "a gh0st in the style of clay"'

_COLUMNS = (
    Column("membrane", share=2),
    Column("score", width=9),
    Column("value", width=7),
    Column("lo", width=6),
    Column("hi", width=6),
    Column("γ", width=5),
    Column("verdict", width=7),
    Column("action", share=2),
    Column("because of", share=4),
)

Prompt = Annotated[str, typer.Option("--prompt", help="The prompt.")]


def explain(
    prompt: Prompt,
    policy: options.PolicyName = None,
    model: options.Model = options.MINI,
    revision: options.Revision = None,
    membranes: options.Membranes = None,
    context: options.Context = None,
    as_json: options.AsJson = False,
) -> None:
    """Show why a policy decides what it decides for one prompt: scores, thresholds, and the words that did it."""
    if not prompt.strip():
        raise UsageError("--prompt is blank; expected the prompt to explain (quote it: it may hold spaces)")
    from safegen.policy.load import load_policy

    name, caller = options.policy_for(policy, model), options.context_of(context)
    load_policy(name)  # for its faults, before the model is loaded

    from safegen.cli.host import load_host

    pipe = load_host(model, revision)

    from safegen.explain import explain as explained
    from safegen.guard import prepare

    backend, resolved, gatekeeper = prepare(pipe, name, membranes=membranes or [], context=caller)
    found = explained(gatekeeper, prompt)
    notices = (*resolved.notices, *gatekeeper.notices)
    for notice in notices:
        warn(notice)
    view = gatekeeper.view()
    values = _values(prompt, found, view)
    if as_json:
        head = {"policy": policy_values(resolved), "model": {"family": backend.family, "encoder": backend.fingerprint}}
        show_json(head | {"notices": list(notices)} | values)
    else:
        _print(prompt, found, view)


def _values(prompt: str, found: Explanation, policy: ResolvedPolicy) -> dict[str, object]:
    decision = decision_values(found.decision, policy)
    tokens = [
        {"start": token.start, "end": token.end, "text": prompt[token.start : token.end], "read": k < found.read}
        for k, token in enumerate(found.tokens)
    ]
    words = [{"start": w.start, "end": w.end, "text": prompt[w.start : w.end], "weight": w.weight} for w in found.words]
    membranes = [
        {**membrane, "verdict": _verdict(membrane), "evidence": list(evidence)}
        for membrane, evidence in zip(decision["membranes"], found.evidence, strict=True)
    ]
    places = {rule.id: dict(rule.places) for rule in policy.rules if rule.id in decision["fired"]}
    return {"prompt": prompt, "tokens": tokens, "words": words, **decision, "membranes": membranes, "stated": places}


def _verdict(membrane: MembraneValues) -> str:
    return "opens" if membrane["opened"] else "shut"


def _print(prompt: str, found: Explanation, policy: ResolvedPolicy) -> None:
    decision = decision_values(found.decision, policy)
    enforced = policy.mode == "enforce"
    show_weighed(prompt, [(word.start, word.end, word.weight) for word in found.words])
    Sheet(_COLUMNS, f"{decision['outcome']}: {decision['reason']}").add(
        line for membrane in decision["membranes"] for line in _lines(membrane, enforced=enforced)
    )
    for hit in decision["hits"]:
        show(f"rule {hit['rule']}: the prompt names {hit['concept']} ({hit['phrase']})")
    for line in _stated(decision, policy):
        show(line)
    if decision["truncated_tokens"]:
        kept = found.tokens[found.read - 1].end if found.read else 0
        show(f"{decision['truncated_tokens']} tokens are past the model's window; it does not read {prompt[kept:]!r}")


def _stated(decision: DecisionValues, policy: ResolvedPolicy) -> Iterator[str]:
    """Yields, for each rule that is touched, where its settings are stated, and the exception that holds."""
    from safegen.policy.schema import BUILT_IN

    exceptions = {exception.stated.id: exception for exception in policy.exceptions}
    for rule in policy.rules:
        if rule.id not in decision["fired"]:
            continue
        files = {place: [name for name, at in rule.places.items() if at == place] for place in rule.places.values()}
        for place, names in files.items():
            if place != BUILT_IN:
                yield f"rule {rule.id}: {', '.join(names)} stated at {place}"
        if rule.exception is not None:
            one = exceptions[rule.exception]
            until = f"until {one.stated.expires.isoformat()}, owner {one.stated.owner}: {one.stated.reason}"
            yield f"rule {rule.id}: {rule.effective} by exception {one.stated.id} ({one.place}), {until}"


def _lines(membrane: MembraneValues, *, enforced: bool) -> Sequence[Line]:
    """Returns one line per score of a membrane; the first says what follows from them."""
    values = {**graded(membrane), "lexical": membrane["lexical"]}
    lines: list[Line] = []
    for name, value in values.items():
        if value is None:
            continue
        held = membrane["thresholds"].get(name)
        limits = tuple(f"{held[side]:.3f}" if held else "-" for side in ("lo", "hi"))
        first = not lines
        action = "erased" if membrane["opened"] and enforced else "would be erased" if membrane["opened"] else "-"
        strength = f" (strength {membrane['strength']:g})" if membrane["strength"] != 1 and membrane["opened"] else ""
        cells = (
            membrane["concept"] if first else "",
            name,
            f"{value:.3f}",
            *limits,
            f"{membrane['permeability']:.3f}" if first else "",
            _verdict(membrane) if first else "",
            action + strength if first else "",
            _because(membrane) if first else "",
        )
        lines.append(Line(cells, bright=membrane["opened"] and first, dim=not membrane["opened"]))
    return lines


def _because(membrane: MembraneValues) -> str:
    parts: list[str] = []
    for trigger in membrane["triggers"]:
        how = ", ".join([trigger["by"], *trigger["normalised"]])
        parts.append(f"{trigger['text']!r} at {trigger['start']}-{trigger['end']} ({how})")
    return "; ".join(parts)
