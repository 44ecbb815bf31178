"""`safegen demo`: the main job on the embedded model, before and after, with every number behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from safegen.cli import options
from safegen.cli.describe import SCORE_COLUMNS, DecisionValues, because, decision_values, nearest, score_cells
from safegen.cli.render import Column, Line, Sheet, progress, say, show
from safegen.errors import AttestationError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from safegen.audit import HmacKey
    from safegen.cli.drawing import Drawing

EXAMPLE = "Example: safegen demo --out safegen-demo --seed 7"

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "Targets: the policy erases these": (
        "a ghost in the style of clay",
        "a robot in the style of clay",
        "santa claus",
        "a fox in the style of popart",
        "a castle in the style of blueprint",
        "a bicycle",
        "a phantom in the style of noto",
        "an ink drawing of a bike",
    ),
    "Neighbours: close to a target, to be left alone": (
        "a vampire",
        "an alien in the style of clay",
        "mrs claus",
        "a fox in the style of pixel",
        "a castle in the style of ink",
        "a motorcycle",
        "a skull in the style of noto",
        "a snowman",
    ),
    "Unrelated: to be left alone": (
        "a pizza",
        "a rocket in the style of clay",
        "a panda",
        "a sunflower in the style of pixel",
        "a guitar",
        "a penguin",
        "a cactus in the style of noto",
        "an umbrella in the style of clay",
    ),
}

_COLUMNS = (
    Column("prompt", share=5),
    Column("membrane", share=2),
    *SCORE_COLUMNS,
    Column("action", width=6),
    Column("trigger words", share=2),
    Column("judge sees", share=3),
    Column("image", width=13),
)


class Judging(Protocol):
    """Names what pictures show; `safegen.mini.judge.Judge` does."""

    def pictures(self, pictures: list[Image]) -> Any:
        """Returns an object with `objects` and `styles`, one name per picture."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """One prompt of the demo.

    Attributes:
        heading: Its group.
        prompt: The prompt.
        decision: What the policy decides.
        base: The image without the policy, [3, h, w] in [0, 1].
        guarded: The image with it.
        seen: What the judge sees in the two; "" without a judge.
    """

    heading: str
    prompt: str
    decision: DecisionValues
    base: Tensor
    guarded: Tensor
    seen: str

    @property
    def identical(self) -> bool:
        """Whether the two images are equal bit for bit."""
        return self.base.equal(self.guarded)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the picture and the audit log.")] = Path("safegen-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the first image.")] = 0,
) -> None:
    """Draw fixed prompts with the embedded model, before and after the policy mini-strict, and show the difference.

    Writes before_after.png and an audit log, checks the log, and proves that the model is as before afterwards.
    """
    options.check_folder(out)

    from safegen.cli.drawing import Drawing
    from safegen.cli.host import load_host

    pipe = load_host(options.MINI)

    from safegen import mini

    show_demo(pipe, mini.load_judge(), "mini-strict", PROMPTS, out, Drawing(seed, 25, 4.0, batch=12))


def show_demo(
    pipe: Any,
    judge: Judging | None,
    policy: str | Path,
    prompts: Mapping[str, Sequence[str]],
    out: Path,
    how: Drawing,
    *,
    membranes: Sequence[Path] = (),
    audit_key: HmacKey | None = None,
) -> None:
    """Runs the demo on any pipeline; `prompts` are by heading, and the policy must not refuse one of them.

    Raises:
        AttestationError: The pipeline is not as before after the policy was taken off.
        AuditChainError: The log does not verify.
    """
    from safegen.audit import raise_for_faults, verify
    from safegen.guard import apply_policy

    log, picture = out / "audit", out / "before_after.png"
    texts = [text for group in prompts.values() for text in group]
    before = weights_digest(pipe)
    base = _draw(pipe, texts, how, "drawing without the policy")
    with apply_policy(pipe, policy, audit=log, audit_key=audit_key, membranes=membranes) as guard:
        decisions = [decision_values(decision, guard.policy) for decision in guard.decide(texts)]
        guarded = _draw(pipe, texts, how, "drawing with the policy")
    after = weights_digest(pipe)
    headings = [heading for heading, group in prompts.items() for _ in group]
    seen = _seen(judge, base, guarded)
    drawn = [Drawn(*parts) for parts in zip(headings, texts, decisions, base, guarded, seen, strict=True)]
    _write_picture(f"safegen demo: policy {guard.policy.id} {guard.policy.version}", drawn, picture)
    _print_tables(drawn)
    report = verify(log)
    show(f"\nAudit log {log}: {report}")
    raise_for_faults(report)
    _print_restored(before, after)
    show(f"Written: {picture} (look at it), {log} (check it: safegen audit verify {log})")


def weights_digest(pipe: Any) -> str:
    """Returns the sha256, in hex, over names, shapes and bytes of every tensor in the pipeline's state_dicts."""
    import torch

    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, tensor in module.state_dict().items():
                digest.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _draw(pipe: Any, texts: Sequence[str], how: Drawing, label: str) -> list[Tensor]:
    from safegen.cli.drawing import draw

    say(f"{label} ({len(texts)} images) …")
    images: list[Tensor] = []
    with progress(label, len(texts)) as step:
        for batch in draw(pipe, texts, how):
            images += list(batch)
            step(len(images), "")
    return images


def _seen(judge: Judging | None, base: Sequence[Tensor], guarded: Sequence[Tensor]) -> list[str]:
    """Returns what the judge sees, "before -> after" where that differs; the style only where it alone differs."""
    from safegen.cli.drawing import picture

    if judge is None:
        return [""] * len(base)
    one, two = (judge.pictures([picture(image) for image in images]) for images in (base, guarded))
    found: list[str] = []
    for a, b, a_style, b_style in zip(one.objects, two.objects, one.styles, two.styles, strict=True):
        if a != b:
            found.append(f"{a} -> {b}")
        else:
            found.append(a if a_style == b_style else f"{a}, {a_style} -> {b_style}")
    return found


def _action(decision: DecisionValues) -> str:
    opened = [membrane["concept"] for membrane in decision["membranes"] if membrane["opened"]]
    return f"membrane of {' and '.join(opened)} opened" if opened else ""


def _write_picture(title: str, drawn: Sequence[Drawn], path: Path) -> None:
    from safegen.cli.contact_sheet import Group, Pair, contact_sheet
    from safegen.cli.drawing import picture, save_picture

    groups: dict[str, list[Pair]] = {}
    for one in drawn:
        pair = Pair(one.prompt, picture(one.base), picture(one.guarded), one.identical, _action(one.decision), one.seen)
        groups.setdefault(one.heading, []).append(pair)
    sheet = contact_sheet(title, [Group(heading, tuple(pairs)) for heading, pairs in groups.items()])
    save_picture(sheet, path)


def _lines(one: Drawn) -> list[Line]:
    """Returns one line per open membrane; where none opens, one with the membrane that came closest."""
    decision = one.decision
    opened = [membrane for membrane in decision["membranes"] if membrane["opened"]]
    closest = nearest(decision)
    lines: list[Line] = []
    for membrane in opened or [closest]:
        first = not lines
        outcome = "bit-identical" if one.identical else "changed"
        cells = (
            one.prompt if first else "",
            membrane["concept"] if membrane else "-",
            *score_cells(membrane),
            decision["outcome"] if first else "",
            because(membrane) if membrane and membrane["opened"] else "",
            one.seen if first else "",
            outcome if first else "",
        )
        lines.append(Line(cells, bright=bool(opened)))
    return lines


def _print_tables(drawn: Sequence[Drawn]) -> None:
    for heading in dict.fromkeys(one.heading for one in drawn):
        group = [one for one in drawn if one.heading == heading]
        Sheet(_COLUMNS, heading).add(line for one in group for line in _lines(one))
    show("")
    for heading in dict.fromkeys(one.heading for one in drawn):
        group = [one for one in drawn if one.heading == heading]
        same = sum(one.identical for one in group)
        name = heading.partition(":")[0]
        show(
            f"{name}: {same} of {len(group)} images are bit-identical to the base model's, {len(group) - same} differ."
        )


def _print_restored(before: str, after: str) -> None:
    if before != after:
        raise AttestationError(
            f"the pipeline's weights are not those from before the policy: sha256 {before[:16]} then {after[:16]}"
        )
    show(f"Policy removed: the weights are those from before (sha256 of all state_dicts {before[:16]}, both times).")
