"""The whole recipe of safegen-mini: `python -m safegen.mini.build`.

Fetches the emoji art with npm, rasterises it, trains the autoencoder, the judge, and U-Net with text tower, judges what
the model draws, and writes weights, model card and credits. Every stage goes on from its last checkpoint after a stop.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from safegen.mini import art
from safegen.mini.art import draw, scene_boxes, single_box
from safegen.mini.autoencoder import encode, train_autoencoder
from safegen.mini.captions import new_tokenizer
from safegen.mini.card import size_of
from safegen.mini.catalogue import OBJECTS, STYLE_NAMES
from safegen.mini.diffusion import Settings, assemble, encode_pictures, train_diffusion
from safegen.mini.examine import examine, write_figures, write_grid
from safegen.mini.judge import Judge, accuracy, train_judge

AUTOENCODER_STEPS = 2400
JUDGE_STEPS = 3000
DIFFUSION_STEPS = 6_000
VARIANTS = 4
SCENES = 8000

console = Console()


def draw_pictures(
    sprites: NDArray[np.uint8], *, repeats: int, scenes: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws every object×style pair `repeats` times, and after each round `scenes` scenes.

    Returns:
        Pictures [n, 64, 64, 3] and labels [n, 3]: left (or only) object, right object or -1, style.
    """
    rng = np.random.default_rng(seed)
    count = len(OBJECTS)
    pictures: list[NDArray[np.uint8]] = []
    labels: list[tuple[int, int, int]] = []
    for _ in range(repeats):
        for i in range(count):
            for j, name in enumerate(STYLE_NAMES):
                pictures.append(draw([sprites[i, j]], [single_box(rng)], name))
                labels.append((i, -1, j))
        for _ in range(scenes):
            a, b = (int(v) for v in rng.integers(count, size=2))
            j = int(rng.integers(len(STYLE_NAMES)))
            pictures.append(draw([sprites[a, j], sprites[b, j]], scene_boxes(rng), STYLE_NAMES[j]))
            labels.append((a, b, j))
    return np.stack(pictures), np.array(labels)


@torch.no_grad()
def reconstruct(vae: Any, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns pictures after the autoencoder: what a perfect denoiser would draw."""
    parts: list[NDArray[np.uint8]] = []
    for part in torch.from_numpy(pictures).split(64):
        decoded = vae.decode(encode(vae, part)).sample
        parts.append(decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def judge_pictures(
    vae: Any, sprites: NDArray[np.uint8], *, repeats: int, scenes: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws what the judge learns from or is tested on: renders, reconstructions, blown-up halves of scenes.

    Returns:
        Pictures [n, 64, 64, 3] and labels [n, 2]: object, style.
    """
    pictures, labels = draw_pictures(sprites, repeats=repeats, scenes=scenes, seed=seed)
    whole = labels[:, 1] < 0
    found: list[NDArray[np.uint8]] = []
    wanted: list[NDArray[np.int64]] = []
    for version in (pictures, reconstruct(vae, pictures)):
        found.append(version[whole])
        wanted.append(labels[whole][:, [0, 2]])
        if scenes == 0:
            continue
        for side, left in ((0, 0), (1, 32)):
            crops = torch.from_numpy(version[~whole][:, 14:50, left : left + 32]).permute(0, 3, 1, 2).float()
            grown = torch.nn.functional.interpolate(crops, size=64, mode="bicubic", antialias=False)
            found.append(grown.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy())
            wanted.append(labels[~whole][:, [side, 2]])
    return np.concatenate(found), np.concatenate(wanted)


def build_judge(vae: Any, sprites: NDArray[np.uint8], work: Path) -> tuple[Judge, dict[str, float]]:
    """Trains the judge and measures it on renders and reconstructions that it has not seen."""
    pictures, labels = judge_pictures(vae, sprites, repeats=8, scenes=700, seed=3)
    judge = train_judge(pictures, labels, work / "judge.pt", steps=JUDGE_STEPS)
    return judge, accuracy(judge, *judge_pictures(vae, sprites, repeats=2, scenes=0, seed=4))


def _load_as_float32(config: Path) -> None:
    """Makes stock `from_pretrained` load the text tower in float32, as it does U-Net and autoencoder.

    transformers takes the dtype of the config, diffusers float32; the pipeline needs them equal.
    """
    content = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(content | {"dtype": "float32"}, indent=2) + "\n", "utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Where the pipeline folder and the judge go.")] = Path("runs/mini/out"),
    work: Annotated[Path, typer.Option(help="Where art and checkpoints are kept.")] = Path("runs/mini/work"),
    diffusion_steps: Annotated[int, typer.Option(help="Steps of the U-Net's training.")] = DIFFUSION_STEPS,
    threads: Annotated[int, typer.Option(help="Processor cores to use.")] = 2,
) -> None:
    """Builds safegen-mini from nothing; goes on where an earlier build stopped."""
    torch.set_num_threads(threads)
    art.fetch(work / "art")
    sprites = art.load_sprites(work / "art")
    pictures, _ = draw_pictures(sprites, repeats=14, scenes=250, seed=0)
    vae = train_autoencoder(pictures, work / "autoencoder.pt", steps=AUTOENCODER_STEPS)
    judge, judged = build_judge(vae, sprites, work)
    console.print(f"judge on held-out pictures: objects {judged['objects']:.1%}, styles {judged['styles']:.1%}")
    tokenizer = new_tokenizer()
    latents = encode_pictures(vae, sprites, work / "latents.pt", variants=VARIANTS, scenes=SCENES)
    settings = Settings(steps=diffusion_steps, workers=threads)
    unet, text = train_diffusion(latents, tokenizer, work / "diffusion.pt", settings)
    pipe = assemble(vae, unet, text, tokenizer).to(dtype=torch.float16)
    shutil.rmtree(out / "weights", ignore_errors=True)
    pipe.save_pretrained(out / "weights", safe_serialization=True)
    _load_as_float32(out / "weights" / "text_encoder" / "config.json")
    judge.save(out / "judge_weights", judged)
    training = {"steps": settings.steps, "batch": settings.batch, "history": ""}
    (out / "weights" / "training.json").write_text(json.dumps(training, indent=1) + "\n", "utf-8")
    pipe = pipe.to(dtype=torch.float32)
    write_grid(pipe, out / "weights" / "grid.png")
    figures = examine(pipe, judge)
    write_figures(out / "weights", figures)
    console.print(f"wrote {out}: {size_of(out / 'weights'):.1f} MB of model, {figures}")


if __name__ == "__main__":
    typer.run(main)
