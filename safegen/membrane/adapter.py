"""Alphas of the PEFT layout: they stand beside the tensors, as the settings of a `peft.LoraConfig`.

diffusers keeps the settings in the file's metadata (`lora_adapter_metadata`, JSON, each name with the component in
front: `unet.lora_alpha`); `PeftModel.save_pretrained` writes them into `adapter_config.json` beside the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from safegen.errors import FormatError
from safegen.membrane.weights import Factor

# Settings that change nothing about the product of a finished LoRA: training, bookkeeping, and which modules to choose.
_HARMLESS = frozenset(
    ("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules")
    + ("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout")
    + ("lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision")
    + ("runtime_config", "target_modules", "task_type", "velora_config")
)
_READ = frozenset(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"))
# Further settings, and the values with which they leave the product alone. Initialisations such as PiSSA are missing on
# purpose: they change the base weights, and the adapter is wrong on any others.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_LITERAL = re.compile(r"[\w.]+", re.ASCII)


def settings_for(found: object, prefix: str) -> dict[str, Any]:
    """Returns the settings of one component, names without its prefix.

    Args:
        found: What the JSON held.
        prefix: "unet.", "transformer.", or "" where the names have none.

    Raises:
        FormatError: Not an object, or settings of a further component that is no text encoder.
    """
    if not isinstance(found, dict):
        raise FormatError(f"LoRA settings are {type(found).__name__}; expected a JSON object")
    settings: dict[str, Any] = {}
    for name, value in found.items():
        if name.startswith(prefix):
            settings[name.removeprefix(prefix)] = value
        elif not name.startswith("text_encoder"):
            raise FormatError(f"LoRA setting {name!r}: expected names that begin with {prefix!r}, as the tensors' do")
    return settings


def alphas_of(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Returns the alpha of every site, such that `alpha / rank` is the scale that PEFT applies.

    Args:
        settings: Fields of a `peft.LoraConfig`.
        ranks: Rank of each site's tensors, by dotted path.

    Raises:
        FormatError: Settings that make it another product than `scale · up · down`, that safegen does not know, or
            that contradict the tensors.
    """
    for name, value in settings.items():
        if name not in _READ | _HARMLESS and value and value not in _NEUTRAL.get(name, ()):
            raise FormatError(
                f"LoRA setting {name} = {str(value)[:80]!r}: it changes what the adapter computes, or is unknown to "
                "safegen; expected a plain LoRA"
            )
    rank_pattern, alpha_pattern = _pattern(settings, "rank_pattern"), _pattern(settings, "alpha_pattern")
    alphas: dict[str, float] = {}
    for path, rank in ranks.items():
        stated = _matching(rank_pattern, path, settings.get("r"))
        if stated != rank:
            raise FormatError(f"LoRA settings state rank {stated} for site {path!r}; its tensors have rank {rank}")
        alpha = _matching(alpha_pattern, path, settings.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise FormatError(f"LoRA settings state alpha {alpha!r} for site {path!r}; expected a number")
        alphas[path] = float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
    return alphas


def _pattern(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a pattern with plain paths for keys.

    PEFT takes the keys for regular expressions. One that is more than a path is refused: a stranger's expression can
    take for ever to match.
    """
    found: object = settings.get(name) or {}
    if not isinstance(found, dict):
        raise FormatError(f"LoRA setting {name} is {type(found).__name__}; expected a JSON object")
    plain: dict[str, Any] = {}
    for key, value in found.items():
        path = key.removeprefix("^").replace("\\.", ".")
        if _LITERAL.fullmatch(path) is None:
            raise FormatError(f"LoRA setting {name}: {key[:80]!r} is no path of a module; expected plain paths")
        plain["^" * key.startswith("^") + path] = value
    return plain


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns the value of the first key that is the path, or (without "^") its end."""
    for key, value in pattern.items():
        if key == f"^{path}" or key == path or path.endswith(f".{key}"):
            return value
    return default


def adapter_metadata(factors: Mapping[str, Factor], prefix: str) -> str:
    """Returns `lora_adapter_metadata` of a file; diffusers makes its `LoraConfig` of it, with every site's own scale.

    Args:
        factors: By dotted path of the site.
        prefix: "unet." or "transformer.".
    """
    rank = Counter(f.rank for f in factors.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in factors.values()).most_common(1)[0][0]
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(path): f.rank for path, f in factors.items() if f.rank != rank},
        "alpha_pattern": {_exactly(path): f.alpha for path, f in factors.items() if f.alpha != alpha},
        "target_modules": sorted(factors),
    }
    return json.dumps({prefix + name: value for name, value in settings.items()}, sort_keys=True)


def _exactly(path: str) -> str:
    return "^" + path.replace(".", "\\.")
