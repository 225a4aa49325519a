import pytest
import torch
from hone_core.errors import CheckpointError
from hone_motion_anything.config import UnmaskConfig
from hone_motion_anything.data import fake_batch
from hone_motion_anything.grading import mask_overlap
from hone_motion_anything.grammar import text_ids
from hone_motion_anything.host import Host, load_host

WORDS = text_ids(["a person bows", "someone jumps"])


def test_a_host_comes_back_as_it_was_saved(untrained, small):
    host, again = load_host(path=untrained), load_host(path=untrained)
    assert host.config == small
    assert host.facts.command == "hone-motion-anything train-host"
    first = host.draw(host.condition(WORDS), torch.Generator().manual_seed(0))
    second = again.draw(again.condition(WORDS), torch.Generator().manual_seed(0))
    assert first.shape == (2, 80, 263)
    assert torch.equal(first, second)
    other = host.draw(host.condition(WORDS), torch.Generator().manual_seed(1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("remask", ["confidence", "attention"])
def test_text_music_and_both(untrained, remask):
    host = load_host(path=untrained)
    music = fake_batch(2, dance=True).music
    settings = UnmaskConfig(steps=3, remask=remask)
    for words, heard in ((WORDS, None), (None, music), (WORDS, music)):
        tokens = host.tokens(host.condition(words, heard), torch.Generator().manual_seed(0), settings)
        assert tokens.shape == (2, 20, 6)
        assert tokens.min() >= 0
        assert tokens.max() < 16


def test_an_edit_of_a_part_leaves_the_others_columns_bit_for_bit(untrained):
    from hone_motion_anything.features import part_columns

    host = load_host(path=untrained)
    condition, generator = host.condition(WORDS), torch.Generator().manual_seed(0)
    tokens = host.tokens(condition, generator)
    edit = torch.zeros_like(tokens, dtype=torch.bool)
    edit[..., 4] = True
    new = host.tokens(condition, generator, start=tokens, edit=edit)
    before, after = host.tokenizer.decode(tokens), host.tokenizer.decode(new)
    others = [column for part, own in enumerate(part_columns()) if part != 4 for column in own]
    assert torch.equal(before[..., others], after[..., others])
    assert not torch.equal(before, after)


def test_overlap_of_masks_with_events(untrained, monkeypatch):
    host, clips = load_host(path=untrained), fake_batch(3)
    mask = torch.zeros_like(clips.cells)
    mask[:, :5] = True
    monkeypatch.setattr("hone_motion_anything.grading.attention_mask", lambda *_: mask)
    found = mask_overlap(host, clips)
    for row in range(3):
        cells = {tuple(cell) for cell in clips.cells[row].nonzero().tolist()}
        hit = sum(step < 5 for step, _ in cells)
        assert found.recall[row] == pytest.approx(hit / len(cells))
        assert found.precision[row] == pytest.approx(hit / 30)
        assert found.share[row] == 0.25


def test_missing_and_damaged(untrained, tmp_path):
    with pytest.raises(CheckpointError, match="there is no tiny host at"):
        load_host(path=tmp_path / "host.safetensors")
    for name in ("host.safetensors", "host.json"):
        (tmp_path / name).write_bytes((untrained.parent / name).read_bytes())
    data = bytearray((tmp_path / "host.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "host.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="was replaced or cut short"):
        load_host(path=tmp_path / "host.safetensors")


def test_the_host_that_ships_fits_into_eight_mebibytes():
    host = Host.untrained()
    numbers = sum(v.numel() for module in host.modules.values() for v in module.state_dict().values())
    assert 2 * numbers < 7.9 * 2**20
