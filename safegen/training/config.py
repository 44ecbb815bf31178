"""The settings of a membrane training."""

from __future__ import annotations

import hashlib
from typing import Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """Settings of one training; every field has a reader in `recipe`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str = Field(min_length=1, description="Catalogue id of what is erased.")
    targets: tuple[str, ...] = Field(min_length=1, description="Names to erase, the main one first.")
    surrogate: str = Field(default="", description="What the target turns into; empty: the unconditional prediction.")
    templates: tuple[tuple[str, str], ...] = Field(
        default=(("{}", ""),),
        min_length=1,
        description="Prompts around the target's name, each with what remains of it once the name is erased.",
    )
    rank: int = Field(default=1, ge=1, le=64)
    alpha: float = Field(default=1.0, gt=0)
    eta: float = Field(default=1.0, ge=0, description="η of SPM Eq. 4.")
    anchoring: float = Field(default=10.0, ge=0, description="λ of SPM Eq. 8.")
    anchors: Literal["paper", "neighbours"] = Field(default="neighbours", description="Distribution of anchors.")
    anchor_alpha: float = Field(default=1.0, ge=0, description="α of SPM Eq. 6; read by `anchors: paper`.")
    sharpness: float = Field(default=1.5, ge=0, description="κ of `anchors: neighbours`.")
    iterations: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    batch: int = Field(default=6, ge=1, description="Target rows an iteration.")
    anchor_batch: int = Field(default=10, ge=1, description="Anchor rows an iteration, one of them the empty prompt.")
    trajectory_steps: int = Field(default=12, ge=2, description="Sampler steps of the trajectories that give x_t.")
    trajectory_guidance: float = Field(default=3.0, ge=1, description="Guidance of these trajectories.")
    reuse: int = Field(default=8, ge=1, description="Iterations that share one set of trajectories.")
    seed: int = 0

    def digest(self) -> str:
        """Returns the sha256, in hex, of the canonical settings (RFC 8785)."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()
