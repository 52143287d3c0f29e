"""The safety landscape: its points, VISAGE, and the file that keeps the points."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.landscape import PLACE, PROMPTS, slow_visage
from support.models import tiny_llama

from star_dss_plugin import ConfigError, DataError
from star_dss_plugin.evaluate.landscape import (
    attack_success,
    grid,
    measure,
    random_lines,
    toward_line,
    visage,
)
from star_dss_plugin.evaluate.landscape_points import PointsFile, assemble_landscape
from star_dss_plugin.evaluate.moved_weights import MovedWeights


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.just(100.0), st.floats(0, 100)), max_size=30))
def test_visage_is_the_mean_distance_to_100(rates):
    found = visage(rates)
    assert found == pytest.approx(slow_visage(rates), rel=1e-12, abs=1e-300)
    assert 0 <= found <= 100
    assert visage([*rates, 100.0]) == found  # a rate of 100 adds nothing


def test_visage_of_known_curves():
    assert visage([100, 0, 0, 0, 100]) == 100
    assert visage([100, 75, 25, 75, 100]) == pytest.approx((25 + 75 + 25) / 3)
    assert visage([100, 100]) == 0
    assert visage([]) == 0
    for wrong in (-0.1, 100.1, float("nan")):
        with pytest.raises(ConfigError, match="0 to 100"):
            visage([wrong])
    assert attack_success([True, False, False, True, True]) == 40


def test_lines_and_grids_have_the_documented_points():
    lines = random_lines()
    assert len(lines) == 3 * 21
    assert len({s.place for s in lines}) == 61  # the model itself is on each line
    alphas = [s.at[0] for s in lines if s.curve == "direction 2"]
    assert alphas == pytest.approx([-0.5 + 0.05 * i for i in range(21)])
    assert alphas[10] == 0
    assert lines[21 + 10].place == ()
    assert lines[20].place == (("random 1", 0.5),)

    toward = toward_line(steps=4, beyond=0.5)
    assert [s.at[0] for s in toward] == [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert [s.place for s in toward_line(steps=1)] == [(), (("toward", 1.0),)]
    plane = grid(steps=20)
    assert len(plane) == 441
    assert {s.place for s in plane if s.at == (0, 0.5)} == {(("random 2", 0.5),)}
    mixed = grid(steps=2, toward=True)
    assert {name for s in mixed for name, _ in s.place} == {"toward", "random 1"}
    assert {s.at[0] for s in mixed} == {0, 0.5, 1}
    for make, message in (
        (lambda: random_lines(steps=3), "even number"),
        (lambda: random_lines(directions=0), "directions is 0"),
        (lambda: random_lines(radius=0), "radius is 0"),
        (lambda: toward_line(steps=0), "steps is 0"),
        (lambda: toward_line(beyond=-1), "beyond is -1"),
        (lambda: grid(steps=3, radius=math.inf), "even number"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_wrong_numbers_of_answers_and_verdicts_are_refused():
    model = tiny_llama()
    for answers, verdicts in ((["a"], [True]), (["a", "b"], [True])):
        with (
            MovedWeights(model) as weights,
            pytest.raises(ConfigError, match=f"got {len(answers)} answers and 1 verdicts"),
        ):
            measure(
                weights,
                model,
                [()],
                PROMPTS,
                lambda m, a=answers: a,
                lambda p, a, v=verdicts: v,
                lambda *_: pytest.fail("kept"),
            )


def test_points_are_put_together_to_a_landscape():
    samples = random_lines(directions=2, steps=2)
    safe = {(): [True, True], (("random 1", -0.5),): [False, False]}
    safe[(("random 1", 0.5),)] = safe[(("random 2", 0.5),)] = [True, False]
    safe[(("random 2", -0.5),)] = [True, True]
    found = assemble_landscape(samples, safe)
    one, two = ([p.attack_success for p in c.points] for c in found.curves)
    assert (one, two) == ([100, 0, 50], [0, 0, 50])
    assert [c.visage for c in found.curves] == [75, pytest.approx(250 / 3)]
    assert found.visage == pytest.approx((100 + 50 + 100 + 100 + 50) / 5)
    assert (found.points, found.points_below, found.prompts, found.centre) == (6, 5, 2, 0)
    toward = assemble_landscape(toward_line(1), {(): [True], (("toward", 1.0),): [False]})
    assert (toward.visage, toward.curves[0].visage, toward.centre) == (None, None, 0)


# The file of points

IDENTITY = {"model": "a" * 64, "seed": 0, "judge": {"guard": ("x", 1)}}


def test_two_processes_that_begin_one_file_of_points_share_it(tmp_path):
    path = tmp_path / "points.jsonl"
    one, two, other = (PointsFile(path, {**IDENTITY, "seed": n}, 2) for n in (0, 0, 1))
    one.add((), [True, False])
    two.add(PLACE, [True, True])
    assert PointsFile(path, {**IDENTITY, "seed": 0}, 2).known == one.known | two.known
    with pytest.raises(ConfigError, match="another landscape"):
        other.add((), [True, True])
    first = path.read_text().splitlines()[0]
    path.write_text(path.read_text() + first + "\n")
    assert len(PointsFile(path, {**IDENTITY, "seed": 0}, 2).known) == 2


def test_points_are_kept_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "new" / "points.jsonl"
    file = PointsFile(path, IDENTITY, 2)
    assert file.known == {}
    file.add((), [True, False])
    file.add(PLACE, [False, False])
    again = PointsFile(path, IDENTITY, 2)
    assert again.known == {(): [True, False], PLACE: [False, False]}
    path.write_bytes(path.read_bytes()[:-7])  # a killed run
    torn = PointsFile(path, IDENTITY, 2)
    assert torn.known == {(): [True, False]}
    torn.add(PLACE, [True, True])
    assert PointsFile(path, IDENTITY, 2).known == {(): [True, False], PLACE: [True, True]}
    path.write_bytes(path.read_bytes()[:9])  # killed while the first line was written
    empty = PointsFile(path, IDENTITY, 2)
    empty.add((), [True, True])
    assert PointsFile(path, IDENTITY, 2).known == {(): [True, True]}


def test_points_of_another_landscape_are_refused(tmp_path):
    path = tmp_path / "points.jsonl"
    PointsFile(path, IDENTITY, 2).add((), [True, False])
    with pytest.raises(ConfigError, match=r"seed was 0 and is now 1.*Name another output folder"):
        PointsFile(path, {**IDENTITY, "seed": 1}, 2)
    with pytest.raises(ConfigError, match=r"model was 'aaa.*… and is now"):
        PointsFile(path, {**IDENTITY, "model": "b" * 64}, 2)
    with pytest.raises(DataError, match="2 verdicts for 3 prompts"):
        PointsFile(path, IDENTITY, 3)
    for text in ("[1]\n", "no json\n", '{"a": 1}\n', path.read_text() + '{"place": 3}\n'):
        path.write_text(text)
        with pytest.raises(DataError, match="not a file of landscape points"):
            PointsFile(path, IDENTITY, 2)
