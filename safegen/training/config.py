"""The settings of a membrane training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

import rfc8785
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError

_Int = Annotated[int, Field(strict=True)]
_Count = Annotated[int, Field(strict=True, ge=1)]
_Natural = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Size = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(strict=True, ge=0, le=1)]


def _one_place(pair: tuple[str, str]) -> tuple[str, str]:
    if pair[0].count("{}") != 1:
        raise PydanticCustomError("template", "expected {place} once, where the name goes", {"place": "{}"})
    return pair


Template = Annotated[tuple[str, str], AfterValidator(_one_place)]
"""A prompt around a name (`{}`), and what remains of it once the name is erased."""


class Settings(BaseModel):
    """How a training goes, whatever it erases; every field has a reader in this package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    alpha: _Positive = 1.0
    eta: _Size = Field(default=1.0, description="η of SPM Eq. 4.")
    anchoring: _Size = Field(default=10.0, description="λ of SPM Eq. 8.")
    anchors: Literal["reference", "paper", "neighbours"] = Field(
        default="neighbours", description="Distribution of anchors."
    )
    anchor_alpha: _Size = Field(default=1.0, description="α of SPM Eq. 6; read by `anchors: paper`.")
    sharpness: _Size = Field(default=1.5, description="κ of `anchors: neighbours`.")
    iterations: _Count = 200
    learning_rate: _Positive = 1e-2
    schedule: Literal["cosine", "restarts", "constant"] = "cosine"
    warmup: _Natural = Field(default=0, description="Iterations over which the learning rate rises.")
    cycles: _Count = Field(default=3, description="Cosines of `schedule: restarts`.")
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: _Size = 0.0
    max_grad_norm: _Size = Field(default=1.0, description="Norm that gradients are clipped to; 0: they are not.")
    ema: Annotated[float, Field(strict=True, ge=0, lt=1)] = Field(
        default=0.0, description="Decay of the average that is kept; 0: none."
    )
    batch: _Count = Field(default=6, description="Target rows an iteration, of each process.")
    anchor_batch: _Count = Field(
        default=10, description="Anchor rows an iteration, of each process; one in ten is the empty prompt."
    )
    trajectories: _Count = Field(default=8, description="Target trajectories drawn at a time, and as many anchors'.")
    trajectory_steps: Annotated[int, Field(strict=True, ge=2)] = Field(
        default=12, description="Sampler steps of the trajectories that give x_t."
    )
    trajectory_guidance: Annotated[float, Field(strict=True, ge=1)] = Field(
        default=3.0, description="Guidance of these trajectories."
    )
    open_share: _Share = Field(
        default=0.0, description="Share of target trajectories that are drawn with the membrane open."
    )
    reuse: _Count = Field(default=8, description="Iterations that share one set of trajectories.")
    latent_sizes: tuple[_Count, ...] = Field(
        default=(), description="Edges of the latents, one drawn for each set of trajectories; empty: the model's own."
    )
    adversarial_tokens: _Natural = Field(
        default=0, description="Learned positions that try to bring the target back; 0: no adversary."
    )
    adversarial_steps: _Count = Field(default=4, description="Steps of the adversary in each of its turns.")
    adversarial_rate: _Positive = Field(default=0.3, description="Length of such a step, in norms of a position.")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: StrictBool = Field(default=False, description="Compute activations again instead of keeping them.")
    seed: _Int = 0


class TrainConfig(Settings):
    """Settings of one training: what is erased, and how."""

    concept: str = Field(min_length=1, description="Catalogue id of what is erased.")
    targets: tuple[str, ...] = Field(min_length=1, description="Names to erase, the main one first.")
    surrogate: str = Field(default="", description="What the target turns into; empty: what remains of the prompt.")
    templates: tuple[Template, ...] = Field(
        default=(("{}", ""),),
        min_length=1,
        description="Prompts around the target's name, each with what remains of it once the name is erased.",
    )
    neighbours: tuple[str, ...] = Field(
        default=(), description="Names of what is easily taken for the target: held in place in the target's prompts."
    )

    def shared(self) -> Settings:
        """Returns what the concepts of one run have in common."""
        return Settings(**self.model_dump(include=set(Settings.model_fields)))

    def digest(self) -> str:
        """Returns the sha256, in hex, of the canonical settings (RFC 8785)."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()


def run_digest(configs: Sequence[TrainConfig], pool: Sequence[str], architecture: str) -> str:
    """Returns the sha256, in hex, of all that a run depends on: two runs with the same one do the same."""
    content = {"trainings": [c.digest() for c in configs], "pool": list(pool), "architecture": architecture}
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()
