"""Stage 2 of the recipe: the independent judge, a small CNN that names the object and the style of a picture.

It learns from real renders (all object×style pairs) and from their autoencoder reconstructions, never from generated
pictures, and neither gates nor membrane training ever see it: it only scores what they do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safegen.mini.catalogue import OBJECT_NAMES, STYLE_NAMES
from safegen.mini.loop import Ema, cosine, run_steps, set_learning_rate, to_model_range


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the judge saw in each of n pictures.

    Attributes:
        objects: Name of the most probable object, one per picture.
        styles: Name of the most probable style, one per picture.
        object_probability: [n, objects], each row sums to 1.
        style_probability: [n, styles], each row sums to 1.
        features: [n, 256], the layer before the heads; for distances between sets of pictures.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    object_probability: Tensor
    style_probability: Tensor
    features: Tensor


class _Block(nn.Module):
    """Two 3×3 convolutions around a shortcut; the first one strides."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width_in, h, w] to [n, width, h / stride, w / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class JudgeNet(nn.Module):
    """The judge's network: images [n, 3, 64, 64] in [-1, 1] to object logits, style logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.blocks = nn.Sequential(_Block(24, 48, 1), _Block(48, 96, 2), _Block(96, 160, 2), _Block(160, 256, 2))
        self.objects = nn.Linear(256, len(OBJECT_NAMES))
        self.styles = nn.Linear(256, len(STYLE_NAMES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns object logits [n, objects], style logits [n, styles] and features [n, 256]."""
        features = self.blocks(F.relu(self.stem(images))).mean(dim=(2, 3))
        return self.objects(features), self.styles(features), features


class Judge:
    """Names the object and the style of pictures."""

    def __init__(self, net: JudgeNet) -> None:
        self.net = net.eval()

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Loads the judge from `judge.safetensors` in `folder`.

        Raises:
            ValueError: The file was made for another catalogue of objects and styles.
        """
        names = json.loads((folder / "judge.json").read_text("utf-8"))
        if tuple(names["objects"]) != OBJECT_NAMES or tuple(names["styles"]) != STYLE_NAMES:
            raise ValueError(f"{folder}/judge.json names other objects or styles than safegen.mini.catalogue")
        net = JudgeNet()
        net.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
        return cls(net)

    def save(self, folder: Path, accuracy: dict[str, float]) -> None:
        """Writes `judge.safetensors` (fp16) and `judge.json` (names, and the accuracy on held-out renders)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.net.state_dict().items()}, folder / "judge.safetensors")
        content = {"objects": OBJECT_NAMES, "styles": STYLE_NAMES, "accuracy": accuracy}
        (folder / "judge.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Verdicts:
        """Judges images [n, 3, 64, 64] in [-1, 1]."""
        parts = [self.net(part) for part in images.float().split(256)]
        objects, styles, features = (torch.cat([part[k] for part in parts]) for k in range(3))
        return Verdicts(
            tuple(OBJECT_NAMES[i] for i in objects.argmax(dim=1).tolist()),
            tuple(STYLE_NAMES[i] for i in styles.argmax(dim=1).tolist()),
            objects.softmax(dim=1),
            styles.softmax(dim=1),
            features,
        )

    def pictures(self, pictures: list[Image.Image]) -> Verdicts:
        """Judges PIL pictures of 64×64 pixels."""
        stack = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        return self(to_model_range(torch.from_numpy(stack)))

    def halves(self, pictures: list[Image.Image]) -> tuple[Verdicts, Verdicts]:
        """Judges the left and the right object of scenes, each half's object square blown up to 64×64."""
        sides: list[Verdicts] = []
        for left in (0, 32):
            crops = [p.convert("RGB").crop((left, 14, left + 32, 50)).resize((64, 64)) for p in pictures]
            sides.append(self.pictures(crops))
        return sides[0], sides[1]


def _disturb(images: Tensor) -> Tensor:
    """Shifts colours, contrast and sharpness a little: what generation changes, and naming should not depend on."""
    n = len(images)
    gain = 1 + 0.2 * (torch.rand(n, 3, 1, 1) - 0.5)
    images = images * gain + 0.15 * (torch.rand(n, 3, 1, 1) - 0.5)
    images = images + 0.08 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.3, blurred, images).clamp(-1, 1)


def _cut_out(images: Tensor) -> Tensor:
    """Greys one square of up to 20 pixels in half of the images, so that no single detail decides."""
    for image in images[torch.rand(len(images)) < 0.5]:
        edge = int(torch.randint(8, 21, ()))
        top, left = (int(v) for v in torch.randint(0, 64 - edge, (2,)))
        image[:, top : top + edge, left : left + edge] = 0.0
    return images


def train_judge(
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
    checkpoint: Path,
    *,
    steps: int,
    batch: int = 64,
    rate: float = 3e-3,
) -> Judge:
    """Trains the judge.

    Args:
        pictures: [n, 64, 64, 3], uint8: renders, reconstructions and blown-up halves of scenes.
        labels: [n, 2]: object and style index.
        checkpoint: Where to keep the state; training goes on from it where it exists.
        steps: Optimizer steps in all.
        batch: Pictures a step.
        rate: Highest learning rate.
    """
    torch.manual_seed(0)
    net = JudgeNet().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    ema = Ema(net, 0.995)
    source, wanted = torch.from_numpy(pictures), torch.from_numpy(labels)

    def step(i: int) -> dict[str, float]:
        set_learning_rate(optimizer, rate * cosine(i, steps, warmup=100))
        chosen = torch.randint(len(source), (batch,))
        images = _cut_out(_disturb(to_model_range(source[chosen])))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objects, styles, _ = net(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(objects.float(), wanted[chosen, 0], label_smoothing=0.05)
        loss = loss + F.cross_entropy(styles.float(), wanted[chosen, 1], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(net)
        right = (objects.argmax(dim=1) == wanted[chosen, 0]).float().mean().item()
        return {"loss": loss.item(), "objects": right}

    run_steps("judge", steps, step, checkpoint=checkpoint, state={"net": net, "optimizer": optimizer, "ema": ema})
    net.load_state_dict(ema.shadow)
    return Judge(net)


def accuracy(judge: Judge, pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, float]:
    """Returns the share of pictures whose object, and whose style, the judge names correctly."""
    seen = judge(to_model_range(torch.from_numpy(pictures)))
    objects = [OBJECT_NAMES[i] for i in labels[:, 0]]
    styles = [STYLE_NAMES[j] for j in labels[:, 1]]
    n = len(pictures)
    return {
        "objects": sum(a == b for a, b in zip(seen.objects, objects, strict=True)) / n,
        "styles": sum(a == b for a, b in zip(seen.styles, styles, strict=True)) / n,
        "pictures": float(n),
    }
