"""Harmonic means of erasing and keeping, as papers on erasing many concepts state them."""

from __future__ import annotations

from statistics import harmonic_mean


def speed_mean(erased: float, kept: float) -> float:
    """SPEED's H_o (arXiv 2503.07392), and MACE's for celebrities: `2 / ((1 - Acc_e)⁻¹ + Acc_r⁻¹)`.

    Args:
        erased: Acc_e, share of the targets' images in which the target is still seen.
        kept: Acc_r, accuracy on what must be kept.

    Returns:
        In [0, 1]; 0 where nothing is erased or nothing is kept.
    """
    return harmonic_mean([1 - erased, kept])


def mace_mean(erased: float, kept: float, synonyms: float) -> float:
    """MACE's H_o for objects (arXiv 2403.06135): `3 / ((1 - Acc_e)⁻¹ + Acc_s⁻¹ + (1 - Acc_g)⁻¹)`.

    Args:
        erased: Acc_e, efficacy: share in which the target is still seen, of prompts with its main name.
        kept: Acc_s, specificity: accuracy on what must be kept.
        synonyms: Acc_g, generality: share in which the target is still seen, of prompts with other names of it.

    Returns:
        In [0, 1]; 0 where one of the three fails entirely.
    """
    return harmonic_mean([1 - erased, kept, 1 - synonyms])
