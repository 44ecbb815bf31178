"""The host with the membranes that are being trained: what is predicted with which of them open."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safegen.backend.base import Backend
from safegen.backend.injection import Injection, Opening
from safegen.backend.sites import file_key
from safegen.membrane.weights import Factor, Membrane
from safegen.training.config import TrainConfig

_CHECKPOINTING = {"_gradient_checkpointing_func", "gradient_checkpointing"}  # what diffusers sets on modules


class Student:
    """Membranes of several concepts on one host, with gradients; the host's own weights are not changed."""

    def __init__(self, backend: Backend, configs: Sequence[TrainConfig], generator: torch.Generator) -> None:
        """Makes fresh factors for every concept, on the host's device, in float32 whatever its dtype.

        Args:
            backend: The host.
            configs: The settings of each concept.
            generator: Source of chance of the down factors.
        """
        self.backend, self.configs, self.config = backend, tuple(configs), configs[0]
        first = next(iter(backend.denoiser.parameters()))
        self.device, self._dtype = first.device, first.dtype
        self.factors = [self._new_factors(generator) for _ in configs]
        self.parameters = [[p for f in factors.values() for p in (f.down, f.up)] for factors in self.factors]
        membranes = [self.membrane(k, factors) for k, factors in enumerate(self.factors)]
        self._injection = Injection(backend.denoiser, backend.sites, membranes, backend.family)
        self._opening = Opening(0, (), torch.zeros(0, 0), None)
        self._shown: Tensor | None = None  # while a picture is drawn: how far each membrane is open

    @property
    def every(self) -> list[Tensor]:
        """The parameters of all concepts, in one list."""
        return [p for parameters in self.parameters for p in parameters]

    def bytes(self) -> int:
        """Returns the size of the denoiser, the text encoder and the membranes."""
        parts = (*self.backend.denoiser.parameters(), *self.backend.text_encoder.parameters(), *self.every)
        return sum(p.numel() * p.element_size() for p in parts)

    def _new_factors(self, generator: torch.Generator) -> dict[str, Factor]:
        """Up factors are 0, so that training starts at the base model; down factors are Kaiming uniform, a = √5."""
        factors: dict[str, Factor] = {}
        for name, module in self.backend.sites.modules.items():
            weight = module.weight
            down = torch.empty(self.config.rank, *weight.shape[1:])
            bound = 1 / math.sqrt(down[0].numel())  # kaiming_uniform_ with a = √5
            down.uniform_(-bound, bound, generator=generator)
            up = torch.zeros(weight.shape[0], self.config.rank, *([1, 1] if weight.ndim == 4 else []))
            down, up = (tensor.to(self.device).requires_grad_(True) for tensor in (down, up))
            factors[file_key(name)] = Factor(down, up, self.config.alpha)
        return factors

    def membrane(self, k: int, factors: dict[str, Factor], metadata: dict[str, str] | None = None) -> Membrane:
        """Returns a concept's membrane with these factors, and in its metadata what its training was."""
        config = self.configs[k]
        own = {"safegen.training": config.model_dump_json(), "safegen.training_digest": config.digest()}
        return Membrane(
            config.concept,
            config.targets,
            self.backend.family,
            self.backend.sites.architecture,
            factors,
            config.surrogate,
            metadata=own | (metadata or {}),
        )

    def predict(self, x: Tensor, t: Tensor, states: Tensor, *, opened: int | Tensor | None) -> Tensor:
        """Calls the denoiser with all membranes shut, with one of them open, or as far as γ [rows, membranes] says."""
        if isinstance(opened, Tensor):
            self._opening = Opening.of(opened, torch.ones(opened.shape[1]))
        else:
            membranes = () if opened is None else (opened,)
            self._opening = Opening(len(x), membranes, torch.ones(len(x), len(membranes)), None)
        low = self.config.precision != "float32"
        with torch.autocast(self.device.type, getattr(torch, self.config.precision) if low else None, enabled=low):
            found = self.backend.predict(x.to(self.device, self._dtype), t.to(self.device), states)
        return found.float()

    def _open_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
        """Says what is open in a call: what `predict` set, or, in a picture, the rows behind the unconditional ones."""
        if self._shown is None:
            return self._opening
        rows = len(self.backend.call(args, kwargs).states)
        permeability = torch.zeros(rows, len(self.configs))
        permeability[rows // 2 :] = self._shown
        return Opening.of(permeability, torch.ones(len(self.configs)))

    @contextmanager
    def drawing(self, concept: int | None) -> Generator[None]:
        """Lets the host's pipeline draw, with guidance, during `attached`: one membrane fully open, or none."""
        self._shown = torch.zeros(len(self.configs))
        if concept is not None:
            self._shown[concept] = 1.0
        try:
            yield
        finally:
            self._shown = None

    @contextmanager
    def attached(self) -> Generator[None]:
        """Attaches the membranes and keeps the denoiser's own weights out of the graph; afterwards all is as it was."""
        denoiser: Any = self.backend.denoiser
        requires = {p: p.requires_grad for p in denoiser.parameters()}
        saving = self.config.checkpointing and not denoiser.is_gradient_checkpointing
        modules: list[nn.Module] = list(denoiser.modules()) if saving else []
        held = [(m, {n: m.__dict__[n] for n in _CHECKPOINTING if n in m.__dict__}) for m in modules]
        self._injection.attach(self._open_now, lambda _: None)
        try:
            for p in requires:
                p.requires_grad_(False)
            if saving:
                denoiser.enable_gradient_checkpointing()
            yield
        finally:
            if saving:
                denoiser.disable_gradient_checkpointing()
                for module, values in held:
                    module.__dict__.update(values)
                    for name in _CHECKPOINTING - values.keys():
                        module.__dict__.pop(name, None)
            for p, value in requires.items():
                p.requires_grad_(value)
            self._injection.detach()
