"""TBCM: its states lie on the teacher's route, with the teacher's own velocity; no data, one call per point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimum import gauss_recipe, place

from diffdistill.autodiff import Exact
from diffdistill.distillers.consistency.scm import consistency_tangent
from diffdistill.distillers.consistency.tbcm import TBCM
from diffdistill.errors import UserError
from diffdistill.networks.call import recorded_passes
from diffdistill.process import VELOCITY
from diffdistill.rng import Rng


def states_of(points: int, size: int = 5) -> tuple[TBCM, Any, Any]:
    recipe = gauss_recipe("tbcm", f"distiller.points={points}")
    place(recipe)
    method = recipe.distiller
    assert isinstance(method, TBCM)
    batch = recipe.data.batch(Rng(1, 0, "data", range(size)), size, recipe.needs, torch.float64)
    assert batch.x0 is None
    return method, batch, method.states(batch, Rng(1, 0, "s", range(size)))


def test_velocities_are_the_teachers_at_every_state() -> None:
    method, _, (x, t, velocity, cond) = states_of(5)
    assert x.shape[0] == 5 * 4
    teacher = method.networks["target"].under(method.student.process)
    torch.testing.assert_close(velocity, teacher.predict(x, t, cond, VELOCITY))


def test_states_follow_one_another_by_rotation() -> None:
    _, _, (x, t, velocity, _) = states_of(5)
    for index in range(3):
        here, there = (slice(5 * k, 5 * k + 5) for k in (index, index + 1))
        turn = (t[here] - t[there])[:, None]
        assert (turn > 0).all()
        torch.testing.assert_close(x[there], torch.cos(turn) * x[here] - torch.sin(turn) * velocity[here])


def test_every_time_lies_in_its_interval_and_the_first_point_is_left_out() -> None:
    method, _, (_, t, _, _) = states_of(6, 200)
    grid = torch.tensor(method.grid(method.student.process, 6))
    for index in range(5):
        times = t[200 * index : 200 * (index + 1)]
        assert (times <= grid[index] + 1e-9).all() and (times >= grid[index + 1] - 1e-9).all()
        assert times.std() > 0


def test_the_route_ends_where_the_flow_map_ends_as_points_grow() -> None:
    """The last state is carried on by the exact map: what is left is the route's own error, of first order."""
    gaps = []
    for points in (40, 80):
        method, batch, (x, t, _, _) = states_of(points, 64)
        law = method.networks.teacher
        noise = Rng(1, 0, "s", range(64)).normal(batch.shape, torch.float64)
        x, t = x[-64:], t[-64:]
        sigma = method.sigma_data * torch.tan(t)
        spread = torch.hypot(law.std[0], sigma[:, None])
        z = (x / torch.cos(t)[:, None] - law.mean[0]) / spread
        start = (20.0 * noise - law.mean[0]) / torch.hypot(law.std[0], torch.tensor(20.0))
        gaps.append(float((z - start).abs().mean()))
    assert gaps[0] / gaps[1] > 1.7


def test_the_true_map_has_no_tangent_at_any_state() -> None:
    method, _, (x, t, velocity, cond) = states_of(5)
    g, _ = consistency_tangent(method.student, x, t, velocity, cond, 1.0, Exact())
    assert g.abs().max() < 1e-8


def test_the_teacher_is_called_once_per_point() -> None:
    method, batch, _ = states_of(5)
    with recorded_passes() as passes:
        method.states(batch, Rng(1, 0, "s", range(5)))
    assert [done.role for done in passes] == ["target"] * 5


def test_a_route_of_one_point_is_refused() -> None:
    with pytest.raises(UserError, match=r"distiller.points must be >= 2"):
        gauss_recipe("tbcm", "distiller.points=1")
