import threading

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_pmloss.cache import CachedTeacher
from hone_pmloss.data import training_batch
from hone_pmloss.models import PMLoss
from hone_pmloss.teachers import PointMap, Shots, name_views


class Counting:
    """Gives each view a number that it looks at, and counts how often it is asked."""

    name = "counting"

    def __init__(self):
        self.asked = 0

    def __call__(self, views):
        self.asked += 1
        points = views.image_01.movedim(2, -1) + views.cam_to_world[..., None, None, :3, 3]
        return PointMap(points, views.image_01[:, :, 0], views.cam_to_world[..., :3, 3])


@pytest.fixture(scope="module")
def views():
    scene = training_batch([0, 1], 1, (8, 18), 16)
    return name_views(scene.context, [Shots("a", (1, 9)), Shots("b", (4, 12))])


def test_a_teacher_is_asked_once_per_scene(tmp_path, views):
    teacher = Counting()
    cached = CachedTeacher(teacher, tmp_path)
    want, first, second = Counting()(views), cached(views), cached(views)
    assert teacher.asked == cached.asked == cached.found == 2
    for answer in (first, second):
        assert torch.equal(answer.points, want.points)
        assert torch.equal(answer.confidence, want.confidence)
        assert torch.equal(answer.centres, want.centres)
    one = name_views(views.map(lambda part: part[1:]), views.shots[1:])
    assert torch.equal(CachedTeacher(teacher, tmp_path)(one).points, want.points[1:])
    assert teacher.asked == 2


def test_scene_frames_size_and_teacher_are_told_apart(tmp_path, views):
    cached = CachedTeacher(Counting(), tmp_path)
    paths = {cached.path(Shots("a", (1, 2)), (8, 8))}
    paths |= {cached.path(Shots("b", (1, 2)), (8, 8)), cached.path(Shots("a", (2, 1)), (8, 8))}
    paths |= {cached.path(Shots("a", (1, 2)), (8, 16))}
    other = Counting()
    other.name = "other"
    paths |= {CachedTeacher(other, tmp_path).path(Shots("a", (1, 2)), (8, 8))}
    assert len(paths) == 5


def test_other_pictures_under_the_same_name_are_refused(tmp_path, views):
    cached = CachedTeacher(Counting(), tmp_path)
    cached(views)
    swapped = name_views(views.map(lambda part: part.flip(0)), views.shots)
    with pytest.raises(ValueError, match=r"does not belong to scene 'a', frames \[1, 9\]: its pictures differ"):
        cached(swapped)
    moved = views.cam_to_world.clone()
    moved[:, 0, 0, 3] += 0.1
    other = views.map(lambda part: moved if part is views.cam_to_world else part)
    with pytest.raises(ValueError, match="its pictures differ"):
        cached(name_views(other, views.shots))
    wide = views.map(lambda part: 0.9 * part if part is views.intrinsics_norm else part)
    with pytest.raises(ValueError, match="its pictures differ"):
        cached(name_views(wide, views.shots))
    with pytest.raises(ValueError, match="do not say which pictures they are"):
        cached(views.map(lambda part: part))


def test_an_answer_is_kept_at_the_teachers_own_size(tmp_path, views):
    class Coarse(Counting):
        def __call__(self, views):
            answer = super().__call__(views)
            return PointMap(answer.points[:, :, ::2].half(), answer.confidence[:, :, ::2].half())

    cached = CachedTeacher(Coarse(), tmp_path)
    first, second = cached(views), cached(views)
    want = Counting()(views).points[:, :, ::2].half().float()
    for answer in (first, second):
        assert torch.equal(answer.points, want)
        assert answer.points.dtype == answer.confidence.dtype == torch.float32
    means = want.repeat_interleave(2, 2).flatten(1, 3)
    assert float(PMLoss(cached)(means, views).loss.max()) < 1e-6


def test_an_answer_of_another_number_of_views_is_not_kept(tmp_path, views):
    class One(Counting):
        def __call__(self, views):
            return PointMap(super().__call__(views).points[:, :1])

    with pytest.raises(ValueError, match=r"counting gave points \[1, 16, 16, 3\] for 2 views; expected"):
        CachedTeacher(One(), tmp_path)(views)
    assert list(tmp_path.iterdir()) == []


def test_scenes_of_which_different_things_are_known_are_named(tmp_path, views):
    class Plain(Counting):
        def __call__(self, views):
            return PointMap(super().__call__(views).points)

    CachedTeacher(Plain(), tmp_path)(name_views(views.map(lambda part: part[:1]), views.shots[:1]))
    with pytest.raises(CheckpointError, match="hold different things"):
        CachedTeacher(Counting(), tmp_path)(views)


def test_an_interrupted_write_leaves_nothing_and_a_damaged_file_is_named(tmp_path, views, monkeypatch):
    cached = CachedTeacher(Counting(), tmp_path)

    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        cached(views)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    cached(views)
    path = cached.path(views.shots[0], views.size)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        cached(views)


def test_two_writers_of_one_scene_do_no_harm(tmp_path, views):
    barrier = threading.Barrier(2)

    class Waiting(Counting):
        def __call__(self, views):
            if self.asked == 0:
                barrier.wait(10)  # both are past the look into the folder
            return super().__call__(views)

    answers = []

    def work():
        answers.append(CachedTeacher(Waiting(), tmp_path)(views))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = Counting()(views)
    assert len(answers) == 2
    assert all(torch.equal(answer.points, want.points) for answer in answers)
    assert len(list(tmp_path.iterdir())) == 2
    third = CachedTeacher(Counting(), tmp_path)
    assert torch.equal(third(views).points, want.points)
    assert third.asked == 0
