"""Which weights the page says matter, and what it counts of a run's own files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from bayescam.report.run_files import RunFiles
from bayescam.report.weights import effects, feature_images, told_from_zero, top_features

MEAN = np.array([[3.0, -0.1, 0.5], [-3.0, 0.1, -0.5]])
SD = np.array([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1]])


def _files(cams: xr.Dataset) -> SimpleNamespace:
    features = np.array([[0.0, 0.0, 0.0], [2.0, 4.0, 40.0]])  # sds 1, 2, 20
    return SimpleNamespace(
        speaker="nuts",
        moments=lambda method: (MEAN, SD),
        features=features,
        metrics={"prior_precision": 0.125},
        cams=cams,
    )


def test_weights_told_from_zero_are_counted_and_the_width_is_beside_the_priors():
    told, count, width = told_from_zero(_files(xr.Dataset()))
    assert (told, count) == (4, 6)
    assert width == pytest.approx(1.0 / np.sqrt(0.5 / 0.125))  # of two classes, centred, the prior's variance halves


def test_effects_are_weights_times_the_spread_of_their_features_and_rank_them_once_each():
    files = _files(xr.Dataset())
    mean, sd = effects(files, "nuts")
    np.testing.assert_allclose(mean, MEAN * [1, 2, 20])
    np.testing.assert_allclose(sd, SD * [1, 2, 20])
    chosen = top_features(files)
    assert [feature for _, feature in chosen] == [2, 0, 1]
    assert list(feature_images(files)) == []


def test_what_a_feature_responds_to_is_outlined_in_its_strongest_image():
    response = np.zeros((1, 4, 4))
    response[0, 1, 2] = 1.0
    cams = xr.Dataset(
        {
            "feature_label": (("shown_feature",), [1]),
            "feature_response": (("shown_feature", "row", "col"), response),
            "feature_image": (("shown_feature", "y_pixel", "x_pixel"), np.full((1, 32, 32), 90, dtype=np.uint8)),
        },
        coords={"shown_feature": [7]},
    )
    files = _files(cams)
    assert top_features(files) == [(1, 7)]
    (picture,) = feature_images(files)
    orange = np.argwhere((picture[..., 0] > 200) & (picture[..., 2] < 60)) / len(picture)
    assert orange.min(0) == pytest.approx([0.25, 0.5], abs=0.04)
    assert orange.max(0) == pytest.approx([0.5, 0.75], abs=0.04)


def test_patients_are_counted_by_split_and_images_without_one_apart(tmp_path):
    rows = ["a,p1,train", "b,p1,train", "c,p2,valid", "d,,test", "e,p3,test"]
    (tmp_path / "split.csv").write_text("\n".join(["obs_id,patient,split", *rows]) + "\n", encoding="utf-8")
    files = RunFiles(tmp_path)
    assert files.patients_by_split == {"train": 1, "valid": 1, "test": 1}
    assert files.num_unnamed == 1
