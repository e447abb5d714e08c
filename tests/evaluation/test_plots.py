"""Pictures show the values they are given."""

import pytest
import torch
from torchvision.io import read_image

from diffdistill import UserError
from diffdistill.data import Mixture2D
from diffdistill.evaluation import plots
from diffdistill.evaluation.plots import sample_grid, scatter


def test_grid_enlarges_each_pixel_to_a_square_in_its_place(tmp_path):
    images = torch.full((5, 1, 8, 8), -1.0)
    images[3, 0, 2, 6] = 1.0  # second row, second column of a grid of two columns
    images[4] = 7.0  # clipped
    sample_grid(images, tmp_path / "grid.png", columns=2, scale=4)
    picture = read_image(str(tmp_path / "grid.png"))[0]
    tile = 8 * 4 + 2
    assert picture.shape == (3 * tile + 2, 2 * tile + 2)
    second = picture[tile + 2 : 2 * tile, tile + 2 : 2 * tile]
    expected = torch.zeros(32, 32)
    expected[8:12, 24:28] = 255
    assert second.float().equal(expected)
    assert picture[2 * tile + 2 : 3 * tile, 2:tile].eq(255).all()


def test_scatter_draws_samples_over_the_reference(tmp_path):
    rng = torch.Generator().manual_seed(0)
    scatter(
        torch.randn(300, 2, generator=rng) + torch.tensor([8.0, -8.0]),
        torch.randn(300, 2, generator=rng),
        tmp_path / "points.png",
    )
    red, green, blue = read_image(str(tmp_path / "points.png"))[:3].float()
    coloured = (blue - red > 60).nonzero().float()
    grey = ((red - 191).abs().lt(8) & (red == green) & (green == blue)).nonzero().float()
    assert len(coloured) > 100
    assert len(grey) > 100
    assert coloured[:, 1].mean() > grey[:, 1].mean()  # further right
    assert coloured[:, 0].median() > grey[:, 0].median()  # and lower down


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_points_of_any_dimension_have_a_picture(tmp_path, dim):
    plots.scatter(torch.randn(20, dim), torch.randn(30, dim), tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 1000


def test_panels_keep_room_for_their_titles(tmp_path):
    points = Mixture2D().reference().data
    plots.panels(dict.fromkeys("HIE", points), points, tmp_path / "panels.png", 8)
    rows = (read_image(str(tmp_path / "panels.png"))[0] < 128).any(1)
    assert not rows[:3].any()  # no letter is cut off at the upper edge
    assert rows[3:30].any()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_panels_count_the_points_outside_their_frame(tmp_path, dim):
    points = torch.randn(50, dim, generator=torch.Generator().manual_seed(0))
    plots.panels({"near": points}, points, tmp_path / "near.png", 8)
    plots.panels({"near": torch.cat([points, points[:1] + 100])}, points, tmp_path / "far.png", 8)
    near, far = (read_image(str(tmp_path / name))[0] < 128 for name in ("near.png", "far.png"))
    assert (far & ~near).sum() > 20  # the words "1 outside"


@pytest.mark.parametrize("name", ["points", "points.nope", ".png"])
def test_a_picture_without_a_format_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match=r"^out must end in one of \.png"):
        plots.scatter(torch.randn(20, 2), torch.randn(30, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())
