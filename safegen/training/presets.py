"""Settings to start from: by base family, by what is erased, and those of the paper.

The family presets are starting points that nobody has trained with here: safegen-mini is the only model that trainings
were measured on, and `Settings`' defaults are its own. They follow from the families' sizes and from what users of
the released code ran into (docs/decisions/0017).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["mini", "sd1", "sd2", "sdxl", "sd3", "flux", "pixart"]
Application = Literal["object", "style", "explicit", "memorised"]
Method = Literal["ours", "paper"]

_LARGE: Mapping[str, Any] = dict(
    learning_rate=5e-4, iterations=1000, warmup=50, batch=2, anchor_batch=6, trajectories=4, trajectory_steps=20,
    anchoring=100.0, precision="bfloat16",
)  # fmt: skip
_VERY_LARGE: Mapping[str, Any] = dict(_LARGE) | dict(batch=1, anchor_batch=4, trajectories=2, checkpointing=True)

FAMILIES: Mapping[Family, Mapping[str, Any]] = {
    "mini": {},
    "sd1": dict(_LARGE) | dict(latent_sizes=(32, 40, 48, 56, 64)),
    "sd2": dict(_LARGE) | dict(latent_sizes=(64, 80, 96)),
    # scale = alpha / rank stays 1: rank 32 with alpha 1 is why "no difference" was seen on SDXL. λ is lower there.
    "sdxl": dict(_VERY_LARGE) | dict(latent_sizes=(96, 112, 128), rank=4, alpha=4.0, anchoring=10.0),
    "sd3": dict(_VERY_LARGE) | dict(latent_sizes=(64, 96, 128), rank=4, alpha=4.0, anchoring=10.0),
    # Guidance is distilled into the model: a trajectory has no unconditional branch.
    "flux": dict(_VERY_LARGE) | dict(latent_sizes=(64, 96), rank=4, alpha=4.0, anchoring=10.0, trajectory_guidance=1.0),
    "pixart": dict(_VERY_LARGE) | dict(latent_sizes=(64, 128), rank=4, alpha=4.0, anchoring=10.0),
}

APPLICATIONS: Mapping[Application, Mapping[str, Any]] = {
    "object": {},
    "style": {},
    # Many wordings, no neighbour that is worth keeping at the price of a leak: push further, and train against attacks.
    "explicit": dict(eta=3.0, open_share=0.5, adversarial_tokens=8),
    # One picture: the works next to it (by the same hand, of the same title) are what must stay.
    "memorised": dict(sharpness=3.0),
}

# Appendix C.1 of the paper, and what the released configuration adds to it.
_PAPER: Mapping[str, Any] = dict(
    rank=1, alpha=1.0, eta=1.0, anchoring=1000.0, anchors="paper", anchor_alpha=1.0, iterations=3000,
    learning_rate=1e-4, schedule="restarts", warmup=500, cycles=3, optimizer="adamw8bit", weight_decay=0.01,
    max_grad_norm=0.0, batch=1, anchor_batch=4, trajectories=1, trajectory_steps=30, trajectory_guidance=3.0,
    open_share=1.0, reuse=1,
)  # fmt: skip
_PAPER_SIZES: Mapping[Family, tuple[int, ...]] = {
    "sd1": (32, 40, 48, 56),  # 256 to 448 pixels; 512 is never drawn
    "sd2": (96,),
    "sdxl": (128,),
}


def preset(family: Family, application: Application, method: Method) -> dict[str, Any]:
    """Returns the settings of a preset, those that differ from the defaults of `Settings`."""
    if method == "ours":
        scale = {"iterations": 3 * FAMILIES[family].get("iterations", 200)} if application == "explicit" else {}
        return {**FAMILIES[family], **APPLICATIONS[application], **scale}
    nudity = dict(iterations=15000, anchoring=100.0, eta=3.0) if application == "explicit" else {}
    return {**_PAPER, "latent_sizes": _PAPER_SIZES.get(family, ()), **nudity}
