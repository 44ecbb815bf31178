"""What a host does to its pipeline after a policy was applied: the membrane stays effective, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny import FIXED, applied, draw, random_membrane, records, same_state, state_of, tiny_sd
from torch import Tensor, nn

from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.backend.sites import file_key
from safegen.errors import AttestationError, CoverageError, UnsupportedBackendError
from safegen.membrane.weights import Membrane

PROMPTS = ["a ghost", "a fox"]  # the first opens the membrane fully, the second leaves it shut
peft = pytest.importorskip("peft")


def merge(pipe: Any, membrane: Membrane) -> None:
    """Adds a membrane to a pipeline's weights."""
    for name, module in backend_of(pipe).sites.modules.items():
        pair = membrane.factors[file_key(name)]
        product = (pair.up.double().flatten(1) @ pair.down.double().flatten(1)) * pair.scale
        module.weight.data += product.view(module.weight.shape).float()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real LoRA file for the tiny U-Net, strong enough to be seen."""
    pipe = tiny_sd()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in"]
    torch.manual_seed(3)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return folder


def load(pipe: Any, lora: Path) -> None:
    pipe.load_lora_weights(lora, adapter_name="other")


def load_and_scale(pipe: Any, lora: Path) -> None:
    load(pipe, lora)
    pipe.set_adapters(["other"], [0.4])


def load_and_disable(pipe: Any, lora: Path) -> None:
    load(pipe, lora)
    pipe.disable_lora()


def load_and_unload(pipe: Any, lora: Path) -> None:
    load(pipe, lora)
    draw(pipe, "a fox", steps=1)
    pipe.unload_lora_weights()


def load_and_delete(pipe: Any, lora: Path) -> None:
    load(pipe, lora)
    pipe.delete_adapters("other")


def fuse(pipe: Any, lora: Path) -> None:
    load(pipe, lora)
    pipe.fuse_lora(lora_scale=0.7)


def fuse_and_unload(pipe: Any, lora: Path) -> None:
    fuse(pipe, lora)
    pipe.unload_lora_weights()


def fuse_and_unfuse(pipe: Any, lora: Path) -> None:
    fuse(pipe, lora)
    pipe.unfuse_lora()


def processors(pipe: Any, _lora: Path) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


def slicing(pipe: Any, _lora: Path) -> None:
    pipe.enable_attention_slicing(1)


def freeu(pipe: Any, _lora: Path) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def channels_last(pipe: Any, _lora: Path) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def group_offload(pipe: Any, _lora: Path) -> None:
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def accelerate_hooks(pipe: Any, _lora: Path) -> None:
    hooks: Any = pytest.importorskip("accelerate.hooks")
    for module in list(pipe.unet.modules()):
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.ModelHook())
    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())


def model_offload(pipe: Any, _lora: Path) -> None:
    """What `enable_model_cpu_offload` installs on every part, here with the CPU for a device."""
    accelerate: Any = pytest.importorskip("accelerate")
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload_with_hook(part, torch.device("cpu"))


def replaced_scheduler(pipe: Any, _lora: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def heun(pipe: Any, _lora: Path) -> None:
    """Calls the denoiser twice at most timesteps."""
    from diffusers import HeunDiscreteScheduler

    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)


Operation = Callable[[Any, Path], None]
EXACT: list[Operation] = [
    load,
    load_and_scale,
    load_and_disable,
    load_and_unload,
    load_and_delete,
    fuse,
    fuse_and_unload,
    fuse_and_unfuse,
    processors,
    slicing,
    freeu,
    channels_last,
    group_offload,
    accelerate_hooks,
    model_offload,
    replaced_scheduler,
    heun,
]


def images(pipe: Any) -> Tensor:
    return draw(pipe, PROMPTS, guidance_scale=1)


@pytest.mark.parametrize("operation", EXACT)
@pytest.mark.parametrize("first", ["policy", "host"])
def test_a_membrane_acts_as_if_merged_whatever_the_host_did(
    first: str, operation: Operation, lora: Path, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe, base, merged = tiny_sd(), tiny_sd(), tiny_sd()
    membrane = random_membrane(pipe, floor=1.0, size=0.15)
    merge(merged, membrane)
    for twin in (base, merged):
        operation(twin, lora)
    if first == "host":
        operation(pipe, lora)
    applied(pipe, tmp_path, audit_key, membranes=[membrane])
    if first == "policy":
        operation(pipe, lora)
    found, wanted, plain = images(pipe), images(merged), images(base)
    assert torch.equal(found[1], plain[1])
    assert (wanted[0] - plain[0]).abs().max() > 0.01
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-3)
    assert len(records(tmp_path, "gated")) - (operation is load_and_unload and first == "policy") == 2


@pytest.mark.parametrize("operation", EXACT)
@pytest.mark.parametrize("first", ["policy", "host"])
def test_merged_weights_act_as_if_the_host_had_merged_them_and_leave_its_own_alone(
    first: str, operation: Operation, lora: Path, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe, base, merged = tiny_sd(), tiny_sd(), tiny_sd()
    membrane = random_membrane(pipe, floor=1.0, size=0.15)
    merge(merged, membrane)
    for twin in (base, merged):
        operation(twin, lora)
    if first == "host":
        operation(pipe, lora)
    options: dict[str, Any] = {"membranes": [membrane], "extra": FIXED, "composition": "static"}
    if first == "host" and operation in (group_offload, accelerate_hooks):  # a site's weight is where its hook puts it
        with pytest.raises(UnsupportedBackendError, match="a hook that was installed before the policy"):
            applied(pipe, tmp_path, audit_key, **options)
        return
    guard = applied(pipe, tmp_path, audit_key, **options)
    images(pipe)
    if first == "policy":
        operation(pipe, lora)
    found, wanted, plain = images(pipe), images(merged), images(base)
    assert (wanted - plain).abs().amax(dim=(1, 2, 3)).min() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    guard.remove()
    assert torch.equal(images(pipe), plain)


def test_a_saved_pipeline_holds_the_base_model_with_merged_weights_too(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    plain = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with applied(pipe, tmp_path, audit_key, extra=FIXED, composition="static"):
        pipe.unet.save_pretrained(tmp_path / "unet")
    from diffusers import UNet2DConditionModel

    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())


def test_the_lora_of_these_tests_is_seen(lora: Path) -> None:
    pipe = tiny_sd()
    plain = images(pipe)
    load(pipe, lora)
    loaded = images(pipe)
    assert (loaded - plain).abs().amax(dim=(1, 2, 3)).min() > 0.01
    pipe.fuse_lora(lora_scale=0.3)
    assert not torch.allclose(images(pipe), loaded, atol=1e-3)


@pytest.mark.parametrize("first", ["policy", "host"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_stored_in_another_dtype(storage: torch.dtype, first: str, tmp_path: Path, audit_key: HmacKey) -> None:
    """Layerwise casting: a site's weight has the computing dtype only while it runs."""

    def cast(pipe: Any) -> None:
        pipe.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)

    pipe, base = tiny_sd(), tiny_sd()
    cast(base)
    if first == "host":
        cast(pipe)
    applied(pipe, tmp_path, audit_key, membranes=[random_membrane(pipe, floor=1.0)])
    if first == "policy":
        cast(pipe)
    found, plain = images(pipe), images(base)
    assert torch.equal(found[1], plain[1])
    assert (found[0] - plain[0]).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_after_the_policy(dtype: torch.dtype, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base = tiny_sd(), tiny_sd()
    applied(pipe, tmp_path, audit_key, membranes=[random_membrane(pipe, floor=1.0)])
    first = images(pipe)  # fills the caches of stacks
    for each in (pipe, base):
        each.to(dtype)
    found, plain = images(pipe), images(base)
    assert found.dtype == dtype
    assert torch.equal(found[1], plain[1])
    assert (found[0] - plain[0]).abs().max() > 0.05
    assert (found[0].float() - first[0]).norm() < 0.3 * (first[0] - images(tiny_sd())[0]).norm()


def test_reloaded_weights(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, other = tiny_sd(), tiny_sd(seed=1)
    applied(pipe, tmp_path, audit_key)
    pipe.unet.load_state_dict(other.unet.state_dict())
    other = tiny_sd()
    other.unet.load_state_dict(tiny_sd(seed=1).unet.state_dict())
    found, plain = images(pipe), images(other)
    assert torch.equal(found[1], plain[1])
    assert not torch.allclose(found[0], plain[0], atol=0.05)


def test_a_saved_pipeline_holds_the_base_model(tmp_path: Path, audit_key: HmacKey) -> None:
    """The policy is not in the files: what is loaded from them is not guarded, and is the base model."""
    pipe = tiny_sd()
    with applied(pipe, tmp_path, audit_key):
        pipe.unet.save_pretrained(tmp_path / "unet")
    from diffusers import UNet2DConditionModel

    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    plain = pipe.unet.state_dict()
    assert list(loaded.state_dict()) == list(plain)
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("operation", [load_and_unload, load_and_delete, processors, freeu])
def test_what_survived_comes_off(operation: Operation, lora: Path, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base = tiny_sd(), tiny_sd()
    guard = applied(pipe, tmp_path, audit_key)
    for each in (pipe, base):
        operation(each, lora)
    guard.remove()
    assert torch.equal(images(pipe), images(base))
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())


def test_a_lora_that_stays_loaded_does_not_keep_a_policy_from_coming_off(
    lora: Path, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = tiny_sd()
    before = state_of(pipe.unet)
    guard = applied(pipe, tmp_path, audit_key)
    load(pipe, lora)
    guard.remove()
    loaded = images(pipe)
    pipe.unload_lora_weights()
    assert same_state(
        {k: v for k, v in before.items() if "__dict__" not in k},
        {k: v for k, v in state_of(pipe.unet).items() if "__dict__" not in k},
    )
    load(pipe, lora)
    assert torch.equal(images(pipe), loaded)


def deep_copied(pipe: Any) -> Any:
    return copy.deepcopy(pipe)


def with_a_copied_denoiser(pipe: Any) -> Any:
    parts = {name: part for name, part in pipe.components.items() if name != "unet"}
    twin = type(pipe)(**parts, unet=copy.deepcopy(pipe.unet), requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin


@pytest.mark.parametrize("copied", [deep_copied, with_a_copied_denoiser])
def test_deep_copies_are_guarded_until_the_policy_is_removed(
    copied: Callable[[Any], Any], tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = tiny_sd()
    base = images(pipe)
    guard = applied(pipe, tmp_path, audit_key)
    wanted = images(pipe)
    twin = copied(pipe)
    assert torch.equal(images(twin), wanted)
    assert len(records(tmp_path, "gated")) == len(records(tmp_path, "generated")) == 4
    guard.remove()
    assert torch.equal(images(twin), base)
    assert torch.equal(images(pipe), base)
    parts = (twin, twin.vae, twin.text_encoder)
    assert not any({"forward", "decode", "encode_prompt"} & part.__dict__.keys() for part in parts)


def test_a_deep_copy_whose_denoiser_is_replaced_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key)
    twin = copy.deepcopy(pipe)
    twin.unet = tiny_sd().unet
    with pytest.raises(AttestationError, match=r"pipe\.unet was replaced"):
        images(twin)
    images(pipe)


def broadcast(pipe: Any) -> None:
    """Pyramid attention broadcast: most attention layers hand out an earlier step's output."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(-1, 1001),
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)


def reset(pipe: Any) -> None:
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(pipe.unet).reset_stateful_hooks()


def test_a_step_cache_may_skip_what_has_run_with_the_same_prompts(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base, merged = tiny_sd(), tiny_sd(), tiny_sd()
    membrane = random_membrane(pipe, floor=1.0, size=0.15)
    merge(merged, membrane)
    applied(pipe, tmp_path, audit_key, membranes=[membrane])
    exact = images(pipe)
    for each in (pipe, base, merged):
        broadcast(each)
    found, plain, wanted = (draw(each, PROMPTS, guidance_scale=1, steps=5) for each in (pipe, base, merged))
    assert torch.equal(found[1], plain[1])
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-3)
    assert not torch.equal(found, exact)
    with pytest.raises(CoverageError, match="a cache that holds another run"):
        draw(pipe, list(reversed(PROMPTS)), guidance_scale=1)
    reset(pipe)
    assert torch.equal(draw(pipe, PROMPTS, guidance_scale=1, steps=5), found)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["policy", "host"])
def test_compilation(first: str, tmp_path: Path, audit_key: HmacKey) -> None:
    torch._dynamo.reset()
    sibling = tiny_sd()
    sibling.unet.compile(backend="eager")  # the same code was compiled before
    base = images(sibling)
    pipe = tiny_sd()
    if first == "host":
        pipe.unet.compile(backend="eager")
    applied(pipe, tmp_path, audit_key)
    if first == "policy":
        pipe.unet.compile(backend="eager")
    plain = tiny_sd()
    (tmp_path / "plain").mkdir()
    applied(plain, tmp_path / "plain", audit_key)
    for prompts in (["a ghost", "a fox"], ["a fox", "a ghost"], ["a fox", "a fox"], ["a ghost", "a ghost"]):
        found, wanted = (draw(p, prompts, guidance_scale=1) for p in (pipe, plain))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(images(pipe)[1], base[1])
