"""`apply_policy` on tiny real pipelines: what it changes, what it leaves alone, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    applied,
    draw,
    policy_file,
    random_membrane,
    records,
    rowwise,
    same_state,
    state_of,
    tiny_sd,
)
from torch import Tensor

from safegen import PromptRefused, apply_policy
from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.errors import (
    AuditWriteError,
    BaseModelMismatchError,
    FormatError,
    MembraneNotFoundError,
    UnsupportedBackendError,
)
from safegen.membrane.weights import Factor

pytestmark = pytest.mark.usefixtures("untouched")


def test_removing_undoes_applying(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before, keys, base = state_of(*parts), list(pipe.unet.state_dict()), draw(pipe, "a ghost")
    with applied(pipe, tmp_path, audit_key) as guard:
        assert list(pipe.unet.state_dict()) == keys
        assert repr(pipe.unet) == before["0: repr"]
        assert not same_state(before, state_of(*parts))  # else the comparison would prove nothing
        assert not torch.equal(draw(pipe, "a ghost"), base)
        assert not guard.removed
    assert guard.removed
    assert same_state(before, state_of(*parts))
    assert torch.equal(draw(pipe, "a ghost"), base)
    guard.remove()  # the second time does nothing


def test_it_can_be_applied_again(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    images: list[Tensor] = []
    for _ in range(2):
        with applied(pipe, tmp_path, audit_key):
            images.append(draw(pipe, "a ghost"))
    assert torch.equal(*images)


def test_an_exception_in_the_middle_of_a_run_leaves_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a ghost", "a fox"])

    def fail(_pipe: Any, step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise RuntimeError("stop")
        return {}

    with applied(pipe, tmp_path, audit_key):
        erased = draw(pipe, ["a ghost", "a fox"])
        with pytest.raises(RuntimeError, match="stop"):
            draw(pipe, "a ghost", callback_on_step_end=fail)
        assert rowwise(draw(pipe, ["a ghost", "a fox"]), erased) == [True, True]
    assert torch.equal(draw(pipe, ["a ghost", "a fox"]), base)


def test_a_refusal_leaves_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, "a fox")
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}):
        for _ in range(2):
            with pytest.raises(PromptRefused, match="'robot'.*nothing was drawn") as caught:
                draw(pipe, ["a fox", "a robot"])
            assert (caught.value.decision["rule"], caught.value.decision["concept"]) == ("robot", "robot")
            assert torch.equal(draw(pipe, "a fox"), base)
    assert torch.equal(draw(pipe, "a fox"), base)


def test_rows_that_no_rule_touches_keep_every_bit_in_a_mixed_batch(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    prompts = ["a fox", "a ghost", "the robot", "ghost in a photo"]
    base = draw(pipe, prompts)
    with applied(pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe, prompts), base) == [True, False, True, False]
        assert rowwise(draw(pipe, ["a fox", "the robot"]), draw(pipe, ["a fox", "the robot"])) == [True, True]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_shut_is_the_base_model_bit_for_bit(guidance: float, pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    options: dict[str, Any] = dict(guidance_scale=guidance, num_images_per_prompt=2, seed=5)
    base, ghosts = (draw(pipe, prompts, **options) for prompts in (["a fox", ""], ["a fox", "a ghost"]))
    with applied(pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe, ["a fox", ""], **options), base) == [True] * 4
        assert rowwise(draw(pipe, ["a fox", "a ghost"], **options), ghosts) == [True, True, False, False]
    generated = records(tmp_path, "generated")
    assert [r.output.n for r in generated if r.output] == [2, 2, 2, 2]


def test_a_permeability_between_0_and_1_is_applied_as_it_is(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    """The tiny encoder's cosine with "ghost" is below 1 and above this floor."""
    base = draw(pipe, "a fox", guidance_scale=1)
    membrane = random_membrane(pipe, floor=0.05, size=0.1)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane]) as guard:
        (activation,) = guard.decide(["a fox"])[0].activations
        assert 0 < activation.permeability < 1
        found = draw(pipe, "a fox", guidance_scale=1)
    # The same size by another road: fully open, with factors scaled down.
    scaled = {k: Factor(f.down, f.up, f.alpha * activation.permeability) for k, f in membrane.factors.items()}
    pinned = replace(random_membrane(pipe, "a fox", floor=0.05), concept="ghost", factors=scaled)
    (tmp_path / "again").mkdir()
    with applied(pipe, tmp_path / "again", audit_key, membranes=[pinned]):
        torch.testing.assert_close(found, draw(pipe, "a fox", guidance_scale=1), atol=1e-5, rtol=1e-4)
    assert (found - base).abs().max() > 1e-3


def test_strength_multiplies(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    weak = random_membrane(pipe, floor=1.0, size=0.1)
    double = type(weak)(
        "ghost",
        weak.targets,
        weak.base,
        weak.architecture,
        {k: Factor(f.down, f.up, 2 * f.alpha) for k, f in weak.factors.items()},
        metadata=weak.metadata,
    )
    images: list[Tensor] = []
    for name, rule, membrane in (("a", "erase, strength: 2.0", weak), ("b", "erase", double), ("c", "erase", weak)):
        (tmp_path / name).mkdir()
        with applied(pipe, tmp_path / name, audit_key, {"ghost": rule}, membranes=[membrane]):
            images.append(draw(pipe, "a ghost"))
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(images[0], images[2], atol=1e-4)


def test_two_membranes_open_apart(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    both = [random_membrane(pipe, "ghost", floor=1.0), random_membrane(pipe, "fox", floor=1.0, seed=1, rank=2)]
    prompts = ["a ghost", "a fox", "a ghost in a fox", "a robot"]
    base = draw(pipe, prompts)
    single: dict[str, Tensor] = {}
    for membrane in both:
        (tmp_path / membrane.concept).mkdir()
        rules = {membrane.concept: "erase"}
        with applied(pipe, tmp_path / membrane.concept, audit_key, rules, membranes=[membrane]):
            single[membrane.concept] = draw(pipe, prompts)
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "fox": "erase"}, membranes=both):
        found = draw(pipe, prompts)
    torch.testing.assert_close(found[0], single["ghost"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], single["fox"][1], atol=1e-5, rtol=1e-4)
    for other in (base, single["ghost"], single["fox"]):
        assert not torch.allclose(found[2], other[2], atol=1e-3)
    assert torch.equal(found[3], base[3])


def test_a_membrane_of_another_base_is_refused_without_mutation(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    family = backend_of(pipe).family
    wrong = replace(random_membrane(tiny_sd(blocks=(16, 48))), base=family)
    before = state_of(pipe.unet, pipe.text_encoder, pipe.vae)
    with pytest.raises(BaseModelMismatchError):
        applied(pipe, tmp_path, audit_key, membranes=[wrong])
    assert same_state(before, state_of(pipe.unet, pipe.text_encoder, pipe.vae))
    assert not (tmp_path / "audit").exists()


def test_a_membrane_that_erases_nothing_is_refused(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(FormatError, match="erases nothing"):
        applied(pipe, tmp_path, audit_key, membranes=[random_membrane(pipe, size=0.0)])


def test_an_audit_folder_that_cannot_be_written_leaves_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    (tmp_path / "audit").write_text("a file")
    before = state_of(pipe.unet, pipe.text_encoder, pipe.vae)
    with pytest.raises(AuditWriteError):
        applied(pipe, tmp_path, audit_key)
    assert same_state(before, state_of(pipe.unet, pipe.text_encoder, pipe.vae))


def test_an_absent_folder_of_membranes_is_an_error(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(MembraneNotFoundError, match="no such folder"):
        apply_policy(pipe, policy_file(tmp_path), audit_key=audit_key, membranes=[tmp_path / "none"])


def test_an_unknown_object_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(UnsupportedBackendError, match="object is not a pipeline"):
        apply_policy(object(), policy_file(tmp_path), audit_key=audit_key)
