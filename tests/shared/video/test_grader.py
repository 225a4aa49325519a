import math

import pytest
import torch
from hone_video.clips import fake_batch, load_glyphs, random_labels, render
from hone_video.grader import ClipClassifier, estimate_motion, grade, train_classifier
from hone_video.prompts import DIRECTIONS, ClipConfig


def test_motion_is_read_off_clips():
    batch = fake_batch(seed=4, count=48)
    motion = estimate_motion(batch.clips)
    assert motion.seen.all()
    assert torch.equal(motion.direction, batch.labels[:, 2])
    assert torch.equal(motion.speed, batch.labels[:, 3])
    true = batch.centers[:, 1] - batch.centers[:, 0]
    assert (motion.velocity - true).abs().max() < 0.06
    assert motion.residual.max() < 0.5


def test_motion_of_a_crooked_path_has_a_residual():
    clip = torch.zeros(1, 3, 4, 16, 16)
    for frame, (x, y) in enumerate([(3, 3), (5, 5), (7, 3), (9, 5)]):
        clip[0, :, frame, y - 2 : y + 2, x - 2 : x + 2] = 1.0
    motion = estimate_motion(clip)
    # y = 3 5 3 5 over t = -1.5 -0.5 0.5 1.5: slope 2 / 5, residuals -0.4 1.2 -1.2 0.4
    assert motion.velocity[0].tolist() == pytest.approx([2.0, 0.4], abs=1e-5)
    assert motion.residual[0].item() == pytest.approx(math.sqrt((0.16 + 1.44) / 2), abs=1e-5)
    assert list(DIRECTIONS)[motion.direction[0]] == "right"


def test_an_empty_clip_shows_no_digit():
    motion = estimate_motion(torch.full((2, 3, 4, 16, 16), 0.3))
    assert not motion.seen.any()


def test_classifier_averages_over_frames():
    classifier = ClipClassifier(8).eval()
    clips = fake_batch(seed=0, count=3).clips
    digit, color = classifier.classify(clips)
    assert digit.shape == color.shape == (3,)
    flipped, _ = classifier.classify(clips.flip(2))
    assert torch.equal(digit, flipped)
    with torch.no_grad():
        logits = [classifier(clips[:, :, frame])[0].log_softmax(-1) for frame in range(16)]
    assert torch.equal(digit, torch.stack(logits).mean(0).argmax(-1))


class Reads(torch.nn.Module):
    """A classifier that says what it was told."""

    def __init__(self, digit, color):
        super().__init__()
        self.answer = digit, color

    def classify(self, clips):
        return self.answer


def test_grades():
    batch = fake_batch(seed=2, count=4)
    labels = batch.labels.clone()
    knowing = Reads(labels[:, 0].clone(), labels[:, 1].clone())
    labels[0, 0] = (labels[0, 0] + 1) % 10
    labels[1, 2] = (labels[1, 2] + 1) % 8
    clips = batch.clips.clone()
    clips[2] = 0.1  # nothing is drawn
    grades = grade(knowing, clips, labels)
    assert grades["digit"].tolist() == [0, 1, 1, 1]
    assert grades["color"].tolist() == [1, 1, 1, 1]
    assert grades["direction"].tolist() == [1, 0, 0, 1]
    assert grades["speed"].tolist() == [1, 1, 0, 1]
    assert grades["accuracy"].tolist() == [0, 0, 0, 1]


@pytest.mark.slow
def test_the_grader_learns_handwritten_digits():
    pytest.importorskip("sklearn")
    clip = ClipConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        classifier = ClipClassifier()
    generator = torch.Generator().manual_seed(0)
    train_classifier(classifier, load_glyphs("train"), clip, steps=300, batch=64, generator=generator)
    generator = torch.Generator().manual_seed(1)
    labels = random_labels(64, generator)
    real = grade(classifier, render(load_glyphs("held_out"), labels, clip, generator).clips, labels)
    assert real["digit"].mean() > 0.8
    assert real["direction"].mean() == 1.0
