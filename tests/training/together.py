"""Trains on a tiny pipeline in whatever processes a launcher started; the first one writes what came out."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import tiny_sd

from safegen.backend import backend_of
from safegen.membrane.file import write_membrane
from safegen.training.config import TrainConfig
from safegen.training.recipe import Trainer

POOL = ("a fox", "the robot in a photo", "a mouse", "santa")


def settings(*, processes: int) -> TrainConfig:
    """The same rows an iteration, however many processes share them."""
    return TrainConfig(
        concept="ghost",
        targets=("ghost",),
        iterations=4,
        batch=4 // processes,
        anchor_batch=8 // processes,
        trajectories=4 // processes,
        trajectory_steps=4,
        reuse=2,
        open_share=0.5,
    )


def main() -> None:
    pipe = tiny_sd()
    config = settings(processes=2)
    trainer = Trainer(backend_of(pipe), config, POOL, pipe.scheduler)
    assert trainer.workers.count == 2
    membrane = trainer.run()
    if trainer.workers.rank == 0:
        write_membrane(membrane, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
