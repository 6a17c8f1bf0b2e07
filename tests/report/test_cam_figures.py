"""Pictures of maps: what is drawn is the numbers, on the scales that are stated, and names stay text."""

from __future__ import annotations

import math
from dataclasses import replace

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
from bayescam.report.cam_figures import case_figure, draw_case, gallery_figure, scales_figure, strip_figure
from bayescam.report.cam_panels import CasePanels, brief_caption, caption, case_panels, cell_panels, shared_limit
from bayescam.report.cam_tiles import value_suppressing

K, D = 3, 5
CLASSES = ("elbow", "hand", "wrist")


def _posterior() -> Laplace:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(K, D + 1, generator=generator, dtype=torch.float64)
    covariance = DiagCovariance(torch.full((K, D + 1), 4.0, dtype=torch.float64), 1.0)
    return Laplace(theta[:, :-1], theta[:, -1], covariance, 1.0, 0.0, 10, 0.0, 0.0)


def _case(height: int = 60, width: int = 40, **changes) -> CasePanels:
    maps = torch.rand(1, D, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    image = np.linspace(0, 1, height * width).reshape(height, width)
    case = case_panels(
        image,
        CamPosterior(maps, _posterior()),
        label=1,
        classes=CLASSES,
        probabilities=[0.1, 0.7, 0.2],
        geometry=Geometry.fit(height, width, 64),
        title="one.png",
    )
    return replace(case, **changes)


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
    labels = [axis.get_xlabel() for axis in _all_axes(figure)]
    assert labels.count("logits") == 2


def test_the_panels_are_the_posterior_in_the_images_own_pixels():
    case = _case()
    assert case.mean.shape == case.sd.shape == case.above.shape == (60, 40)
    assert case.joint.shape == (60, 40)
    assert case.cell_pixels == pytest.approx((60 / 64 * 16, 40 / 43 * 16))
    assert (case.joint <= case.above + 0.05).all()
    large = _case(900, 300)
    assert max(large.mean.shape) == 320
    assert max(large.joint.shape) == 64


@pytest.mark.parametrize("shape", [(60, 40), (30, 90), (50, 50)])
def test_any_aspect_draws_without_a_warning(shape):
    draw_case(_case(*shape)).canvas.draw()


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


def test_the_caption_says_the_numbers_and_where():
    mean = np.full((30, 30), -1.0)
    mean[2, 25] = 4.25
    case = _case(mean=mean, sd=np.full((30, 30), 0.5), above=(mean > 0).astype(float), joint=None)
    words = caption(case, level=0.9)
    assert "Predicted: hand 0.700, wrist 0.200." in words
    assert "Evidence for hand is largest at the top right of the picture: +4.25 ± 0.50 logits" in words
    assert "from -1.00 to +4.25" in words
    assert "one cell is 1/16 of the square" in words
    assert "0 is the average class" in words
    assert "jointly" not in words
    assert "marker" not in words
    assert "marker speaks for hand more than the bones do with probability 0.03" in caption(replace(case, marker=0.031))
    assert "in the centre" in caption(replace(case, mean=np.pad([[1.0]], 4)[:9, :9], sd=np.ones((9, 9))))


def test_the_brief_caption_leaves_out_what_is_true_of_all():
    mean = np.full((30, 30), -1.0)
    mean[2, 25] = 4.25
    case = _case(mean=mean, sd=np.full((30, 30), 0.5), above=(mean > 0).astype(float), joint=None, doubt=None)
    assert brief_caption(replace(case, marker=0.031), level=0.9) == (
        "Predicted hand 0.70, wrist 0.20. Most evidence for hand at the top right, +4.2 ± 0.5 logits; with 90 % "
        "probability 0 % of the picture speaks for it. Marker before bones: 0.03."
    )
    whole = _case()
    assert "cell by cell, " in brief_caption(whole)
    assert "Least sure " in brief_caption(whole)
    assert "The map is flat" in brief_caption(replace(case, mean=np.zeros((30, 30))))


def test_a_strip_draws_on_the_scales_it_is_given():
    figure = strip_figure(_case(classes=("$\\bad{", "a" * 90, "c")), limit=7.0, spread=3.0)
    figure.canvas.draw()
    limits = {image.get_cmap().name: image.get_clim() for axis in _all_axes(figure) for image in axis.images}
    assert limits["RdBu_r"] == (-7.0, 7.0)
    assert limits["cividis"] == (0.0, 3.0)
    scales_figure(limit=7.0, spread=3.0).canvas.draw()


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
    assert "jointly" not in caption(case)
    jointly = cell_panels(np.zeros((20, 20)), mean, sd, label=0, classes=CLASSES, joint=np.array([[0.1, 0], [0, 0.99]]))
    assert "25 % of the picture point by point (dashed), 25 % jointly (solid)" in caption(jointly)
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
