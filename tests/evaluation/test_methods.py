"""Every rival method, on a tiny pipeline: it acts, comes off without a trace, and computes what its paper says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import attributes, draw, embeds, same_state, state_of, tiny_sd
from torch import Tensor

from safegen.backend import backend_of
from safegen.errors import NoMatchingSiteError, TrainingError, UsageError
from safegen.evaluation.methods import METHODS, Method, Target, Task, find
from safegen.evaluation.methods.ablation import ConceptAblation, ablation_loss
from safegen.evaluation.methods.adapters import Adapters
from safegen.evaluation.methods.cost import make
from safegen.evaluation.methods.esd import EsdU, EsdX, esd_target
from safegen.evaluation.methods.host import Supply, denoise, encode, leading
from safegen.evaluation.methods.leco import Leco
from safegen.evaluation.methods.shipped import Safegen
from safegen.evaluation.methods.sld import Sld
from safegen.evaluation.methods.spm import SpmPublished, SpmReleased
from safegen.evaluation.methods.uce import Uce, solve
from safegen.evaluation.methods.weights import Student, Weights

KEEP = ("a fox", "the robot in a photo", "a mouse", "santa")
GHOST = Target("ghost", ("ghost",), (("a {}", "a"), ("photo of the {}", "a photo")), anchor="robot")
MOUSE = Target("mickey", ("mickey mouse", "mickey"), anchor="fox")
TASK = Task((GHOST,), KEEP)
STATES = 32  # width of the tiny pipeline's conditioning


def quick(name: str, iterations: int = 2) -> Method:
    """A method with a few iterations."""
    method: Any = METHODS[name]
    if name == "safegen":
        few = dict(batch=2, anchor_batch=4, trajectory_steps=4, reuse=2)
        return Safegen({**few, "iterations": iterations})
    changes: dict[str, Any] = {
        "iterations": iterations,
        "steps": 4,
        "batch": 2,
        "images": 3,
    }
    return replace(method, **{k: v for k, v in changes.items() if hasattr(method, k)})


def pictures(drawer: Any, prompts: list[str]) -> list[bytes]:
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return [image.tobytes() for image in drawer(prompts, num_inference_steps=3, generator=generators).images]


# All of them


@pytest.mark.parametrize("targets", [(GHOST,), (GHOST, MOUSE)], ids=["one", "two"])
@pytest.mark.parametrize("name", METHODS)
def test_it_acts_on_the_target_and_comes_off_without_a_trace(name: str, targets: tuple[Target, ...]) -> None:
    pipe = tiny_sd()
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    prompts = ["a ghost", "mickey in the photo", "a fox"]
    base = pictures(pipe, prompts)
    before, kept = state_of(*parts), attributes(pipe)
    eraser = quick(name).make(pipe, Task(targets, KEEP))
    assert same_state(before, state_of(*parts)), "making the eraser changed the pipeline"
    with eraser.on(pipe) as drawer:
        erased = pictures(drawer, prompts)
    assert same_state(before, state_of(*parts))
    assert attributes(pipe) == kept
    assert pictures(pipe, prompts) == base
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert all(p.grad is None for p in pipe.unet.parameters())
    acts = [a != b for a, b in zip(base, erased, strict=True)]
    assert acts[: len(targets)] == [name != "base"] * len(targets)
    if name == "block-list":
        assert erased[0] == bytes(len(erased[0]))
        assert not acts[2]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].kind in ("adapter", "weights")])
def test_the_same_seed_gives_the_same_eraser_whatever_the_global_generator(name: str) -> None:
    drawn: list[list[bytes]] = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        pipe = tiny_sd()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        eraser = quick(name).make(pipe, replace(TASK, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        with eraser.on(pipe) as drawer:
            drawn.append(pictures(drawer, ["a ghost"]))
    assert drawn[0] == drawn[1]
    assert (drawn[0] == drawn[2]) == (name == "uce")  # a closed form has nothing random


def test_an_error_while_drawing_takes_the_eraser_off_too() -> None:
    for name in ("uce", "sld", "leco"):
        pipe = tiny_sd()
        before = state_of(pipe.unet)
        eraser = quick(name).make(pipe, TASK)
        with pytest.raises(KeyboardInterrupt), eraser.on(pipe):
            raise KeyboardInterrupt
        assert same_state(before, state_of(pipe.unet))


def test_stored_bytes_are_those_of_factors_and_of_changed_weights() -> None:
    pipe = tiny_sd()
    assert quick("base").make(pipe, TASK).stored == quick("sld").make(pipe, TASK).stored == 0
    sites = backend_of(pipe).sites.modules.values()
    rank_1 = 4 * sum(m.weight[0].numel() + m.weight.shape[0] for m in sites)
    assert quick("spm-as-published").make(pipe, TASK).stored == rank_1
    assert quick("leco").make(pipe, TASK).stored == 4 * rank_1
    cross = [p for name, p in pipe.unet.named_parameters() if "attn2" in name]
    assert quick("esd-x").make(pipe, TASK).stored == 4 * sum(p.numel() for p in cross)
    keys = [p for name, p in pipe.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert quick("uce").make(pipe, TASK).stored == 4 * sum(p.numel() for p in keys)
    assert quick("concept-ablation").make(pipe, TASK).stored == 4 * sum(p.numel() for p in keys)


def test_the_registry_finds_all_some_and_nothing_else() -> None:
    assert {m.name: m for m in find(())} == METHODS
    assert [m.name for m in find(("uce", "base"))] == ["uce", "base"]
    with pytest.raises(UsageError, match="no method 'ucee'. Did you mean 'uce'"):
        find(("ucee",))
    for name, method in METHODS.items():
        assert method.name == name
        assert method.several
        half = method.scaled(0.5)
        assert method.scaled(1) == method
        assert (half == method) == (not hasattr(method, "iterations") and name != "safegen")


def test_targets_without_what_a_method_needs_are_refused() -> None:
    pipe = tiny_sd()
    with pytest.raises(UsageError, match="no name"):
        Target("ghost", ())
    with pytest.raises(UsageError, match="no target"):
        Task((), KEEP)
    with pytest.raises(UsageError, match="no captions to keep"):
        quick("spm-as-published").make(pipe, replace(TASK, keep=()))
    with pytest.raises(UsageError, match="ghost has no anchor concept"):
        quick("concept-ablation").make(pipe, Task((replace(GHOST, anchor=""),), KEEP))
    with pytest.raises(NoMatchingSiteError, match="none of the parameters"):
        Student(backend_of(pipe), [], 1e-3, "esd-x")


@pytest.mark.parametrize("name", ["esd-x", "esd-u", "leco", "spm-as-published", "concept-ablation"])
def test_a_loss_that_is_no_number_stops_and_leaves_the_model_as_it_was(name: str) -> None:
    pipe = tiny_sd()
    before = state_of(pipe.unet)
    with pytest.raises(TrainingError, match="learning_rate"):
        replace(quick(name, 4), learning_rate=1e30).make(pipe, TASK)  # pyright: ignore[reportArgumentType]
    assert same_state(before, state_of(pipe.unet))


def test_a_prompt_that_names_the_target_is_paired_with_what_it_should_mean() -> None:
    assert GHOST.prompts() == (("a ghost", "a"), ("photo of the ghost", "a photo"))
    assert replace(GHOST, surrogate="fox").prompts() == (
        ("a ghost", "a fox"),
        ("photo of the ghost", "photo of the fox"),
    )
    assert MOUSE.prompts() == (("mickey mouse", ""), ("mickey", ""))


def test_cost_counts_time_memory_and_bytes() -> None:
    pipe = tiny_sd()
    eraser, cost = make(Uce(), pipe, TASK)
    assert cost.stored == eraser.stored > 0
    assert cost.seconds > 0
    assert cost.peak_mb >= 0

    class Greedy(Uce):
        def make(self, pipe: Any, task: Task) -> Weights:
            block = np.ones(50_000_000, dtype=np.uint8)
            assert block.sum()
            torch.linalg.qr(torch.eye(400))
            return Weights({})

    assert 45 < make(Greedy(), pipe, TASK)[1].peak_mb < 120


# SPM


def test_spm_as_released_differs_from_as_published_exactly_where_its_docstring_says() -> None:
    written = {name for name, value in vars(SpmReleased).items() if callable(value) and not name.startswith("__")}
    assert written == {"draw_anchors", "predict", "query", "composed"}
    text = SpmReleased.__doc__ or ""
    assert all(f"`{name}`" in text for name in written)
    assert SpmReleased.__dataclass_fields__.keys() == SpmPublished.__dataclass_fields__.keys()


def test_the_released_code_queries_x_t_at_a_time_33_to_42_steps_too_noisy() -> None:
    scheduler = leading(tiny_sd().scheduler)
    late = [int(SpmReleased().query(scheduler, k)) - int(SpmPublished().query(scheduler, k)) for k in range(1, 30)]
    assert min(late) >= 33
    assert max(late) <= 42
    # The published timestep is the level that the latents are at: one more step of the sampler starts there.
    pipe = tiny_sd()
    backend, empty = backend_of(pipe), embeds(pipe, "")
    start = torch.randn(1, *backend.latent_shape)
    noisy = denoise(backend.predict, scheduler, start, embeds(pipe, "a ghost"), empty, steps=30, guidance=3, until=5)
    assert len(noisy.t) == 5
    assert SpmPublished().query(scheduler, 5) == scheduler.timesteps[5] < noisy.t[-1]


def test_the_released_code_predicts_every_other_anchor_and_the_empty_prompt_in_their_place() -> None:
    pipe = tiny_sd()
    backend = backend_of(pipe)
    seen: list[int] = []

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        seen.append(len(x))
        return backend.predict(x, t, states)

    x, t, empty = torch.randn(1, *backend.latent_shape), torch.tensor(500), embeds(pipe, "")
    anchors = encode(backend, KEEP)
    with torch.no_grad():
        each = [backend.predict(x, t[None], states[None]) for states in (*anchors, empty[0])]
    published = SpmPublished().predict(predict, x, t, anchors, empty)
    torch.testing.assert_close(published, torch.cat(each[:4]), atol=1e-5, rtol=1e-4)
    released = SpmReleased().predict(predict, x, t, anchors, empty)
    torch.testing.assert_close(released, torch.cat([each[4], each[2], each[4], each[3]]), atol=1e-5, rtol=1e-4)
    one = SpmReleased().predict(predict, x, t, anchors[:1], empty)
    torch.testing.assert_close(one, each[0], atol=1e-5, rtol=1e-4)
    assert seen == [4, 8, 2]


def test_anchors_are_drawn_by_eq_6_or_are_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([[[1.0, 0.0, 0.0]]])
    pool = torch.tensor([[[1.0, 0.0, 0.0]], [[-1.0, 0.0, 0.0]], [[0.6, 0.8, 0.0]], [[0.0, 0.0, 5.0]]])
    drawn = replace(SpmPublished(), anchors=4000, alpha=2.0).draw_anchors(target, pool, generator)
    shares = [(drawn == row).flatten(1).all(dim=1).float().mean().item() for row in pool]
    # (1 - |cos|)²: 0, 0, 0.16, 1
    assert shares == pytest.approx([0, 0, 0.16 / 1.16, 1 / 1.16], abs=0.02)
    wide = torch.randn(1, 16, 768, generator=generator)
    noise = replace(SpmReleased(), anchors=50).draw_anchors(wide, pool, generator)
    sizes = noise.flatten(1).norm(dim=1) / wide.norm()
    assert 0.8 <= sizes.min() < 0.85 < 1.15 < sizes.max() <= 1.2
    assert torch.cosine_similarity(noise.flatten(1), wide.flatten(1)).abs().max() < 0.05


def test_several_membranes_add_outputs_as_published_and_factors_as_released() -> None:
    pipe = tiny_sd()
    task = Task((GHOST, MOUSE), KEEP)
    published, released = (quick(f"spm-as-{name}").make(pipe, task) for name in ("published", "released"))
    assert isinstance(published, Adapters)
    assert isinstance(released, Adapters)
    assert [m.targets for m in published.membranes] == [("ghost",), ("mickey mouse", "mickey")]
    (merged,) = SpmReleased().composed(published.membranes)
    first, second = published.membranes
    for key, factor in merged.factors.items():
        a, b = first.factors[key], second.factors[key]
        wanted = (a.up + b.up).flatten(1) @ (a.down + b.down).flatten(1)
        torch.testing.assert_close(factor.up.flatten(1) @ factor.down.flatten(1), wanted)
        assert factor.rank == 1
    assert len(released.membranes) == 1
    assert all(torch.equal(SpmReleased().composed([first])[0].factors[k].up, f.up) for k, f in first.factors.items())
    assert published.both
    assert released.both


# The rest


def test_adapters_act_on_the_unconditional_rows_only_where_they_say_so() -> None:
    pipe = tiny_sd()
    adapters = quick("spm-as-published").make(pipe, TASK)
    assert isinstance(adapters, Adapters)
    states = torch.cat([embeds(pipe, ""), embeds(pipe, "a ghost")])
    x = torch.randn(2, 4, 8, 8)
    pipe._guidance_scale = 3.0

    @torch.no_grad()
    def predict() -> Tensor:
        return pipe.unet(x, 500, encoder_hidden_states=states).sample

    base, moved = predict(), []
    for both in (False, True):
        with replace(adapters, both=both).on(pipe):
            moved.append([not torch.equal(a, b) for a, b in zip(base, predict(), strict=True)])
    assert moved == [[False, True], [True, True]]


def test_esd_trains_towards_its_equation() -> None:
    empty, concept = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -1.0])
    assert esd_target(empty, concept, 2.0).tolist() == [1 - 2 * 3, 2 + 2 * 3]
    pipe = tiny_sd()
    backend = backend_of(pipe)
    method = replace(EsdX(), iterations=1, steps=4, batch=3, eta=1.5)
    losses: list[float] = []

    class Recorded(Student):
        def step(self, loss: Tensor) -> None:
            losses.append(loss.item())
            super().step(loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safegen.evaluation.methods.esd.Student", Recorded)
        method.make(pipe, TASK)
    generator = torch.Generator().manual_seed(0)
    states = encode(backend, ["ghost"])
    supply = Supply(backend, pipe.scheduler, states, generator, steps=4, guidance=3.0, reuse=8)
    with torch.no_grad():
        x, t, _ = supply.draw(backend.predict, 3)
        eps_c = backend.predict(x, t, states.expand(3, -1, -1)).double()
        eps_0 = backend.predict(x, t, embeds(pipe, "").expand(3, -1, -1)).double()
    # Before the first step student and teacher are one: ε_c - [ε_∅ - η (ε_c - ε_∅)] = (1 + η)(ε_c - ε_∅).
    assert losses == [pytest.approx(((1 + 1.5) ** 2 * (eps_c - eps_0).square().mean()).item(), rel=1e-4)]


def test_esd_x_and_u_share_the_denoiser_between_them() -> None:
    pipe = tiny_sd()
    names = {name for name, _ in pipe.unet.named_parameters()}
    x, u = (set(method.parameters(pipe.unet)) for method in (EsdX(), EsdU()))
    assert not x & u
    assert x == {name for name in names if "attn2" in name}
    assert {name.split(".")[0] for name in names - x - u} == {"time_embedding", "conv_out"}


@pytest.mark.parametrize("method", [replace(EsdX(), learning_rate=3e-3), replace(Leco(), learning_rate=2e-2)])
def test_trained_rivals_learn_what_they_are_taught(method: EsdX | Leco) -> None:
    pipe = tiny_sd()
    backend = backend_of(pipe)
    x, t = torch.randn(6, *backend.latent_shape), torch.linspace(100, 900, 6).long()
    ghost, empty = (embeds(pipe, text).expand(6, -1, -1) for text in ("ghost", ""))

    @torch.no_grad()
    def distance() -> float:
        return (backend.predict(x, t, ghost) - wanted).square().mean().item()

    with torch.no_grad():
        wanted = esd_target(backend.predict(x, t, empty), backend.predict(x, t, ghost), 1.0)
    before = distance()
    with replace(method, iterations=40, steps=4).make(pipe, TASK).on(pipe):
        pipe._guidance_scale = 0.0
        assert distance() < 0.6 * before


def test_uce_solves_its_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    old, c, meant, kept = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (9, 7), (9, 7), (20, 7))
    )
    s, ridge = 0.3, 0.05
    found = solve(old, c, meant, kept, s, ridge)
    # Directly: rows weighted by their square roots, W holding on to W_old.
    left = torch.cat([c, s**0.5 * kept, ridge**0.5 * torch.eye(7, dtype=torch.float64)])
    right = torch.cat([meant @ old.T, s**0.5 * kept @ old.T, ridge**0.5 * old.T])
    wanted = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(solve(old, c, c, kept, s, ridge), old, atol=1e-10, rtol=1e-10)
    nothing = solve(old.float(), c.float(), meant.float(), kept[:0].float(), s, ridge)
    assert nothing.dtype == torch.float32


def test_uce_maps_the_target_to_what_remains_and_keeps_the_rest() -> None:
    pipe = tiny_sd()
    backend = backend_of(pipe)
    weights = replace(Uce(), preserve=1.0, ridge=1e-4).make(pipe, TASK)
    parameters = dict(pipe.unet.named_parameters())
    ghost, rest, fox = (encode(backend, [text])[0] for text in ("a ghost", "a", "a fox"))
    for name, new in weights.changed.items():
        old = parameters[name].detach()
        # "a ghost" from "ghost" on (place 2) means what "a" means from "a" on (place 1).
        target, wanted = ghost[2:] @ new.T, rest[1:-1] @ old.T
        assert (target - wanted).norm() < 0.7 * (ghost[2:] @ old.T - wanted).norm()
        assert (fox @ new.T - fox @ old.T).norm() < 0.2 * (fox @ old.T).norm()


def test_concept_ablation_pulls_the_target_and_not_the_anchor() -> None:
    anchor, target, noise = (torch.tensor([value], requires_grad=True) for value in (2.0, 5.0, 1.0))
    loss = ablation_loss(anchor, target, noise.detach(), 3.0)
    assert loss.item() == (2 - 5) ** 2 + 3 * (2 - 1) ** 2
    loss.backward()
    assert target.grad is not None
    assert anchor.grad is not None
    assert target.grad.item() == -2 * (2 - 5)
    assert anchor.grad.item() == 3 * 2 * (2 - 1)  # of the regulariser alone
    assert ConceptAblation().several.startswith("joint")


def test_sld_is_its_equations() -> None:
    method = Sld(scale=2.0, threshold=0.5, momentum=0.5, beta=0.7)
    empty, prompt, unsafe, momentum = (
        torch.tensor(v) for v in ([0.0] * 3, [1.0, 0.2, 0.1], [0.1, 0.1, 0.9], [1.0] * 3)
    )
    # ε(c) - ε(c_S) = 0.9, 0.1, -0.8: shut above λ, 2·0.1, and 2·0.8 cut to 1
    wanted = [0.0 * 0.1 + 0.5, 0.2 * 0.1 + 0.5, 1.0 * 0.9 + 0.5]
    assert method.safety(empty, prompt, unsafe, momentum).tolist() == pytest.approx(wanted)


def test_sld_starts_anew_with_every_run_and_waits_for_its_warm_up() -> None:
    pipe = tiny_sd()
    base = draw(pipe, "a ghost", steps=6)
    for warmup, changed in ((0.0, True), (1.0, False)):
        with replace(Sld(), warmup=warmup).make(pipe, TASK).on(pipe):
            first, again = (draw(pipe, "a ghost", steps=6) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(first, base) != changed
    with Sld().make(pipe, TASK).on(pipe), pytest.raises(UsageError, match="guidance_scale > 1"):
        draw(pipe, "a ghost", guidance_scale=1.0)


def test_a_negative_prompt_names_all_targets() -> None:
    pipe = tiny_sd()
    with quick("negative-prompt").make(pipe, Task((GHOST, MOUSE), KEEP)).on(pipe) as drawer:
        drawn = draw(drawer, ["a fox", "a mouse"])
    wanted = draw(pipe, ["a fox", "a mouse"], negative_prompt="ghost, mickey mouse, mickey")
    assert torch.equal(drawn, wanted)


def test_the_block_list_reads_words_and_nothing_else() -> None:
    pipe = tiny_sd()
    prompts = ["A GHOST, please", "g-h-o-s-t", "a ghostly fox", "a spook"]
    with quick("block-list").make(pipe, TASK).on(pipe) as drawer:
        drawn = pictures(drawer, prompts)
    assert [not any(image) for image in drawn] == [True, True, False, False]
    assert drawn[2:] == pictures(pipe, prompts)[2:]
