import pytest
import torch
from hone_core.testing import assert_close
from hone_sparsevar.data import random_labels, render
from hone_sparsevar.grader import Grader, frechet, grade, grader_loss, texture_energy


def test_frechet_distance_of_normals():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    second = first @ torch.diag(torch.tensor([2.0, 3.0], dtype=torch.float64)) + torch.tensor([1.0, 0.0])
    # Means 1 apart, deviations 1 and 2, 1 and 3.
    assert abs(frechet(first, second) - (1 + 1 + 4)) < 0.05
    assert abs(frechet(first, first)) < 1e-9
    with pytest.raises(ValueError, match="two images of each set; got 1 and 3"):
        frechet(first[:1], first[:3])


def test_grades_count_places_and_objects():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            one = torch.nn.functional.one_hot
            return (
                one(torch.tensor([[1, 0, 2, 0]]), 4).float(),
                one(torch.tensor([[3, 0, 5, 0]]), 6).float(),
                one(torch.tensor([[0, 0, 1, 0]]), 4).float(),
            )

    labels = torch.tensor([[[1, 3, 2], [3, 0, 0], [2, 5, 1], [0, 0, 0]]])
    found = grade(Fixed(), torch.zeros(1, 3, 64, 64), labels)
    # Shapes right in places 0, 2, 3; colours of objects 0, 1, 2; textures of 1 and 2; all three of object 2 alone.
    # Where nothing is, what is said of colour and texture does not count.
    assert {name: round(float(v), 4) for name, v in found.items()} == {
        "shape": 0.75,
        "color": 1.0,
        "texture": 0.6667,
        "objects": 0.3333,
    }


def test_the_grader_learns():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    grader = Grader(8)
    optimizer = torch.optim.AdamW(grader.parameters(), 3e-3)
    labels = random_labels(64, generator)
    images = render(labels, generator).images
    losses = []
    for _ in range(25):
        loss = grader_loss(grader, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]


def test_texture_energy_by_hand():
    image = torch.zeros(1, 3, 5, 5)
    image[:, :, 2, 2] = 1.0
    energy = texture_energy(image)[0]
    assert_close(energy[2, 2], torch.tensor(16.0))
    assert_close(energy[1, 2], torch.tensor(1.0))
    assert energy[0, 0] == 0
    ramp = torch.arange(6.0).expand(1, 3, 6, 6)
    assert texture_energy(ramp)[0, :, 1:-1].abs().max() == 0
