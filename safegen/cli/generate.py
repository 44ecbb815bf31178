"""`safegen generate`: draws prompts under a policy."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from safegen.cli import options
from safegen.cli.describe import DecisionValues, because, decision_values, nearest, policy_values, score_cells
from safegen.cli.render import Column, Line, Sheet, progress, say, show_json
from safegen.cli.unused import warn_of_unused
from safegen.errors import PromptRefused, UsageError

if TYPE_CHECKING:
    from safegen.cli.drawing import Drawing
    from safegen.guard import Guard

EXAMPLE = 'Example: safegen generate "a ghost" "a castle in the style of ink" --seed 7 --out pictures'

_MINI_GUIDANCE = 4.0  # the guidance that all figures of safegen-mini were measured with

_COLUMNS = (
    Column("file", share=3),
    Column("prompt", share=4),
    Column("action", width=6),
    Column("rule", share=2),
    Column("γ", width=5),
    Column("trigger words", share=2),
)


class ImageValues(TypedDict):
    """One image that was drawn."""

    file: str
    prompt: str
    seed: int
    decision: DecisionValues


class Applied(TypedDict):
    """What a policy is applied with."""

    audit: Path | None
    membranes: Sequence[Path]
    context: Mapping[str, str]


Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; one image each.")]
Out = Annotated[Path, typer.Option(help="Folder of the images (0001.png, …); numbers go on after those there.")]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**32 - 1, help="Seed of the first image; the second has the next.", show_default="a random one"
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="Guidance scale.", show_default="4 for the model mini, else the pipeline's own"),
]
Negative = Annotated[str | None, typer.Option(help="Negative prompt of all images.")]
Audit = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of the audit log.", show_default="SAFEGEN_AUDIT_DIR or the XDG state folder"
    ),
]


def generate(
    prompts: Prompts,
    policy: options.PolicyName = None,
    model: options.Model = options.MINI,
    revision: options.Revision = None,
    out: Out = Path("safegen-images"),
    seed: Seed = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    negative: Negative = None,
    audit: Audit = None,
    membranes: options.Membranes = None,
    context: options.Context = None,
    as_json: options.AsJson = False,
) -> None:
    """Draw images under a policy.

    Exit code 1 and no image at all if the policy refuses one of the prompts.
    """
    from safegen.policy.load import load_policy

    blank = [k for k, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if blank:
        raise UsageError(f"prompt {blank[0]} is blank; say what to draw (quote the prompt: it may hold spaces)")
    options.check_folder(out)
    name, caller = options.policy_for(policy, model), options.context_of(context)
    load_policy(name)  # for its faults, before the model is loaded

    from safegen.cli.drawing import Drawing
    from safegen.cli.host import load_host

    pipe = load_host(model, revision)
    scale = _MINI_GUIDANCE if guidance is None and model == options.MINI else guidance
    how = Drawing(secrets.randbelow(2**31) if seed is None else seed, steps, scale, negative)
    applied: Applied = {"audit": audit, "membranes": membranes or [], "context": caller}
    _draw_guarded(pipe, prompts, name, how, applied, out=out, as_json=as_json)


def _draw_guarded(
    pipe: Any,
    prompts: Sequence[str],
    policy: str,
    how: Drawing,
    applied: Applied,
    *,
    out: Path,
    as_json: bool,
) -> None:
    from safegen.backend import backend_of
    from safegen.guard import apply_policy

    with apply_policy(pipe, policy, **applied) as guard:
        warn_of_unused(applied["membranes"], guard.policy, backend_of(pipe).family)
        decisions = [decision_values(decision, guard.policy) for decision in guard.decide(prompts)]
        head = {"policy": policy_values(guard.policy), "seed": how.seed, "audit": str(guard.audit_path)}
        images: list[ImageValues] = []
        try:
            _refuse(pipe, guard, prompts, decisions, how)
            images.extend(_images(pipe, prompts, decisions, how, out))  # keeps those from before a late refusal
        except PromptRefused as refused:
            if as_json:
                show_json(head | {"images": images, "refused": refused.decision})
            say(f"audit log: {guard.audit_path}")
            raise
        if as_json:
            show_json(head | {"images": images, "refused": None})
        else:
            Sheet(_COLUMNS).add(_line(image) for image in images)
        say(f"seed {how.seed}; audit log: {guard.audit_path}")


def _refuse(pipe: Any, guard: Guard, prompts: Sequence[str], decisions: Sequence[DecisionValues], how: Drawing) -> None:
    """Hands the prompts that the policy refuses to the guard first: it refuses and records them before any drawing.

    Raises:
        PromptRefused: There are such prompts.
    """
    from safegen.cli.drawing import draw

    refused = [p for p, d in zip(prompts, decisions, strict=True) if d["outcome"] == "refuse"]
    if refused and guard.policy.mode == "enforce":
        next(draw(pipe, refused, how))


def _images(
    pipe: Any, prompts: Sequence[str], decisions: Sequence[DecisionValues], how: Drawing, out: Path
) -> Iterator[ImageValues]:
    from safegen.cli.drawing import draw, picture, save_picture

    first = 1 + max((int(path.stem) for path in out.glob("*.png") if path.stem.isdecimal()), default=0)
    done = 0
    with progress("drawing", len(prompts)) as step:
        for batch in draw(pipe, prompts, how):
            for image in batch:
                path = out / f"{first + done:04}.png"
                save_picture(picture(image), path)
                yield {
                    "file": str(path),
                    "prompt": prompts[done],
                    "seed": how.seed + done,
                    "decision": decisions[done],
                }
                done += 1
            step(done, "")


def _line(image: ImageValues) -> Line:
    decision = image["decision"]
    membrane = nearest(decision)
    named = ", ".join(hit["phrase"] for hit in decision["hits"])
    words = because(membrane) if membrane and membrane["opened"] else named
    cells = (image["file"], image["prompt"], decision["outcome"], decision["rule"] or "-", score_cells(membrane)[0])
    return Line((*cells, words), bright=decision["outcome"] != "allow")
