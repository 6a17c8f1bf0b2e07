"""Pictures of maps: what is drawn is the numbers, on the scales that are stated, and names stay text."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.posterior.covariance import DiagCovariance
from bayescam.posterior.laplace import Laplace
from bayescam.report.cam_coverage import coverage_figure
from bayescam.report.cam_figures import case_figure, draw_case, gallery_figure
from bayescam.report.cam_panels import (
    CasePanels,
    brief_caption,
    caption,
    case_panels,
    cell_panels,
    robust_end,
    shared_limit,
)
from bayescam.report.cam_tiles import TILES, colour_stops, tile_images, value_suppressing
from bayescam.report.gallery import Group

K, D = 3, 5
CLASSES = ("elbow", "hand", "wrist")


def _posterior() -> Laplace:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(K, D + 1, generator=generator, dtype=torch.float64)
    covariance = DiagCovariance(torch.full((K, D + 1), 4.0, dtype=torch.float64), 1.0)
    return Laplace(theta[:, :-1], theta[:, -1], covariance, 1.0, 0.0, 10, 0.0, 0.0)


def _maps() -> torch.Tensor:
    return torch.rand(1, D, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _case(height: int = 60, width: int = 40, **changes) -> CasePanels:
    return replace(_drawn(height, width), **changes)


@cache
def _drawn(height: int, width: int) -> CasePanels:
    image = np.linspace(0, 1, height * width).reshape(height, width)
    return case_panels(
        image,
        CamPosterior(_maps(), _posterior()),
        label=1,
        classes=CLASSES,
        probabilities=[0.1, 0.7, 0.2],
        geometry=Geometry.fit(height, width, 64),
        title="one.png",
    )


def _all_axes(figure: Figure) -> list:
    return list(figure.axes)


def _texts(figure: Figure) -> list:
    found = []
    for artist in figure.findobj():
        if hasattr(artist, "get_parse_math") and artist.get_text():
            found.append(artist)
    return found


def test_the_radiograph_is_shown_as_it_came():
    case = _case()
    figure = draw_case(case)
    shown = _all_axes(figure)[0].images[0]
    np.testing.assert_array_equal(shown.get_array(), case.image)
    assert shown.get_clim() == (0, 1)
    assert shown.origin == "upper"
    assert tuple(shown.get_extent()) == (0, 40, 60, 0)
    figure.canvas.draw()


def test_the_mean_is_on_the_scale_that_was_asked_for():
    case = _case()
    figure = draw_case(case, limit=7.5, spread=3.0)
    mean, sd, above = (axis.images[0] for axis in _all_axes(figure)[1:4])
    assert mean.get_clim() == (-7.5, 7.5)
    assert mean.get_cmap().name == "RdBu_r"
    np.testing.assert_array_equal(mean.get_array(), case.mean)
    assert sd.get_clim() == (0, 3.0)
    assert above.get_clim() == (0, 1)
    np.testing.assert_array_equal(above.get_array(), case.stands_out)
    labels = [axis.get_xlabel() for axis in _all_axes(figure)]
    assert labels.count("logits") == 2
    assert any(label.startswith("P(evidence > the map's mean)\ndashed: 90 %, each") for label in labels)


def test_the_panels_are_the_posterior_in_the_images_own_pixels():
    case = _case()
    assert case.mean.shape == case.sd.shape == case.above.shape == (60, 40)
    assert case.joint.shape == (60, 40)
    assert case.cell_pixels == pytest.approx((60 / 64 * 16, 40 / 43 * 16))
    assert (case.joint <= case.above + 0.05).all()
    assert (case.stands_out_jointly <= case.stands_out + 0.05).all()
    assert case.average == pytest.approx(CamPosterior(_maps(), _posterior()).mean[0, 1].mean().item())
    large = _case(900, 300)
    assert max(large.mean.shape) == 320
    assert max(large.joint.shape) == 64


@pytest.mark.parametrize("shape", [(60, 40), (30, 90), (50, 50)])
def test_any_aspect_draws_without_a_warning(shape):
    draw_case(_case(*shape)).canvas.draw()


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "columns"), [((60, 40), 0), ((30, 90), 0), ((60, 40), 1), ((30, 90), 2)])
def test_no_words_lie_over_others_or_leave_the_picture(shape, columns, monkeypatch):
    """Long names of classes and files; columns 0: one case, else a gallery."""
    case = _case(*shape, classes=tuple(f"class {k} with a name that is long" for k in range(K)), title="a" * 80)
    figure = gallery_figure([case, case], columns=columns) if columns else draw_case(case)
    figure.canvas.draw()
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer)))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn if text.get_visible() and text.get_text()]
    assert len(boxes) > 20
    whole = figure.bbox
    for number, box in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_of_many_classes_the_likeliest_are_shown():
    case = _case(classes=tuple(f"class {k}" for k in range(30)), probabilities=tuple((k + 1) / 465 for k in range(30)))
    axes = _all_axes(draw_case(case))[4]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"class {k}" for k in range(29, 17, -1)]
    assert axes.get_title() == "posterior predictive, 12 likeliest of 30"


def test_a_flat_map_is_flat_with_a_word():
    flat = _case(mean=np.zeros((60, 40)), sd=np.zeros((60, 40)), above=np.zeros((60, 40)), joint=np.zeros((60, 40)))
    figure = draw_case(flat)
    figure.canvas.draw()
    words = [text.get_text() for text in _texts(figure)]
    assert "flat map" in words
    assert "sd is 0" in words
    assert "The map of hand is flat" in caption(flat)
    assert _all_axes(figure)[1].images[0].get_clim() == (-1, 1)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"mean of 'one[.]png' holds NaN"):
        _case(mean=np.full((60, 40), math.nan))


def test_names_are_inert_text():
    hostile = ("$\\frac{1}{0}$", "_{", "a\nb\x1b[31m")
    case = replace(_case(), title="$x^", classes=CLASSES)
    maps = torch.rand(1, D, 2, 2, dtype=torch.float64)
    figure = case_figure(
        np.zeros((8, 8)),
        CamPosterior(maps, _posterior()),
        label=0,
        classes=hostile,
        probabilities=[0.2, 0.3, 0.5],
        title="$\\undefined{",
    )
    figure.canvas.draw()
    draw_case(case).canvas.draw()
    gallery_figure([case], title="$x_").canvas.draw()
    shown = [text.get_text() for text in _texts(figure)]
    assert not any("\n" in text and "a\nb" in text for text in shown)
    assert any("$\\undefined{" in text for text in shown)


def _peaked(**changes) -> CasePanels:
    """A map that is -1 but for +4.25 at the top right, of which nothing relative is known."""
    mean = np.full((30, 30), -1.0)
    mean[2, 25] = 4.25
    known = {"mean": mean, "sd": np.full((30, 30), 0.5), "above": (mean > 0).astype(float), "average": -0.75}
    return _case(**known, joint=None, doubt=None, stands_out=None, stands_out_jointly=None, **changes)


def test_the_caption_says_the_numbers_and_where():
    case = _peaked()
    words = caption(case, level=0.9)
    assert "Predicted hand, 0.70; next wrist, 0.20." in words
    assert "Evidence for hand is largest at the top right of the picture: +4.2 ± 0.5 logits" in words
    assert "from -1.0 to +4.2, the map's mean is -0.8" in words
    assert "Above 0 with probability 90 % or more: < 1 % of the picture." in words
    assert "one is 1/16 of the square" in words
    assert "0 is the mean of all classes; the class's logit is the map's mean, and a bias" in words
    assert "all at once" not in words
    assert "marker" not in words
    assert "marker speaks for hand more than the bones do with probability 0.03" in caption(replace(case, marker=0.031))
    assert "in the centre" in caption(replace(case, mean=np.pad([[1.0]], 4)[:9, :9], sd=np.ones((9, 9))))


def test_captions_say_the_truth_and_no_probability_as_certain():
    case = _peaked(truth=0, probabilities=(0.0004, 0.998, 0.0016), interval=(0.97, 0.9996))
    for words in (caption(case), " ".join(brief_caption(case))):
        assert words.startswith("Truth elbow; predicted hand, > 0.99 [0.97, 1.00]. ")
        assert "next" not in words  # what is below 0.005 is noise
    right = replace(case, truth=1, interval=(0.997, 0.9996))
    assert caption(right).startswith("Truth and prediction hand, > 0.99 [> 0.99, 1.00]. ")


def test_the_brief_caption_leaves_out_what_is_true_of_all():
    assert brief_caption(_peaked(marker=0.031), level=0.9) == [
        "Predicted hand, 0.70; next wrist, 0.20.",
        "Most evidence at the top right, +4.2 ± 0.5 logits; the map's mean is -0.8.",
        "Speaks for the class in < 1 % of the picture.",
        "Marker before bones: 0.03.",
    ]


def test_where_the_whole_picture_speaks_for_the_class_the_captions_say_where_it_stands_out():
    whole = np.ones((4, 4))
    stands_out = np.where(np.arange(16).reshape(4, 4) < 4, 0.95, 0.2)
    case = _peaked(marker=None)
    case = replace(
        case, above=whole, joint=whole, stands_out=stands_out, stands_out_jointly=np.eye(4), mean=whole * 3, doubt=None
    )
    case = replace(case, mean=case.mean + np.arange(16).reshape(4, 4)[::-1])
    assert "Stands out in 25 % of the picture (25 % all at once), speaks for the class in 100 %." in brief_caption(case)
    words = caption(case)
    assert (
        "Above the map's mean with probability 90 % or more: 25 % of the picture, each place by itself, 25 %" in words
    )
    assert "For hand rather than the average class: 100 %." in words


def test_least_sure_is_said_only_where_it_is_uneven():
    even, uneven = np.full((3, 3), 1 / 9), np.full((3, 3), 0.1)
    even[1, 1], uneven[1, 1] = 0.13, 0.2
    assert not any("Least sure" in line for line in brief_caption(_case(doubt=even)))
    assert "unsure" not in caption(_case(doubt=even))
    assert "Least sure in the centre." in brief_caption(_case(doubt=uneven))
    assert "lies most in the centre: 20 % of the variance" in caption(_case(doubt=uneven))


def test_an_image_of_one_grey_is_called_so():
    case = _case(image=np.full((60, 40), 0.3))
    assert "one even grey" in caption(case)
    assert any("one even grey" in line for line in brief_caption(case))
    draw_case(case).canvas.draw()


def test_a_group_of_unsure_cases_that_are_sure_is_called_so():
    def remark(*tops: float, name: str = "most_uncertain") -> str:
        cases = tuple(_case(probabilities=(1 - top, top, 0.0)) for top in tops)
        return Group(name, 1, cases, 0, 1.0, 1.0).remark

    assert remark(0.97, 0.99) == "Even these are sure: none gives its most probable class less than 0.97."
    assert remark(0.6, 0.97, 0.99) == "Most of these are sure: 2 of 3 give their most probable class at least 0.90."
    assert remark(0.6, 0.97) == remark(0.97, name="surest_right") == ""


def test_tiles_have_no_words_and_one_size(monkeypatch):
    written = []
    monkeypatch.setattr(Text, "draw", lambda text, renderer: written.append(text.get_text()))
    tiles = tile_images(_case(classes=("$\\bad{", "a" * 90, "c")), limit=7.0, spread=3.0)
    assert tuple(tiles) == TILES
    assert {tile.shape for tile in tiles.values()} == {(288, 192, 4)}
    assert not any(written)
    flat = _case(mean=np.zeros((60, 40)))
    tile_images(flat, limit=1.0, spread=1.0)
    assert written.count("flat map") == 2


def test_a_tiles_colours_are_those_of_its_scale():
    mean = np.array([[-9.0, 2.0]])
    case = cell_panels(np.zeros((4, 4)), mean, np.ones_like(mean), label=0, classes=CLASSES)
    tile = tile_images(case, limit=4.0, spread=1.0)["evidence"]
    stops = colour_stops("RdBu_r", 5)
    for column, stop in ((0.25, stops[0]), (0.75, stops[3])):  # beyond the end of the scale the end's colour
        pixel = tile[144, round(288 * column), :3]
        assert np.abs(pixel.astype(int) - [int(stop[i : i + 2], 16) for i in (1, 3, 5)]).max() <= 2


def test_a_robust_end_is_round_and_leaves_out_the_few_largest():
    assert robust_end([np.linspace(-18, 18, 100), np.array([500.0])]) == 20
    assert robust_end([np.zeros(3)]) == 1
    assert robust_end([np.array([0.0] * 50 + [0.021])]) == 0.025
    assert robust_end([np.array([-3.0])]) == 3


def test_the_caption_says_what_makes_the_model_unsure():
    attribution = np.zeros((4, 4))
    attribution[0, 3], attribution[2, 0] = 3.0, 1.0
    case = cell_panels(
        np.zeros((20, 20)), np.eye(4), np.eye(4), label=0, classes=CLASSES, attribution=attribution, title="one"
    )
    assert case.doubt.sum() == pytest.approx(1)
    # The cells are quarters and the places thirds of a side: a corner cell lies in one place, others are shared out.
    assert case.doubt[0].tolist() == pytest.approx([0, 0, 0.75])
    assert case.doubt[:, 0].tolist() == pytest.approx([0, 1 / 4 * 2 / 3, 1 / 4 * 1 / 3])
    assert "unsure of elbow lies most at the top right of the picture: 75 % of the variance" in caption(case)
    nothing = cell_panels(
        np.zeros((9, 9)), np.eye(4), np.eye(4), label=0, classes=CLASSES, attribution=np.zeros((4, 4))
    )
    assert "unsure" not in caption(nothing)
    assert _case().doubt.sum() == pytest.approx(1)


def test_cells_are_shown_as_they_are_where_only_their_moments_are_known():
    mean = np.array([[1.0, -1.0], [0.0, 2.0]])
    sd = np.array([[1.0, 1.0], [0.0, 0.5]])
    case = cell_panels(np.zeros((20, 20)), mean, sd, label=0, classes=CLASSES)
    assert case.above == pytest.approx(np.array([[0.8413447, 0.1586553], [0.0, 0.9999683]]))
    assert case.joint is None
    assert not case.interpolated
    assert "interpolated" not in caption(case)
    assert "all at once" not in caption(case)
    jointly = cell_panels(np.zeros((20, 20)), mean, sd, label=0, classes=CLASSES, joint=np.array([[0.1, 0], [0, 0.99]]))
    assert "25 % of the picture, each place by itself, 25 % all at once" in caption(jointly)
    draw_case(jointly).canvas.draw()
    draw_case(case).canvas.draw()


def test_a_gallery_shares_its_scales():
    cases = [_case(), _case(40, 60, mean=np.full((4, 4), 9.0))]
    assert shared_limit(cases) == 9.0
    figure = gallery_figure([*cases, cases[0]], columns=2)
    figure.canvas.draw()
    limits = {
        image.get_clim() for axis in _all_axes(figure) for image in axis.images if image.get_cmap().name == "RdBu_r"
    }
    assert (-9.0, 9.0) in limits
    assert all(clim == (-9.0, 9.0) for clim in limits)
    with pytest.raises(ValueError, match="cases is empty"):
        gallery_figure([])


def test_the_value_suppressing_palette_greys_what_is_unsure():
    mean = np.array([-1.0, -0.4, 0.4, 1.0])
    sure = value_suppressing(mean, np.full(4, 0.99), 1.0)
    unsure = value_suppressing(mean, np.full(4, 0.55), 1.0)
    assert len(np.unique(sure.round(6), axis=0)) == 4
    assert len(np.unique(unsure.round(6), axis=0)) == 1
    assert np.ptp(unsure) < 1e-9
    assert len(np.unique(value_suppressing(mean, np.full(4, 0.8), 1.0).round(6), axis=0)) == 2
    draw_case(_case(), suppress=True).canvas.draw()


def test_coverage_is_drawn_as_a_difference_with_its_error():
    rng = np.random.default_rng(0)
    shares = {"one": {"nuts": rng.uniform(0.4, 0.6, (9, 1)), "laplace_full": rng.uniform(0.1, 0.3, (9, 1))}}
    axes = coverage_figure(shares, [0.5]).axes[0]
    for container, found in zip(axes.containers, shares["one"].values(), strict=True):
        point, _, (bars,) = container
        assert point.get_ydata()[0] == pytest.approx(100 * (found.mean() - 0.5))
        low, high = bars.get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * 196 * found.std(ddof=1) / 3)


def test_wrong_arguments_are_refused_in_words():
    two = CamPosterior(torch.rand(2, D, 2, 2, dtype=torch.float64), _posterior())
    with pytest.raises(ValueError, match="of 2 images"):
        case_figure(np.zeros((8, 8)), two, label=0, classes=CLASSES)
    with pytest.raises(ValueError, match="its geometry"):
        case_figure(np.zeros((8, 8)), two.select([0]), label=0, classes=CLASSES, geometry=Geometry.fit(9, 8, 16))
    with pytest.raises(ValueError, match="label is 3"):
        case_figure(np.zeros((8, 8)), two.select([0]), label=3, classes=CLASSES)
