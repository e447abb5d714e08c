"""roles: networks of one run in copy and lora mode, what trains, what is shared, what a promotion writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffdistill import UserError
from diffdistill.denoiser import Denoiser
from diffdistill.networks.discriminator import Heads, Scalar
from diffdistill.networks.ema import Constant, Power
from diffdistill.networks.exact import Gaussian
from diffdistill.networks.lora import LoraSpec
from diffdistill.networks.mlp import mlp_from_config
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import EDM

ROLES = {
    "target": Role(trainable=False),
    "student": Role(),
    "fake_score": Role(),
}
PROMOTION = {"target": Role(trainable=False, writable=True), "student": Role()}
MODES = ("copy", "lora")
both_modes = pytest.mark.parametrize("mode", MODES)


def teacher():
    return mlp_from_config(0.5, 0.002, 20.0, 2, 16, 3, 3, seed=0)


def build(roles, mode="copy", **options):
    modes = {name: mode for name, role in roles.items() if role.build == "denoiser"}
    torch.manual_seed(0)
    return Networks(teacher(), roles, (2,), {"label": torch.tensor([0])}, modes=modes, lora=LoraSpec(4), **options)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([0.01, 0.1, 1.0, 10.0])
    x = torch.randn(4, 2, generator=generator) * (0.25 + t[:, None] ** 2).sqrt()
    return x, t, {"label": torch.tensor([0, 1, 2, 3])}


def train(networks, role, steps=3, lr=0.05):
    """A few optimizer steps of one role away from where it is."""
    networks.train_only((role,))
    optimizer = torch.optim.Adam(networks.weights(role), lr)
    for _ in range(steps):
        networks.zero_grad()
        networks[role](*batch()).square().sum().backward()
        optimizer.step()
    networks.zero_grad()
    networks.train_only(())


def pointers(parameters):
    return {parameter.untyped_storage().data_ptr() for parameter in parameters}


# -- start --------------------------------------------------------------------------------------------------------


@both_modes
def test_every_role_starts_as_the_teacher_bit_for_bit(mode):
    networks, x = build(ROLES, mode), batch()
    wanted = Denoiser(teacher())(*x)
    for role in ("teacher", *ROLES):
        assert torch.equal(networks[role](*x), wanted)
        assert networks[role].role == role


def test_copies_share_no_storage_and_frozen_roles_are_the_teacher():
    networks = build(ROLES, "copy")
    assert networks["target"].network is networks.teacher
    storages = [pointers(networks[role].network.parameters()) for role in ("teacher", "student", "fake_score")]
    assert not (storages[0] & storages[1] or storages[0] & storages[2] or storages[1] & storages[2])
    assert networks.trainable == ("student", "fake_score") == networks.owned


def test_lora_roles_and_the_teacher_share_one_backbone_and_differ_by_the_call():
    networks, x = build(ROLES, "lora"), batch()
    assert all(networks[role].network is networks.teacher for role in ROLES)
    before = networks["teacher"](*x)
    for seed, role in enumerate(("student", "fake_score")):
        torch.manual_seed(seed)
        for weight in networks.weights(role):
            nn.init.normal_(weight, std=0.3)
    student, fake_score = networks["student"](*x), networks["fake_score"](*x)
    assert (student - fake_score).abs().max() > 1e-2
    assert (student - before).abs().max() > 1e-2
    assert torch.equal(networks["teacher"](*x), before)
    assert torch.equal(networks["target"](*x), before)
    assert not pointers(networks.weights("student")) & pointers(networks.weights("fake_score"))


def test_in_lora_mode_the_weights_of_a_role_are_its_adapters_alone():
    networks = build(ROLES, "lora")
    linears = sum(isinstance(module, nn.Linear) for module in teacher().modules())
    assert len(networks.weights("student")) == 2 * linears
    assert all(4 in weight.shape for weight in networks.weights("student"))
    frozen = pointers(p for n, p in networks.teacher.named_parameters() if ".down." not in n and ".up." not in n)
    assert not frozen & pointers(networks.weights("student"))


def test_one_role_may_be_a_copy_and_another_an_adapter():
    torch.manual_seed(0)
    networks = Networks(
        teacher(),
        ROLES,
        (2,),
        {"label": torch.tensor([0])},
        modes={"student": "lora", "fake_score": "copy"},
        lora=LoraSpec(4),
    )
    assert networks["student"].network is networks.teacher
    assert not any("down" in name for name, _ in networks["fake_score"].network.named_parameters())
    train(networks, "student")
    assert torch.equal(networks["fake_score"](*batch()), networks["teacher"](*batch()))


def test_the_first_mode_of_a_role_is_its_default():
    roles = {"student": Role(modes=("lora", "copy"))}
    networks = Networks(teacher(), roles, (2,), {"label": torch.tensor([0])}, lora=LoraSpec(4))
    assert networks.modes == {"student": "lora"}
    assert networks["student"].network is networks.teacher


def test_a_role_may_start_from_another_role():
    roles = {"student": Role(), "second": Role(init="student")}
    networks = build(roles)
    assert torch.equal(networks["second"](*batch()), networks["teacher"](*batch()))
    assert not pointers(networks.weights("second")) & pointers(networks.weights("student"))


# -- what trains --------------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("active", ["student", "fake_score"])
def test_gradient_reaches_only_the_trained_roles_even_if_another_role_runs_last(mode, active):
    networks = build(ROLES, mode)
    for role in ("student", "fake_score"):
        train(networks, role, steps=1)
    networks.train_only((active,))
    other = "fake_score" if active == "student" else "student"
    loss = networks[active](*batch()).square().sum() + networks[other](*batch(1)).square().sum()
    networks["target"](*batch(2))
    networks[other](*batch(3))
    loss.backward()
    # the class embedding of an unused label is a row, so every weight of a small network takes part
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in networks.weights(active))
    assert all(weight.grad is None for weight in networks.weights(other))
    assert all(weight.grad is None for name, weight in networks.teacher.named_parameters() if f".{active}." not in name)


@both_modes
def test_gradient_flows_through_a_frozen_role_to_the_trained_one(mode):
    networks = build(ROLES, mode)
    train(networks, "student", steps=1)
    networks.train_only(("student",))
    x, t, cond = batch()
    networks["fake_score"](networks["student"](x, t, cond), t, cond).square().sum().backward()
    assert any(weight.grad.abs().max() > 0 for weight in networks.weights("student"))
    assert all(weight.grad is None for weight in networks.weights("fake_score"))


@both_modes
def test_training_one_role_leaves_the_others_bit_for_bit(mode):
    networks = build(ROLES, mode)
    before = {role: networks[role](*batch()) for role in ("teacher", "target", "fake_score", "student")}
    train(networks, "student")
    for role in ("teacher", "target", "fake_score"):
        assert torch.equal(networks[role](*batch()), before[role])
    assert (networks["student"](*batch()) - before["student"]).abs().max() > 1e-3


def test_dropout_is_on_exactly_in_the_copies_that_train():
    networks = build(ROLES)
    networks.train_only(("student",))
    assert networks["student"].network.training
    assert not networks["fake_score"].network.training
    assert not networks.teacher.training
    networks.train_only(("fake_score",))
    assert not networks["student"].network.training


@both_modes
def test_zero_grad_forgets_every_gradient(mode):
    networks = build(ROLES, mode)
    networks.train_only(("student", "fake_score"))
    (networks["student"](*batch()) + networks["fake_score"](*batch())).sum().backward()
    networks.zero_grad()
    assert all(weight.grad is None for role in networks.trainable for weight in networks.weights(role))


# -- state --------------------------------------------------------------------------------------------------------


@both_modes
def test_the_state_of_a_role_restores_it_in_a_new_run(mode):
    networks = build(ROLES, mode)
    train(networks, "student")
    fresh = build(ROLES, mode)
    fresh.load("student", networks.state("student"))
    assert torch.equal(fresh["student"](*batch()), networks["student"](*batch()))
    assert torch.equal(fresh["fake_score"](*batch()), fresh["teacher"](*batch()))


@both_modes
def test_standalone_is_the_role_as_a_plain_network(mode):
    networks = build(ROLES, mode)
    train(networks, "student")
    train(networks, "fake_score")
    plain = networks.standalone("student")
    assert set(plain.state_dict()) == set(teacher().state_dict())
    torch.testing.assert_close(Denoiser(plain)(*batch()), networks["student"](*batch()), rtol=1e-4, atol=1e-5)
    assert not pointers(plain.parameters()) & pointers(networks["student"].network.parameters())


# -- promotion ----------------------------------------------------------------------------------------------------


@both_modes
def test_a_promoted_student_becomes_the_target_and_the_backbone_stays(mode):
    networks = build(PROMOTION, mode)
    backbone = {
        name: weight.clone()
        for name, weight in networks.teacher.named_parameters()
        if ".down." not in name and ".up." not in name
    }
    train(networks, "student")
    teacher_before = networks["teacher"](*batch())
    assert not torch.allclose(networks["target"](*batch()), networks["student"](*batch()), atol=1e-3)
    networks.copy("student", "target")
    assert torch.equal(networks["target"](*batch()), networks["student"](*batch()))
    assert torch.equal(networks["teacher"](*batch()), teacher_before)
    for name, weight in networks.teacher.named_parameters():
        if name in backbone:
            assert torch.equal(weight, backbone[name])
    train(networks, "student")
    assert not torch.allclose(networks["target"](*batch()), networks["student"](*batch()), atol=1e-3)


@both_modes
def test_a_promoted_student_is_a_target_without_guidance(mode):
    networks = build(PROMOTION, mode, guidance_scale=3.0)
    assert networks["target"].guidance.scale == 3.0
    guided = networks["target"](*batch())
    assert torch.equal(guided, networks["teacher"](*batch()))
    train(networks, "student")
    networks.copy("student", "target")
    assert networks["target"].guidance is None
    assert torch.equal(networks["target"](*batch()), networks["student"](*batch()))
    assert networks["teacher"].guidance.scale == 3.0


@both_modes
def test_a_writable_role_starts_as_the_teacher_and_never_trains(mode):
    networks = build(PROMOTION, mode)
    assert torch.equal(networks["target"](*batch()), networks["teacher"](*batch()))
    assert networks.trainable == ("student",)
    assert not pointers(networks.weights("target")) & pointers(networks.weights("student"))
    networks.train_only(("student",))
    assert not any(weight.requires_grad for weight in networks.weights("target"))


@both_modes
def test_promotion_carries_the_extra_inputs_of_the_student(mode):
    roles = {"target": Role(trainable=False, writable=True, inputs=("w",)), "student": Role(inputs=("w",))}
    networks = build(roles, mode)
    x, t, cond = batch()
    cond = {**cond, "w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    torch.manual_seed(1)
    for name, weight in networks.named_weights("student"):
        if "inputs" in name or "roles" in name:
            nn.init.normal_(weight, std=0.3)
    assert not torch.allclose(networks["student"](x, t, cond), networks["target"](x, t, cond), atol=1e-3)
    networks.copy("student", "target")
    assert torch.equal(networks["student"](x, t, cond), networks["target"](x, t, cond))


def test_promotion_between_modes_is_refused():
    networks = Networks(
        teacher(),
        PROMOTION,
        (2,),
        {"label": torch.tensor([0])},
        modes={"student": "lora", "target": "copy"},
        lora=LoraSpec(4),
    )
    with pytest.raises(UserError, match=r"roles.target must be lora like student.*Set roles.target=lora"):
        networks.copy("student", "target")


# -- guidance -----------------------------------------------------------------------------------------------------


def test_guidance_is_on_teacher_and_target_and_nowhere_else():
    networks = build(ROLES, guidance_scale=3.0, guidance_interval=(0.1, 5.0))
    for role in ("teacher", "target"):
        assert networks[role].guidance.scale == 3.0
        assert networks[role].guidance.interval == (0.1, 5.0)
    assert networks["student"].guidance is None
    assert networks["fake_score"].guidance is None
    assert build(ROLES, guidance_scale=1.0)["teacher"].guidance is None


def test_guidance_without_a_null_condition_is_refused():
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 1, 0, seed=0)
    with pytest.raises(UserError, match=r"guidance.scale needs a network with a null condition, got 3"):
        Networks(network, ROLES, (2,), {}, guidance_scale=3.0)


# -- averages -----------------------------------------------------------------------------------------------------


@both_modes
def test_an_averaged_role_starts_as_its_source_and_follows_its_updates(mode):
    roles = {"student": Role(), "target": Role(trainable=False, ema_of="student", ema=0.5)}
    networks = build(roles, mode)
    for source, average in zip(networks.weights("student"), networks.weights("target"), strict=True):
        assert torch.equal(source, average)
    start = [weight.detach().clone() for weight in networks.weights("student")]
    train(networks, "student")
    networks.update_ema(("fake_score",))
    assert torch.equal(networks["target"](*batch()), networks["teacher"](*batch()))
    networks.update_ema(("student",))
    for before, source, average in zip(start, networks.weights("student"), networks.weights("target"), strict=True):
        torch.testing.assert_close(average, (before + source) / 2)
    assert networks.trainable == ("student",)


def test_an_average_may_have_a_rate_that_depends_on_the_update():
    roles = {"student": Role(), "target": Role(trainable=False, ema_of="student", ema=Power(6.94))}
    networks = build(roles)
    train(networks, "student")
    networks.update_ema(("student",))  # the first update of a power average takes the source itself
    assert torch.equal(networks["target"](*batch()), networks["student"](*batch()))


@both_modes
def test_evaluation_averages_stand_in_for_the_student_within_the_context(mode):
    networks = build(ROLES, mode)
    networks.track("student", Constant(0.0))
    networks.track("fake_score", Constant(0.5))
    start = networks["student"](*batch())
    train(networks, "student")
    trained = networks["student"](*batch())
    with networks.averaged():
        torch.testing.assert_close(networks["student"](*batch()), start)
    assert torch.equal(networks["student"](*batch()), trained)
    networks.update_ema(("student",))
    with networks.averaged():
        torch.testing.assert_close(networks["student"](*batch()), trained)
    assert set(networks.averages()) == {"student", "fake_score"}
    assert networks.averages()["fake_score"].updates == 0


def test_restarting_averages_begins_again_from_the_role_as_it_is():
    roles = {"student": Role(), "target": Role(trainable=False, ema_of="student", ema=0.9)}
    networks = build(roles)
    networks.track("student", Constant(0.9))
    train(networks, "student")
    networks.update_ema(("student",))
    networks.restart_averages("student")
    assert networks.averages()["student"].updates == 0
    assert torch.equal(networks["target"](*batch()), networks["student"](*batch()))
    with networks.averaged():
        assert torch.equal(networks["student"](*batch()), networks["target"](*batch()))


# -- heads and scalars --------------------------------------------------------------------------------------------


@both_modes
def test_heads_are_built_on_the_features_of_the_role_they_read(mode):
    roles = {**ROLES, "discriminator": Role(init=None, build="heads", reads="fake_score", layers=(0, 2))}
    networks = build(roles, mode)
    heads = networks["discriminator"]
    assert isinstance(heads, Heads)
    assert heads.layers == (0, 2)
    x, t, cond = batch()
    networks.train_only(("discriminator",))
    found = networks["fake_score"].features(x, t, cond, heads.layers)
    logits = heads(dict(zip(heads.layers, found, strict=True)))
    assert logits.shape == (4,)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in networks.weights("discriminator"))
    assert all(weight.grad is None for weight in networks.weights("fake_score"))


def test_heads_without_layers_read_the_middle_block():
    roles = {"fake_score": Role(), "discriminator": Role(init=None, build="heads", reads="fake_score")}
    assert build(roles)["discriminator"].layers == (1,)


def test_a_scalar_role_is_zero_at_first_and_trains():
    roles = {"student": Role(), "weight": Role(init=None, build="scalar")}
    networks = build(roles)
    assert isinstance(networks["weight"], Scalar)
    t = torch.tensor([0.1, 1.0])
    assert torch.equal(networks["weight"](t), torch.zeros(2))
    networks.train_only(("weight",))
    networks["weight"](t).sum().backward()
    assert networks["weight"].last.weight.grad.abs().max() > 0
    assert networks.trainable == ("student", "weight")


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_closed_form_network_refuses_roles_with_weights_and_takes_frozen_ones():
    network = Gaussian(EDM(), [[0.0]], [[1.0]])
    for role in (Role(), Role(trainable=False, writable=True)):
        for mode in MODES:
            with pytest.raises(UserError, match="networks must be trainable, role student needs weights"):
                Networks(network, {"student": role}, (1,), {}, modes={"student": mode})
    assert Networks(network, {"target": Role(trainable=False)}, (1,), {})["target"].network is network


def test_a_trainable_gaussian_may_be_copied():
    network = Gaussian(EDM(), [[0.0]], [[1.0]], trainable=True)
    networks = Networks(network, {"student": Role()}, (1,), {})
    networks["student"].network.mean.data += 1
    assert network.mean.item() == 0
    assert networks.dtype == torch.float64


def test_modes_of_unknown_roles_and_unknown_modes_are_refused():
    with pytest.raises(UserError, match=r"roles.critic must be one of \['fake_score', 'student', 'target'\]"):
        Networks(teacher(), ROLES, (2,), {"label": torch.tensor([0])}, modes={"critic": "copy"})
    with pytest.raises(UserError, match=r"roles.student must be one of: copy, lora, got adapter"):
        Networks(teacher(), ROLES, (2,), {"label": torch.tensor([0])}, modes={"student": "adapter"})
    only = {"student": Role(modes=("copy",))}
    with pytest.raises(UserError, match=r"roles.student must be one of: copy, got lora"):
        Networks(teacher(), only, (2,), {"label": torch.tensor([0])}, modes={"student": "lora"})


def test_the_mean_over_one_process_is_the_identity():
    x = torch.randn(3)
    assert build(ROLES).mean(x) is x
