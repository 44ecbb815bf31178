"""The settings of a membrane training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, model_validator

IDENTITY = ("concept", "targets", "surrogate", "templates", "neighbours")
"""Fields that say what is erased; the others say how, and are shared by all concepts of one run."""


class TrainConfig(BaseModel):
    """Settings of one training; every field has a reader in this package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str = Field(min_length=1, description="Catalogue id of what is erased.")
    targets: tuple[str, ...] = Field(min_length=1, description="Names to erase, the main one first.")
    surrogate: str = Field(default="", description="What the target turns into; empty: the unconditional prediction.")
    templates: tuple[tuple[str, str], ...] = Field(
        default=(("{}", ""),),
        min_length=1,
        description="Prompts around the target's name, each with what remains of it once the name is erased.",
    )
    neighbours: tuple[str, ...] = Field(
        default=(), description="Names of what is easily taken for the target: held in place in the target's prompts."
    )
    rank: int = Field(default=1, ge=1, le=64)
    alpha: float = Field(default=1.0, gt=0)
    eta: float = Field(default=1.0, ge=0, description="η of SPM Eq. 4.")
    anchoring: float = Field(default=10.0, ge=0, description="λ of SPM Eq. 8.")
    anchors: Literal["reference", "paper", "neighbours"] = Field(
        default="neighbours", description="Distribution of anchors."
    )
    anchor_alpha: float = Field(default=1.0, ge=0, description="α of SPM Eq. 6; read by `anchors: paper`.")
    sharpness: float = Field(default=1.5, ge=0, description="κ of `anchors: neighbours`.")
    iterations: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    schedule: Literal["cosine", "restarts", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0, description="Iterations over which the learning rate rises.")
    cycles: int = Field(default=3, ge=1, description="Cosines of `schedule: restarts`.")
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="Norm that gradients are clipped to; 0: they are not.")
    ema: float = Field(default=0.0, ge=0, lt=1, description="Decay of the average that is kept; 0: none.")
    batch: int = Field(default=6, ge=1, description="Target rows an iteration, of each process.")
    anchor_batch: int = Field(
        default=10, ge=1, description="Anchor rows an iteration, of each process; one in ten is the empty prompt."
    )
    trajectories: int = Field(default=8, ge=1, description="Target trajectories drawn at a time, and as many anchors'.")
    trajectory_steps: int = Field(default=12, ge=2, description="Sampler steps of the trajectories that give x_t.")
    trajectory_guidance: float = Field(default=3.0, ge=1, description="Guidance of these trajectories.")
    open_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of target trajectories drawn with the membrane open."
    )
    reuse: int = Field(default=8, ge=1, description="Iterations that share one set of trajectories.")
    latent_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="Edges of the latents, one drawn for each set of trajectories; empty: the model's own."
    )
    adversarial_tokens: int = Field(
        default=0, ge=0, description="Learned positions that try to bring the target back; 0: no adversary."
    )
    adversarial_steps: int = Field(default=4, ge=1, description="Steps of the adversary in each of its turns.")
    adversarial_rate: float = Field(default=0.3, gt=0, description="Length of such a step, in norms of a position.")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = Field(default=False, description="Compute activations again instead of keeping them.")
    seed: int = 0

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        for template, _ in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r}: expected {{}} once, where the name goes")
        return self

    def digest(self) -> str:
        """Returns the sha256, in hex, of the canonical settings (RFC 8785)."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()


def run_digest(configs: Sequence[TrainConfig], pool: Sequence[str], architecture: str) -> str:
    """Returns the sha256, in hex, of all that a run depends on: two runs with the same one do the same."""
    content = {"trainings": [c.digest() for c in configs], "pool": list(pool), "architecture": architecture}
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()
