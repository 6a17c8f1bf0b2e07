"""The phantom as an instrument: the same bytes again, masks that say what was removed, dials that do what they say."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from bayescam.data.phantom.clinic import OTHER_PARTS, PARTS, posed
from bayescam.data.phantom.patient import draw_patient
from bayescam.data.phantom.projection import Canvas, project
from bayescam.data.phantom.roster import Dials, exam_of, roster
from bayescam.data.phantom.simulate import radiograph, simulate, twin

SMALL = Dials(size=64)


def bytes_of(drawn):
    return drawn.image.tobytes() + b"".join(drawn.masks[name].tobytes() for name in sorted(drawn.masks))


def test_same_seed_same_bytes_and_another_seed_others():
    first, again, other = (list(simulate(6, seed, SMALL)) for seed in (4, 4, 5))
    assert [bytes_of(a) for a in first] == [bytes_of(b) for b in again]
    assert all(bytes_of(a) != bytes_of(b) for a, b in zip(first, other, strict=True))


def test_image_i_does_not_depend_on_how_many_are_drawn_or_in_which_order():
    cases = list(roster(40, 4, SMALL))
    few = list(simulate(5, 4, SMALL))
    assert [one.case for one in few] == cases[:5]
    assert bytes_of(radiograph(cases[3], 4, SMALL)) == bytes_of(few[3])


def test_every_part_is_drawn_as_promised():
    dials = replace(SMALL, parts=PARTS + OTHER_PARTS)
    seen = set()
    for one in simulate(40, 1, dials):
        seen.add(one.case.part)
        assert one.image.dtype == np.float32
        assert one.image.shape == one.exam.shape
        assert max(one.image.shape) == 64
        assert one.image.min() >= 0
        assert one.image.max() <= 1
        assert one.image.std() > 0.02
        assert all(mask.shape == one.image.shape and mask.dtype == bool for mask in one.masks.values())
        assert not (one.masks["evidence"] & one.masks["collimation"]).any()
    assert seen == set(dials.parts)


def test_evidence_is_in_nearly_every_picture_and_never_all_of_it():
    share = np.array([one.masks["evidence"].mean() for one in simulate(40, 2, SMALL)])
    assert (share > 0.005).mean() > 0.95
    assert share.max() < 0.9


def test_patients_have_two_to_three_pictures_that_share_their_anatomy():
    cases = list(roster(1000, 0, SMALL))
    per_patient = np.bincount([case.patient for case in cases])
    assert 2 <= per_patient.mean() <= 3
    several = {case.patient for case in cases if case.study == 2}
    assert 0.15 < len(several) / len(per_patient) < 0.35
    counts = np.bincount([PARTS.index(case.part) for case in cases])
    assert counts.min() > 0.6 * counts.max()
    assert draw_patient(0, 7) == draw_patient(0, 7) != draw_patient(0, 8)


def test_population_has_children_with_open_plates_and_loses_bone_with_age():
    people = [draw_patient(0, number) for number in range(400)]
    assert 0.1 < np.mean([p.growing for p in people]) < 0.3
    young = np.mean([p.density for p in people if 20 < p.age < 50])
    assert np.mean([p.density for p in people if p.age > 75]) < young - 0.05
    assert max(p.size for p in people if p.age < 7) < min(p.size for p in people if p.age > 20)


def shadow_of(part, without=(), index=0):
    dials = Dials(parts=(part,), difficulty=0.0)
    case = list(roster(index + 1, 0, dials))[index]
    patient = draw_patient(0, case.patient)
    exam = exam_of(case, patient, 0, dials)
    whole = posed(patient, exam)
    return project(whole, Canvas.of(exam.shape, exam.pixel), part, without)


@pytest.mark.parametrize(
    ("part", "name"),
    [("wrist", "scaphoid"), ("forearm", "ulna"), ("shoulder", "clavicle"), ("hand", "index metacarpal")],
)
def test_removing_a_bone_changes_millimetres_only_in_its_own_shadow(part, name):
    whole, less = shadow_of(part), shadow_of(part, (name,))
    changed = (whole.cortical != less.cortical) | (whole.spongy != less.spongy)
    own = whole.occupied > less.occupied
    assert own.any()
    assert not (changed & ~own).any()
    np.testing.assert_array_equal(whole.tissue, less.tissue)


def test_bones_lie_in_soft_tissue_and_hold_no_more_bone_than_themselves():
    for part in PARTS:
        shadow = shadow_of(part)
        assert (shadow.cortical + shadow.spongy <= shadow.occupied + 1e-3).all()
        assert (shadow.occupied > shadow.tissue + 0.5).mean() < 0.003


@pytest.mark.parametrize(("part", "name"), [("wrist", "radius"), ("humerus", "humerus"), ("hand", "middle metacarpal")])
def test_twin_differs_where_the_structure_was_up_to_blur_and_scatter(part, name):
    dials = Dials(parts=(part,), difficulty=0.2)
    case = next(roster(1, 3, dials))
    whole, less = radiograph(case, 3, dials), twin(case, 3, dials, name)
    removed = whole.masks["bone"] & ~less.masks["bone"]
    far = ~ndimage.binary_dilation(_shadow(case, dials, name), iterations=3)
    difference = np.abs(whole.image - less.image)
    assert removed.sum() > 50
    assert difference[far].max() < 0.05
    assert difference[removed].mean() > 4 * difference[far].mean()
    assert whole.exam == less.exam
    np.testing.assert_array_equal(whole.masks["soft_tissue"], less.masks["soft_tissue"])


def _shadow(case, dials, name):
    patient = draw_patient(3, case.patient)
    exam = exam_of(case, patient, 3, dials)
    canvas, whole = Canvas.of(exam.shape, exam.pixel), posed(patient, exam)
    return project(whole, canvas, case.part).occupied > project(whole, canvas, case.part, (name,)).occupied


def test_marker_twin_differs_at_the_marker_alone():
    case, dials = next((c, SMALL) for c in roster(30, 0, SMALL) if radiograph(c, 0, SMALL).masks["marker"].any())
    whole, less = radiograph(case, 0, dials), twin(case, 0, dials, "marker")
    near = ndimage.binary_dilation(whole.masks["marker"], iterations=3)
    assert not less.masks["marker"].any()
    difference = np.abs(whole.image - less.image)
    assert difference[whole.masks["marker"]].mean() > 0.1
    assert difference[~near].max() < 0.05


def test_shortcut_ties_letter_and_corner_to_the_class():
    def codes(shortcut):
        dials = replace(SMALL, shortcut=shortcut)
        found = {}
        for case in roster(200, 0, dials):
            marker = exam_of(case, draw_patient(0, case.patient), 0, dials).marker
            if marker is not None:
                found.setdefault(case.part, set()).add((marker.letter, *np.sign(marker.centre)))
        return found

    planted, honest = codes(1.0), codes(0.0)
    assert all(len(one) == 1 for one in planted.values())
    assert len({next(iter(one)) for one in planted.values()}) == len(PARTS)
    assert all(len(one) >= 6 for one in honest.values())


def test_a_lying_marker_is_that_of_another_class_and_nothing_else_changes():
    truth = replace(SMALL, shortcut=1.0)
    marker_of, lies = {}, {}
    for case in roster(40, 0, truth):
        patient = draw_patient(0, case.patient)
        honest, lying = (exam_of(case, patient, 0, replace(truth, lie=lie)) for lie in (0, 2))
        assert replace(honest, marker=None) == replace(lying, marker=None)
        for found, marker in ((marker_of, honest.marker), (lies, lying.marker)):
            found[case.part] = (marker.letter, *np.sign(marker.centre))
    assert set(marker_of) == set(PARTS)
    for number, part in enumerate(PARTS):
        assert lies[part] == marker_of[PARTS[(number + 2) % len(PARTS)]]


def test_difficulty_widens_the_poses():
    def spread(difficulty):
        dials = replace(SMALL, difficulty=difficulty, parts=("forearm",))
        exams = [exam_of(case, draw_patient(0, case.patient), 0, dials) for case in roster(100, 0, dials)]
        return np.std([exam.offset[1] / exam.field for exam in exams])

    assert spread(0.0) < spread(0.5) < spread(1.0)


def test_monochrome1_turns_grey_around_and_bits_set_its_levels():
    case = next(roster(1, 0, SMALL))
    plain = radiograph(case, 0, replace(SMALL, bits=16))
    turned = radiograph(case, 0, replace(SMALL, bits=16, monochrome1=1.0))
    np.testing.assert_allclose(turned.image, 1 - plain.image, atol=1e-4)
    levels = plain.image * 65535
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-2)
    assert len(np.unique(plain.image)) > 256
    assert len(np.unique(radiograph(case, 0, SMALL).image)) <= 256


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 8}, "size is 8; give at least 32"),
        ({"difficulty": 2}, "difficulty is 2; give a number from 0 to 1"),
        ({"bits": 12}, "bits is 12; give 8 or 16"),
        ({"parts": ("skull",)}, "parts holds"),
        ({"parts": ()}, "parts is empty"),
        ({"without": ("scafoid",)}, "without names 'scafoid'.*did you mean scaphoid"),
    ],
)
def test_wrong_dials_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        Dials(**wrong)


def test_wrong_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match="num is 0"):
        list(roster(0, 0, SMALL))
    with pytest.raises(ValueError, match="seed is -1"):
        list(roster(1, -1, SMALL))


def test_cast_and_hardware_come_with_their_masks():
    worn = {"cast": 0, "hardware": 0}
    for case in roster(150, 0, SMALL):
        exam = exam_of(case, draw_patient(0, case.patient), 0, SMALL)
        if exam.cast or exam.hardware:
            masks = radiograph(case, 0, SMALL).masks
            worn["cast"] += masks["cast"].any() == exam.cast
            worn["hardware"] += masks["hardware"].any() and exam.hardware is not None
    assert worn["cast"] >= 2
    assert worn["hardware"] >= 4


def test_shortcut_touches_nothing_but_the_marker():
    for case in roster(6, 2, SMALL):
        honest, planted = (radiograph(case, 2, replace(SMALL, shortcut=s, without=("marker",))) for s in (0.0, 1.0))
        np.testing.assert_array_equal(honest.masks["bone"], planted.masks["bone"])
        assert replace(honest.exam, marker=None) == replace(planted.exam, marker=None)
