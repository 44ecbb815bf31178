"""Tiny pipelines built from the true config classes, with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safegen.audit import AuditOptions, HmacKey, Record, read_records
from safegen.backend.base import Backend
from safegen.backend.sites import file_key
from safegen.composition import Composition
from safegen.guard import Guard, apply_policy
from safegen.membrane.file import write_membrane
from safegen.membrane.weights import Factor, Membrane
from safegen.transport.calibration import METADATA_KEY, Calibration, text_of

WORDS = tuple("a an the of in and style photo ghost robot fox van gogh mouse mickey santa claus nude".split())  # noqa: SIM905


FIXED = ", transport: {score: always, guidance: both}"
"""Ends the defaults of a policy whose membranes are open in full for every row."""


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer that spells: every letter is a token, and each of `WORDS` is one token."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet + [f"{c}</w>" for c in alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])  # from the right, so that the end of a word keeps words apart
            if "".join(pair) not in vocabulary:
                merges.append(pair)
                vocabulary["".join(pair)] = len(vocabulary)
            pieces[-2:] = ["".join(pair)]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    content: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    return CLIPTokenizer(**content, model_max_length=length)


def tiny_sd(
    *, seed: int = 0, width: int = 32, blocks: tuple[int, ...] = (16, 32), tokens: int = 16, **unet: Any
) -> Any:
    """A Stable Diffusion pipeline of about 0.3 M parameters, 16×16 latents, 32×32 images."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(tokens)
    special: dict[str, Any] = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            **special,
        )
    )
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": blocks,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    model = UNet2DConditionModel(**shape | unet)
    autoencoder: dict[str, Any] = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae = AutoencoderKL(**autoencoder)
    parts: dict[str, Any] = dict(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=model,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for part in (text, model, vae):
        part.eval()
    return pipe


def tiny_sentence_encoder(folder: Path) -> Path:
    """Writes a BERT of random weights with a vocabulary of whole words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"vocab": {word: k for k, word in enumerate(words)}}
    BertTokenizer(**content).save_pretrained(folder)
    config: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **config)).save_pretrained(folder)
    return folder


def random_membrane(
    pipe: Any, concept: str = "ghost", *, rank: int = 1, seed: int = 0, size: float = 0.5, floor: float = 0.99
) -> Membrane:
    """A membrane with random factors that fits a tiny pipeline.

    It is calibrated by hand for the pipeline's text encoder: graded scores open it from `floor` on, in proportion up to
    1. With 1, only the bare name itself and whole phrases do.
    """
    from safegen.backend import backend_of

    backend = backend_of(pipe)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factor] = {}
    for name, module in backend.sites.modules.items():
        tail = [1, 1] if module.weight.ndim == 4 else []
        down = size * torch.randn(rank, *module.weight.shape[1:], generator=generator)
        up = size * torch.randn(module.weight.shape[0], rank, *tail, generator=generator)
        factors[file_key(name)] = Factor(down, up, float(rank))
    name = concept.replace("-", " ")
    metadata = {METADATA_KEY: text_of([by_hand(score, backend, floor) for score in ("direction", "paper")])}
    return Membrane(concept, (name,), backend.family, backend.sites.architecture, factors, metadata=metadata)


def by_hand(score: str, backend: Backend, lo: float) -> Calibration:
    """A calibration that nobody measured: the thresholds are `lo` and 1."""
    return Calibration(score, backend.fingerprint, lo, 1.0, auroc=1.0, false_open_at_99=0.0, positives=1, negatives=1)


def draw(pipe: Any, prompts: str | Sequence[str], *, seed: int = 0, steps: int = 3, **kwargs: Any) -> Tensor:
    """Draws with fixed seeds; returns images [n, 3, h, w] in [0, 1]."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(kwargs.get("negative_prompt"), str):
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(texts)
    count = len(texts) * int(kwargs.get("num_images_per_prompt", 1))
    generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
    return pipe(texts, num_inference_steps=steps, generator=generators, output_type="pt", **kwargs).images


def policy_file(
    folder: Path,
    rules: Mapping[str, str] | None = None,
    *,
    mode: str = "enforce",
    on_unknown: str = "open",
    audit: str = "{text: none}",
    extra: str = "",
) -> Path:
    """Writes a policy with one rule per concept id; a rule's value is its action, and what may follow it."""
    lines = [
        "apiVersion: safegen.dev/v1",
        "kind: Policy",
        "metadata: {id: tiny, version: 1.0.0}",
        f"mode: {mode}",
        f"defaults: {{on_unknown: {on_unknown}{extra}}}",
        "rules:",
        *(
            f"  - {{id: {concept}, concept: {concept}, category: custom, severity: high, action: {action}}}"
            for concept, action in (rules or {"ghost": "erase"}).items()
        ),
        f"audit: {audit}",
    ]
    path = folder / f"policy-{len(list(folder.glob('policy-*')))}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def install(folder: Path, *membranes: Membrane) -> Path:
    """Writes membranes into a folder laid out as the shipped one; returns its root."""
    for membrane in membranes:
        write_membrane(membrane, folder / "membranes" / membrane.base / membrane.concept / "membrane.safetensors")
    (folder / "membranes").mkdir(exist_ok=True)
    return folder / "membranes"


def state_of(*modules: nn.Module) -> dict[str, Any]:
    """What must be the same after a policy was taken off: attributes by identity, weights by their bytes, reprs."""
    found: dict[str, Any] = {}
    for number, root in enumerate(modules):
        found[f"{number}: repr"] = repr(root)
        found |= {f"{number}: {name}": value.clone() for name, value in root.state_dict().items()}
        for name, module in root.named_modules():
            found[f"{number}: {name}.__dict__"] = {key: id(value) for key, value in module.__dict__.items()}
            found[f"{number}: {name} class"] = type(module)
    return found


def same_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Compares two results of `state_of`, bit for bit."""
    if list(before) != list(after):
        return False
    return all(
        torch.equal(value.view(torch.uint8), after[name].view(torch.uint8))
        if isinstance(value, Tensor) and value.ndim
        else value == after[name]
        for name, value in before.items()
    )


def applied(
    pipe: Any,
    folder: Path,
    key: HmacKey,
    rules: Mapping[str, str] | None = None,
    *,
    membranes: Sequence[Membrane] | None = None,
    options: AuditOptions | None = None,
    composition: Composition = "runtime",
    **policy: Any,
) -> Guard:
    """Puts a policy in force: by default one that erases "ghost" with a random membrane that only words can open."""
    chosen = [random_membrane(pipe, floor=1.0)] if membranes is None else membranes
    root = install(folder, *chosen)
    return apply_policy(
        pipe,
        policy_file(folder, rules, **policy),
        audit=folder / "audit",
        audit_key=key,
        audit_options=options,
        membranes=[root],
        composition=composition,
    )


def records(folder: Path, kind: str | None = None) -> list[Record]:
    """The audit records of `applied`, all or of one kind."""
    return [record for record in read_records(folder / "audit") if kind is None or record.kind == kind]


def attributes(pipe: Any) -> dict[str, int]:
    """A pipeline's attributes by identity, without those that diffusers sets in each run."""
    run = {"_clip_skip", "_cross_attention_kwargs", "_guidance_rescale", "_guidance_scale", "_interrupt"}
    return {key: id(value) for key, value in pipe.__dict__.items() if key not in run | {"_num_timesteps"}}


def rowwise(first: Tensor, second: Tensor) -> list[bool]:
    """For each image, whether the two are equal bit for bit."""
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def embeds(pipe: Any, text: str) -> Tensor:
    """Conditioning of one prompt, made by the pipeline itself."""
    return pipe.encode_prompt(text, "cpu", 1, False)[0]


def draw_embeds(pipe: Any, prompt: Tensor, **options: Any) -> Tensor:
    """Draws from embeddings, with fixed seeds; the negative embeddings are zero."""
    negative = torch.zeros_like(prompt) if options.get("guidance_scale", 2) > 1 else None
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompt))]
    values: dict[str, Any] = dict(num_inference_steps=3, output_type="pt", generator=generators) | options
    return pipe(prompt_embeds=prompt, negative_prompt_embeds=negative, **values).images


def skipped(hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
    """A `forward` that does nothing: for layers that a host leaves out."""
    return hidden
