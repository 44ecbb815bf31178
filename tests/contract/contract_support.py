"""Writes docs/support.md from the contract suite: `python tests/contract/contract_support.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "support.md"

HEAD = """\
# What is supported

Written by `python tests/contract/contract_support.py` from the contract suite (`tests/contract/`), which runs the
same tests on a tiny pipeline of every family, built from its true classes with random weights. The suite proves how
safegen acts on a family's code; it says nothing about how well a membrane erases on a family's published weights, and
safegen ships membranes for safegen-mini alone. For other families train your own, convert a LoRA, or let the policy
refuse by words.

"""

TAIL = """\
## What is refused

`apply_policy` raises `UnsupportedBackendError`, with what it looked for and what it found, for everything else; among
it:

- pipelines with two denoisers (`transformer_2` of Wan 2.2), which would be guarded by half;
- modular pipelines of other families than SDXL;
- decoders that read no text but an image embedding (Kandinsky 2.x, Stable Cascade's decoder, SVD): no gate can read
  them.

During a run these stop the image with a reason: a planned site that does not run (fused projections, skip-layer
guidance of SD3, caches that hold another run or another branch of guidance), conditioning that safegen cannot read,
replaced parts.

## What no text gate reads

Images that are drawn from (img2img, inpaint, the first frame of a video) are not read: text gates hold, and what the
image shows is not judged. What a denoiser reads as conditioning of its own (IP-Adapter, ControlNet, T2I-adapter,
reference images of FLUX.1 Kontext and FLUX.2) makes every prompt of the call one of unknown origin, and `on_unknown`
decides: by default every membrane opens fully. Prompts whose conditioning was not made by the pipeline's text
encoders with the pipeline's own settings (`clip_skip`, other hidden layers than the default, another instruction in
front of Sana's prompts, weighted embeddings) are of unknown origin too.

Records name what else than words a run draws from (`inputs`), as far as it shows: the pictures that the pipeline's own
`prepare_latents` is given (`image`, `mask`), a ControlNet's or T2I-adapter's residuals (`control`), an IP-Adapter's
image (`ip_adapter`), reference images and the first frame of a video (`image`), and the further channels of denoisers
made for filling in, editing or depth maps. Of pipelines that were rebuilt from a guarded one, of modular pipelines and
of denoisers that are not of diffusers, neither pictures in the latents nor seeds are seen.

A denoiser that is not of diffusers is guarded through [`TorchPipeline`](how-to/guard-another-denoiser.md).
"""


def render() -> str:
    """Returns the page."""
    import test_contract
    import test_contract_hosts
    import test_contract_inputs
    import test_contract_policy
    from contract_cases import CASES, FEATURES

    suite = (test_contract, test_contract_hosts, test_contract_inputs, test_contract_policy)
    assert all(module.__doc__ for module in suite)
    refused = {name for case in CASES for name in case.refused}
    lines = ["## In every family", ""]
    lines += [f"- **{name}**: {meaning}" for name, meaning in FEATURES.items() if name not in refused]
    lines += ["", "## Where families differ", ""]
    some = [name for name in FEATURES if name in refused]
    lines += [f"- **{name}**: {FEATURES[name]}" for name in some]
    notes: dict[str, int] = {}
    rows: list[str] = []
    for case in CASES:
        cells = [f"[{notes.setdefault(why, len(notes) + 1)}]" if (why := case.refused.get(n)) else "yes" for n in some]
        rows.append(" | ".join([f"| {case.title}", case.gate, *cells]) + " |")
    lines += [
        "",
        " | ".join(["| family", "what the gate scores", *some]) + " |",
        "|" + "---|" * (len(some) + 2),
        *rows,
        "",
    ]
    lines += [f"{number}. {why}" for why, number in notes.items()]
    return HEAD + "\n".join(lines) + "\n\n" + TAIL


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    PAGE.write_text(render(), encoding="utf-8")
