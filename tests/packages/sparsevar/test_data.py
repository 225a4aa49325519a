import torch
from hone_sparsevar.data import caption, random_labels, render, word_table, words


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_scenes_hold_one_to_three_objects_and_are_in_range():
    labels = random_labels(200, generator())
    count = (labels[..., 0] > 0).sum(1)
    assert (count.min(), count.max()) == (1, 3)
    scenes = render(labels, generator())
    assert 0 <= scenes.images.min() < scenes.images.max() <= 1
    again = render(labels, generator())
    assert torch.equal(scenes.images, again.images)


def test_masks_lie_at_textured_objects_and_edges():
    labels = torch.zeros(3, 4, 3, dtype=torch.int64)
    labels[0, 0] = torch.tensor([1, 0, 0])  # a plain circle, top left
    labels[1, 0] = torch.tensor([1, 0, 2])  # a checkered one
    labels[2, 3] = torch.tensor([2, 1, 1])  # a striped square, bottom right
    masks = render(labels, generator()).textured
    plain, checkered, square = (mask.float() for mask in masks)
    assert plain[32:].sum() == plain[:, 32:].sum() == 0
    assert plain[13:19, 13:19].sum() == 0  # inside, flat
    assert checkered[13:19, 13:19].sum() == 36
    assert square[:32].sum() == 0
    assert 200 < square.sum() < 700
    # Where nothing is masked the image is smooth.
    image = render(labels, generator()).images[0]
    assert image.diff(dim=-1).abs()[:, 32:, 32:].max() < 0.02


def test_a_prompt_decides_all_but_the_size_of_its_objects_and_places_look_apart():
    labels = torch.zeros(1, 4, 3, dtype=torch.int64)
    bare = render(labels, generator()).images
    assert torch.equal(bare, render(labels, generator(1)).images)
    # A token of 4 px looks unlike every other one, in steps too small to be a texture.
    tokens = torch.nn.functional.avg_pool2d(bare, 4).flatten(2)[0].T
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 0.01
    assert max(bare.diff(dim=-1).abs().max(), bare.diff(dim=-2).abs().max()) < 0.02
    labels[0, 0] = torch.tensor([1, 0, 2])
    first, second = render(labels, generator()), render(labels, generator(1))
    differs = (first.images != second.images).any(1)
    assert differs.any()
    assert (differs <= first.textured | second.textured).all()


def test_prompts_by_hand():
    labels = torch.zeros(2, 4, 3, dtype=torch.int64)
    labels[0, 1] = torch.tensor([3, 5, 1])
    labels[1, 0], labels[1, 3] = torch.tensor([1, 0, 0]), torch.tensor([2, 2, 2])
    assert caption(labels[0]) == "striped cyan triangle top right"
    assert caption(labels[1]) == "plain red circle top left, checkered blue square bottom right"
    table = word_table(generator())
    text, lengths = words(labels, table)
    assert lengths == [4, 7]
    assert text.shape == (2, 7, 128)
    assert torch.equal(text[0, 0], table[0])
    # Vocabulary: begin, 4 places, 4 shapes, 6 colours, 3 textures.
    assert torch.equal(text[0, 1], table[5 + 3] * table[2].sign() + table[2])
    assert torch.equal(text[0, 2], table[9 + 5] * table[2].sign() + table[2])
    assert torch.equal(text[0, 3], table[15 + 1] * table[2].sign() + table[2])
    assert torch.equal(text[1, 4], table[5 + 2] * table[4].sign() + table[4])
    assert text[0, 4:].abs().sum() == 0
