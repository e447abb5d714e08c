"""What is read off clips, on clips whose place, motion and digit are known."""

from __future__ import annotations

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation import tracking
from diffdistill.evaluation.harness import Evaluation
from diffdistill.evaluation.metrics import check_metrics, measure
from diffdistill.moving_digits import DIRECTIONS, MovingDigits, bounced, prompts
from diffdistill.rng import Rng

DATA = MovingDigits(stride=4)


def clips(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = Rng(seed, 0, "clips", range(num))
    labels = DATA.conditions(rng)["label"]
    return DATA.render(rng, labels, torch.float32), labels


def test_a_clip_is_one_scan_that_moves_as_its_label_says() -> None:
    start, labels = torch.tensor([[0, 33], [48, 12]]), torch.tensor([2, 8 * 7 + 5])  # right; a seven, down and left
    place = DATA.places(start, labels)
    assert place[0, :6].tolist() == [[0, 32], [0, 36], [0, 40], [0, 44], [0, 48], [0, 44]]  # from the nearest place
    assert place[1, :5].tolist() == [[48, 12], [44, 8], [40, 4], [36, 0], [32, 4]]
    x, told = clips(40)
    assert x.shape == (40, *DATA.shape) and float(x.min()) == -1.0 and float(x.max()) == 1.0
    light = (x + 1).flatten(3).sum(3)
    assert torch.allclose(light, light[:, :, :1].expand_as(light), atol=1e-3)  # the same scan in every frame
    assert len(prompts()) == DATA.num_classes + 1 and prompts()[int(told[0])].split()[1] == str(int(told[0]) // 8)


def test_bouncing_folds_a_line_into_the_canvas() -> None:
    assert bounced(torch.tensor([-3, 0, 5, 24, 25, 48, 50]), 24).tolist() == [3, 0, 5, 24, 23, 0, 2]


def test_batches_do_not_depend_on_the_batch_size() -> None:
    whole = DATA.batch(Rng(1, 3, "data", range(8)), 8, frozenset({"x0"}), torch.float32)
    half = DATA.batch(Rng(1, 3, "data", range(4, 8)), 8, frozenset({"x0"}), torch.float32)
    assert whole.x0 is not None and half.x0 is not None
    assert torch.equal(whole.x0[4:], half.x0) and torch.equal(whole.cond["label"][4:], half.cond["label"])
    assert DATA.batch(Rng(1, 3, "data", range(8)), 8, frozenset(), torch.float32).x0 is None


def test_real_clips_are_tracked_and_read() -> None:
    x, labels = clips(200)
    assert tracking.velocity_errors(x, labels, DATA).mean() < 0.01 * DATA.stride
    assert tracking.shown_agreements(x, labels, DATA, DATA.features()).mean() > 0.97


def test_a_wrong_direction_or_a_standing_digit_is_seen() -> None:
    x, labels = clips(100)
    turned = labels // len(DIRECTIONS) * len(DIRECTIONS) + (labels + 4) % len(DIRECTIONS)
    # twice its speed, until one of the two bounces
    assert tracking.velocity_errors(x, turned, DATA).mean() > DATA.stride
    still = x[:, :, :1].expand_as(x)
    speed = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[labels % len(DIRECTIONS)].norm(dim=1).mean()
    assert tracking.velocity_errors(still, labels, DATA).mean() == pytest.approx(DATA.stride * float(speed), rel=0.02)
    assert tracking.shown_agreements(x, (labels + len(DIRECTIONS)) % 80, DATA, DATA.features()).mean() < 0.05


def test_an_empty_clip_has_a_place_too() -> None:
    black = torch.full((2, *DATA.shape), -1.0)
    assert torch.equal(tracking.centres(black), torch.full((2, 16, 2), 31.5))
    assert tracking.windows(black, DATA.side).shape == (32, 1, 8, 8)


def test_figures_of_clips() -> None:
    names = Evaluation(0, 64, 64, None, 0, 64, 10, "none").names(DATA)
    assert set(names) == {"frame_fd", "frame_fd_pixel", "velocity_error", "label_agreement", "latency", "nfe"}
    x, labels = clips(64, seed=1)
    good, protocol = measure(x, labels, DATA.reference(), names, DATA.features(), seed=0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noisy, _ = measure(x + noise, labels, DATA.reference(), names, DATA.features(), seed=0)
    assert protocol.clip == (-1.0, 1.0)
    for name in ("frame_fd", "frame_fd_pixel", "velocity_error"):
        assert 0 <= good[name] < noisy[name]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["fd_pixel", "prdc", "swd"])
def test_figures_of_images_are_refused_on_clips(name: str) -> None:
    with pytest.raises(UserError, match="not for clips"):
        check_metrics([name], DATA.reference(), DATA.features(), 20_000)


def test_a_canvas_off_the_lattice_is_refused() -> None:
    for size in (8, 63):
        with pytest.raises(UserError, match=r"data\.size"):
            MovingDigits(size=size)
