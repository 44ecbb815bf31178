"""Threads: eight of them draw on one guarded denoiser, each its own prompts, and every image is as if drawn alone.

    python benchmarks/threads.py [--json] [--images 50] [--threads 8] [--steps 5]

On safegen-mini, one image at a time, a pipeline per thread on shared parts (`from_pipe`, as the diffusers server recipe
makes them), under a policy whose graded score opens the membranes to a different degree for every prompt. Compared bit
for bit with the same images drawn by one thread before. The peer keeps the permeabilities on the modules, as SPM's
released code does, on a tenth of the images. Exit code 1 if a floor is missed.
"""

from __future__ import annotations

import copy
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusionPipeline
from end_to_end import KEY
from floors import Floor, command, finish
from rich.console import Console
from torch import Tensor

import safegen
from safegen import mini
from safegen.audit import Record, read_records, verify
from safegen.backend import backend_of
from safegen.backend.injection import Injection, Opening
from safegen.mini import zoo

console = Console(stderr=True)

POLICY = """apiVersion: safegen.dev/v1
kind: Policy
metadata: {{id: threads, version: 1.0.0}}
defaults: {{transport: {{score: [paper, lexical], lo: 0.3, hi: 0.9}}}}
rules:
{rules}
"""
SUBJECTS = ("ghost", "fox", "robot", "bicycle", "key", "owl", "santa claus", "cat", "a fox and a ghost", "scooter")
STYLES = ("", " in the style of popart", " in the style of blueprint", ", sketch")

Draw = Callable[[Any, int, int], Tensor]


def prompt_of(thread: int, image: int) -> str:
    """The prompt of one image: threads start in other places, and a thread changes its prompt with every image."""
    k = 7 * thread + image
    return f"{SUBJECTS[k % len(SUBJECTS)]}{STYLES[(k // len(SUBJECTS) + thread) % len(STYLES)]}"


def own_pipeline(pipe: Any) -> Any:
    """A pipeline on shared parts; scheduler and tokenizer cannot be shared between threads upstream."""
    parts: dict[str, Any] = dict(tokenizer=copy.deepcopy(pipe.tokenizer), scheduler=copy.deepcopy(pipe.scheduler))
    own: Any = StableDiffusionPipeline.from_pipe(pipe, **parts)
    own.set_progress_bar_config(disable=True)
    return own


def alone_and_together(pipe: Any, draw: Draw, threads: int, images: int) -> tuple[list[Tensor], list[Tensor]]:
    """Draws the same images by one thread and then by many; returns each thread's, [images, 3, h, w]."""
    start = threading.Barrier(threads)
    pipes = [own_pipeline(pipe) for _ in range(threads)]

    def work(thread: int) -> Tensor:
        start.wait()
        return torch.stack([draw(pipes[thread], thread, k) for k in range(images)])

    alone = [torch.stack([draw(pipes[thread], thread, k) for k in range(images)]) for thread in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return alone, list(pool.map(work, range(threads)))


def wrong(alone: list[Tensor], together: list[Tensor]) -> int:
    """How many images differ."""
    return sum(
        not torch.equal(a, b)
        for one, other in zip(alone, together, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def one_image(pipe: Any, thread: int, image: int, steps: int) -> Tensor:
    """Draws one image from its own seed."""
    generator = torch.Generator().manual_seed(1000 * thread + image)
    prompt = prompt_of(thread, image)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt").images[0]


def guarded(pipe: Any, threads: int, images: int, steps: int, folder: Path) -> tuple[dict[str, Any], list[Floor]]:
    """safegen: what is open lives in the call of the denoiser."""
    rules = "\n".join(f"  - {{id: {c}, concept: {c}, category: custom, action: erase}}" for c in zoo.CONCEPTS)
    policy = folder / "policy.yaml"
    policy.write_text(POLICY.format(rules=rules))
    log = folder / "audit"
    started = time.perf_counter()
    with safegen.apply_policy(pipe, policy, audit=log, audit_key=KEY):
        alone, together = alone_and_together(pipe, lambda p, t, k: one_image(p, t, k, steps), threads, images)
    found = {kind: [r for r in read_records(log) if r.kind == kind] for kind in ("gated", "generated", "run.failed")}
    opened: dict[str, set[tuple[float | None, ...]]] = {}
    for record in (*found["gated"], *found["generated"]):
        opened.setdefault(record.prompt.hmac if record.prompt else "", set()).add(_permeabilities(record))
    several = sum(len(values) > 1 for values in opened.values())
    distinct = len({value for values in opened.values() for value in values})
    total = threads * images
    results = {
        "images": total,
        "prompts": len({prompt_of(thread, k) for thread in range(threads) for k in range(images)}),
        "different sets of permeabilities": distinct,
        "seconds": round(time.perf_counter() - started, 1),
    }
    floors = [
        Floor.at_most("images that differ from the single-threaded ones", wrong(alone, together), 0),
        Floor.at_most("prompts whose recorded permeabilities differ", several, 0),
        Floor.at_least("different sets of permeabilities", distinct, min(8, total)),
        Floor.at_most("records that lack or fail", 2 * total - len(found["generated"]) + len(found["run.failed"]), 0),
        Floor.at_least("the audit log verifies", float(verify(log).ok), 1.0),
    ]
    return results, floors


def _permeabilities(record: Record) -> tuple[float | None, ...]:
    return tuple(membrane.permeability for membrane in record.membranes or ())


def on_the_modules(pipe: Any, threads: int, images: int, steps: int, folder: Path) -> dict[str, Any]:
    """The peer: one multiplier per membrane on the shared modules, set before each image."""
    with safegen.apply_policy(pipe, folder / "policy.yaml", audit=folder / "peer", audit_key=KEY) as guard:
        prompts = sorted({prompt_of(t, k) for t in range(threads) for k in range(images)})
        decided = guard.decide(prompts)
    gammas = {p: torch.tensor([[a.permeability for a in d.activations]]) for p, d in zip(prompts, decided, strict=True)}
    membranes = [activation.installed.membrane for activation in decided[0].activations]
    backend = backend_of(pipe)
    injection = Injection(backend.denoiser, backend.sites, membranes, backend.family)
    multiplier = gammas[prompts[0]]

    def draw(own: Any, thread: int, image: int) -> Tensor:
        nonlocal multiplier
        multiplier = gammas[prompt_of(thread, image)]
        return one_image(own, thread, image, steps)

    ones = torch.ones(len(membranes))
    injection.attach(lambda args, _: Opening.of(multiplier.expand(len(args[0]), -1), ones), lambda _: None)
    try:
        alone, together = alone_and_together(pipe, draw, threads, images)
    finally:
        injection.detach()
    return {"permeabilities on the modules: images": threads * images, "… that differ": wrong(alone, together)}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    images: Annotated[int, typer.Option(min=1, help="Images per thread.")] = 50,
    threads: Annotated[int, typer.Option(min=2, help="Threads.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Sampler steps.")] = 5,
) -> None:
    """Counts the images that other threads have changed."""
    torch.set_num_threads(1)  # so that a sum is added up in one order, whatever else runs
    pipe = mini.load()
    with tempfile.TemporaryDirectory() as name:
        results, floors = guarded(pipe, threads, images, steps, Path(name))
        peers = on_the_modules(pipe, threads, -(-images // 10), steps, Path(name))
    report = {
        "benchmark": "Threads on one denoiser",
        "command": command(__file__),
        "model": "safegen-mini",
        "threads": threads,
        "images_per_thread": images,
        "steps": steps,
        "results": results,
        "peers": peers,
    }
    console.print(f"{results}; {peers}", soft_wrap=True)
    finish(report, floors, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
