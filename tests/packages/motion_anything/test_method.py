import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.config import MotionAnythingConfig, TransformerConfig, UnmaskConfig
from hone_motion_anything.decoding import draw_motion, edited, guided, passes, unmask
from hone_motion_anything.masking import choose_masks, cosine_mask, masked_loss
from hone_motion_anything.method import Attention, Condition, MotionTransformer, attention_mask, random_mask, select

SIZES = {"width": 16, "heads": 2, "hidden": 16, "layers": 2, "dropout": 0.0, "parts": 3, "codes": 7, "max_tokens": 12}
SIZES |= {"text_width": 5, "music_width": 4}


def model(**options):
    torch.manual_seed(0)
    return MotionTransformer(TransformerConfig(**SIZES | options)).double().eval()


def inputs(batch=2, time=6, music=True, text=True):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(7, (batch, time, 3), generator=g)
    condition = Condition(
        text=torch.randn(batch, 5, generator=g).double() if text else None,
        music=torch.randn(batch, time, 4, generator=g).double() if music else None,
    )
    return ids, condition, torch.ones(batch, time, dtype=torch.bool)


def test_select_takes_the_largest_of_what_is_there_rounded_up():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7, 5.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    valid = torch.tensor([[True, True, True, True, False], [True] * 5])
    # 30 % of 4 is 1.2, of 5 it is 1.5: two each, the first two of equal ones.
    assert select(scores, valid, 0.3).tolist() == [[False, True, False, True, False], [True, True, False, False, False]]
    assert select(scores, valid, 0.25)[0].tolist() == [False, True, False, False, False]
    assert select(scores, valid, 0.25, lowest=True)[0].tolist() == [True, False, False, False, False]
    assert not select(scores, valid, 0.0).any()
    assert torch.equal(select(scores, valid, 1.0), valid)


def test_counts_are_exact_where_the_share_is():
    for share in (0.1, 0.2, 0.3, 0.6, 0.7, 1.0):
        for many in range(10, 210, 10):  # the share of these is a whole number
            valid = torch.arange(200) < many
            assert int(select(torch.rand(200), valid, share).sum()) == round(share * many), (share, many)


def test_mask_is_the_union_of_frames_and_parts():
    temporal = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    spatial = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [9.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    valid = torch.tensor([[True, True, True, False]])
    found = attention_mask(temporal, spatial, valid, 0.3, 0.3)
    assert found[0].tolist() == [[False, False, True], [True] * 3, [True, False, False], [False] * 3]


def test_random_masks_hide_as_many_tokens_as_attention_does():
    g = torch.Generator().manual_seed(0)
    valid = torch.ones(8, 20, dtype=torch.bool)
    attention = attention_mask(torch.rand(8, 20), torch.rand(8, 20, 6), valid, 0.3, 0.3)
    chance = random_mask(valid, 6, 0.3, 0.3, g)
    # 6 of 20 frames whole, 2 of 6 parts in the 14 others.
    assert attention.flatten(1).sum(1).tolist() == [6 * 6 + 14 * 2] * 8
    assert chance.flatten(1).sum(1).tolist() == [64] * 8


def test_cosine_masks_hide_between_one_and_all():
    g = torch.Generator().manual_seed(0)
    valid = torch.ones(4000, 5, dtype=torch.bool)
    valid[:, 4] = False
    counts = cosine_mask(valid, 3, g).flatten(1).sum(1).float()
    assert counts.min() == 1
    assert counts.max() == 12
    # The mean of cos(pi u / 2) is 2 / pi.
    assert abs(float(counts.mean()) / 12 - 2 / math.pi) < 0.02


def test_attention_is_softmax_over_the_keys_that_are_there():
    torch.manual_seed(0)
    layer = Attention(8, 2, 8, 0.0).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    query, key = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    valid = torch.tensor([[True] * 5, [True, True, False, False, True]])
    weights = layer.weights(query, key, valid)
    assert_close(weights.sum(-1), torch.ones(2, 3).double())
    assert not weights[1, :, 2:4].any()
    found = layer(query, key, valid)
    for row in range(2):
        q, k, v = layer.norm_q(query[row]), layer.norm_k(key[row]), layer.norm_k(key[row])
        q, k, v = layer.q(q), layer.k(k)[valid[row]], layer.v(v)[valid[row]]
        heads = [(q[:, s] @ k[:, s].T / 2).softmax(-1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
        mixed = query[row] + layer.out(torch.cat(heads, -1))
        assert_close(found[row], mixed + layer.feed(layer.norm(mixed)))
        shares = [(q[:, s] @ k[:, s].T / 2).softmax(-1) for s in (slice(0, 4), slice(4, 8))]
        assert_close(weights[row][:, valid[row]], (shares[0] + shares[1]) / 2)


def test_dropout_is_of_training_and_of_the_weights_too():
    layer = Attention(8, 2, 8, 0.5).double()
    torch.nn.init.zeros_(layer.feed[3].weight)  # what is left is the attention's
    query, key = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    layer.train()
    layer.feed[4].p = layer.feed[2].p = 0.0
    assert not torch.equal(layer(query, key), layer(query, key))
    layer.eval()
    assert torch.equal(layer(query, key), layer(query, key))


@pytest.mark.parametrize("music_keys", ["condition", "condition_and_motion"])
def test_with_music_alone_time_steps_see_each_other_only_where_asked(music_keys):
    net = model(music_keys=music_keys)
    ids, condition, valid = inputs()
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 7
    change = (net(ids, condition, valid) - net(other, condition, valid)).abs().amax((0, 2, 3))
    assert (change[:5] > 1e-9).all() == (music_keys == "condition_and_motion")
    assert (change[:5] == 0).all() == (music_keys == "condition")
    assert change[5] > 1e-9


def test_text_alone_is_self_attention_over_text_and_motion():
    net = model()
    ids, condition, valid = inputs(music=False)
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 7
    assert ((net(ids, condition, valid) - net(other, condition, valid)).abs().amax((0, 2, 3)) > 1e-9).all()


@pytest.mark.parametrize("kind", ["projected", "self_plus_condition"])
def test_parts_mix_only_with_themselves_among_the_keys(kind):
    net = model(sat_condition=kind)
    ids, condition, valid = inputs(music=False)
    other = ids.clone()
    other[:, :, 2] = (other[:, :, 2] + 1) % 7
    change = (net(ids, condition, valid) - net(other, condition, valid)).abs().amax((0, 1, 3))
    assert (change[:2] > 1e-9).all() == (kind == "self_plus_condition")
    assert change[2] > 1e-9


@pytest.mark.parametrize("kind", ["projected", "split_channels", "self_plus_condition"])
def test_one_text_vector_gives_different_answers_to_different_parts(kind):
    net = model(sat_condition=kind, width=12)
    sat = net.blocks[0].spatial
    query = torch.randn(1, 1, 3, 12).double()
    layer = sat.attention
    keys = sat.condition_keys(torch.randn(1, 1, 12).double())
    assert keys.shape == (1, 3, 12)
    weights = layer.weights(query[0], keys)
    assert (weights[0, 0] - weights[0, 1]).abs().max() > 1e-6


@pytest.mark.parametrize("music", [True, False])
def test_padding_changes_nothing(music):
    net = model(music_keys="condition_and_motion", sat_condition="self_plus_condition")
    ids, condition, valid = inputs(music=music)
    valid[:, 4:] = False
    other = torch.where(valid[..., None], ids, net.pad_id)
    assert_close(net(ids, condition, valid)[:, :4], net(other, condition, valid)[:, :4])
    first, second = net.scores(ids, condition, valid), net.scores(other, condition, valid)
    assert_close(first[0][:, :4], second[0][:, :4])
    assert not first[0][:, 4:].any()


def test_padding_asks_nothing_where_all_rows_score():
    net = model()
    ids, condition, valid = inputs(music=False)
    valid[:, 4:] = False
    found = net.scores(ids, condition, valid, "all")[0]
    alone = net.scores(ids[:, :4], condition, valid[:, :4], "all")[0]
    # The mean is over as many rows as there are, of which some ask nothing.
    assert_close(found[:, :4] * 7, alone * 5)


@pytest.mark.parametrize("music_keys", ["condition", "condition_and_motion"])
@pytest.mark.parametrize("text", [True, False])
def test_a_short_motion_in_a_batch_is_as_it_is_alone(music_keys, text):
    # Music goes on for the longer one, and a short motion does not hear it.
    net = model(music_keys=music_keys)
    ids, condition, valid = inputs(text=text)
    valid[1, 4:] = False
    alone = Condition(text=condition.text[1:] if text else None, music=condition.music[1:, :4])
    assert_close(net(ids, condition, valid)[1:, :4], net(ids[1:, :4], alone, valid[1:, :4]))
    both, one = net.scores(ids, condition, valid), net.scores(ids[1:, :4], alone, valid[1:, :4])
    for found, want in zip(both, one, strict=True):
        assert_close(found[1:, :4], want)


def test_scores_of_a_text_are_its_row_of_attention_or_the_mean_of_all():
    net = model()
    ids, condition, valid = inputs(music=False)
    x = net.embed(ids)
    given, _, _ = net.given(condition, 6)
    layer = net.blocks[0].temporal.attention
    rows, mean = torch.zeros(2, 6).double(), torch.zeros(2, 6).double()
    for part in range(3):
        both = torch.cat([given, x[:, :, part]], 1)
        weights = layer.weights(both, both)
        rows += weights[:, 0, 1:] / 3
        mean += weights[:, :, 1:].mean(1) / 3
    assert_close(net.scores(ids, condition, valid, "condition")[0], rows)
    assert_close(net.scores(ids, condition, valid, "all")[0], mean)


def test_scores_of_parts_are_the_conditions_attention_to_them():
    net = model()
    ids, condition, valid = inputs()
    x = net.embed(ids)
    _, by_frame, _ = net.given(condition, 6)
    layer = net.blocks[0].spatial
    wanted = torch.zeros(2, 6, 3).double()
    for row in range(2):
        for step in range(6):
            keys = layer.condition_keys(by_frame[row, step][None])[0]
            asked = layer.attention.q(layer.attention.norm_q(keys)).view(-1, 2, 8)
            parts = layer.attention.k(layer.attention.norm_k(x[row, step])).view(3, 2, 8)
            weights = [(asked[:, head] @ parts[:, head].T / math.sqrt(8)).softmax(-1) for head in range(2)]
            wanted[row, step] = torch.stack(weights).mean((0, 1))
    assert_close(net.scores(ids, condition, valid)[1], wanted)


def test_gates():
    ids, condition, valid = inputs()
    none, product, residual = (model(gate=gate) for gate in ("none", "product", "residual"))
    product.load_state_dict(none.state_dict(), strict=False)
    residual.load_state_dict(none.state_dict())
    # A gate that begins at one changes nothing.
    plain = none(ids, condition, valid)
    assert_close(product(ids, condition, valid), plain)
    assert (residual(ids, condition, valid) - plain).abs().max() > 1e-6
    product.blocks[0].gate.bias.data.fill_(2.0)
    x, rows, by_frame = product.embed(ids), *product.given(condition, 6)[:2]
    first = product.blocks[0](x, rows, by_frame, valid, True)
    assert_close(first, 2 * none.blocks[0](x, rows, by_frame, valid, True))


def test_the_gate_is_of_the_blocks_input():
    net = model(gate="product")
    ids, condition, valid = inputs()
    block = net.blocks[0]
    torch.nn.init.normal_(block.gate.weight)
    x, (rows, by_frame, music) = net.embed(ids), net.given(condition, 6)
    joined = block.spatial(block.temporal(x, rows, valid, music), by_frame)
    assert_close(block(x, rows, by_frame, valid, music), joined * block.gate(x))


def test_a_token_is_its_parts_own_and_knows_time_and_part():
    net = model()
    ids, _, _ = inputs()
    found = net.embed(ids)
    for time, part in ((0, 0), (3, 1), (5, 2)):
        row = net.token_emb.weight[part * 9 + ids[1, time, part]]
        assert_close(found[1, time, part], row + net.time_emb[time, 0] + net.part_emb[part])


def test_music_knows_its_time():
    net = model()
    _, condition, _ = inputs(text=False)
    rows, by_frame, music = net.given(condition, 6)
    assert music
    assert_close(rows, net.music_in(condition.music) + net.time_emb[:6, 0])
    assert torch.equal(by_frame[:, :, 0], rows)


def test_dropped_rows_do_not_depend_on_their_condition():
    net = model()
    ids, condition, valid = inputs()
    gone = torch.tensor([True, False])
    other = Condition(text=condition.text + 1, music=condition.music - 1)
    first = net(ids, condition.dropped(gone, gone), valid)
    second = net(ids, other.dropped(gone, gone), valid)
    assert_close(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-6


def test_short_music_and_no_condition_are_refused():
    ids, condition, valid = inputs()
    short = Condition(text=condition.text, music=condition.music[:, :4])
    with pytest.raises(ValueError, match="shorter than the motion: 4 of 6"):
        model()(ids, short, valid)
    with pytest.raises(ValueError, match="needs a text, music, or both"):
        Condition()


def test_loss_is_over_hidden_tokens_and_has_the_right_gradient():
    net = model()
    ids, condition, valid = inputs()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2] = True
    found = masked_loss(net, ids, condition, valid, mask, torch.Generator().manual_seed(0), corrupt=0.0)
    logits = net(torch.where(mask, net.mask_id, ids), condition, valid)
    wanted = -logits[mask].log_softmax(-1).gather(-1, ids[mask][:, None]).mean()
    assert_close(found, wanted.float(), atol=1e-6)


def test_loss_counts_hidden_tokens_that_are_shown_wrong_or_as_they_are():
    net = model()
    ids, condition, valid = inputs()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    found = masked_loss(net, ids, condition, valid, mask, torch.Generator().manual_seed(0), corrupt=0.5)
    assert (seen[0][mask] == net.mask_id).any()
    assert (seen[0][mask] != net.mask_id).any()
    assert torch.equal(seen[0][~mask], ids[~mask])
    logits = net(seen[0], condition, valid)
    assert_close(found, -logits[mask].log_softmax(-1).gather(-1, ids[mask][:, None]).mean().float(), atol=1e-6)


def test_how_hidden_tokens_are_shown():
    net = model()
    ids, condition, valid = inputs(batch=400, music=False)
    valid[:, 4:] = False
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :3] = True
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    loss = masked_loss(net, ids, condition, valid, mask, torch.Generator().manual_seed(0), corrupt=0.2)
    (shown,) = seen
    assert torch.equal(shown[:, 3], ids[:, 3])
    assert (shown[:, 4:] == net.pad_id).all()
    hidden, before = shown[mask], ids[mask]
    wrong = (hidden != before) & (hidden != net.mask_id)
    # Of 3600: a fifth is drawn anew, of which a seventh is as it was; 0.88 of the rest are the mask's.
    assert float(wrong.float().mean()) == pytest.approx(0.2 * 6 / 7, abs=0.03)
    assert float((hidden == net.mask_id).float().mean()) == pytest.approx(0.88 * 0.8, abs=0.03)
    # What stands past the end is nobody's business.
    other = torch.where(valid[..., None], ids, 3)
    assert torch.equal(
        loss, masked_loss(net, other, condition, valid, mask, torch.Generator().manual_seed(0), corrupt=0.2)
    )


def test_each_row_takes_the_methods_mask_or_the_cosine_ratio():
    valid = torch.ones(64, 6, dtype=torch.bool)
    scores = torch.zeros(64, 6).index_fill(1, torch.tensor([1]), 1.0), torch.zeros(64, 6, 3)
    cfg = MotionAnythingConfig(p_attention=0.5, alpha_time=0.1, alpha_parts=0.0)
    mask, rows = choose_masks(cfg, lambda: scores, valid, torch.Generator().manual_seed(0), parts=3)
    assert 16 < int(rows.sum()) < 48
    own = torch.zeros(6, 3, dtype=torch.bool)
    own[1] = True
    assert (mask[rows] == own).all()
    assert torch.equal(mask[~rows], cosine_mask(valid, 3, torch.Generator().manual_seed(0))[~rows])


def test_which_masks_a_training_takes():
    valid = torch.ones(400, 5, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    scores = torch.arange(5.0).expand(400, 5), torch.arange(3.0).expand(400, 5, 3)
    cfg = MotionAnythingConfig(alpha_time=0.2, alpha_parts=0.3)
    mask, rows = choose_masks(cfg, lambda: scores, valid, g, parts=3)
    assert 150 < rows.sum() < 250
    assert mask[rows][:, 4].all()
    assert mask[rows][:, :4].sum((0, 1)).tolist() == [0, 0, 4 * int(rows.sum())]
    events = torch.zeros(400, 5, 3, dtype=torch.bool)
    events[:, 1, 0] = True
    control = MotionAnythingConfig(masking="events", alpha_time=0.2, alpha_parts=0.3, p_attention=1.0)
    mask, rows = choose_masks(control, lambda: scores, valid, g, events, parts=3)
    assert rows.all()
    assert mask[:, 1, 0].all()
    # One frame of five whole, one part in each of the four others.
    assert (mask.flatten(1).sum(1) == 7).all()
    with pytest.raises(ValueError, match="needs the known events"):
        choose_masks(control, lambda: scores, valid, g, parts=3)
    assert not choose_masks(MotionAnythingConfig(masking="cosine"), lambda: scores, valid, g, parts=3)[1].any()


def test_guidance_is_a_sum_over_conditions():
    net = model()
    ids, condition, valid = inputs()
    yes, no = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    nothing = net(ids, condition.dropped(no, no), valid)
    music = net(ids, condition.dropped(no, yes), valid)
    both = net(ids, condition, valid)
    found = guided(net, ids, condition, valid, 3.0, 2.0)
    assert_close(found, nothing + 2 * (music - nothing) + 3 * (both - music))
    assert_close(guided(net, ids, condition, valid, 1.0, 1.0), both)
    # What weighs nothing is not computed.
    assert passes(net, ids, condition, valid, 1.0, 1.0).weights == (1.0,)
    # A row whose text is left out has none in any pass.
    gone, there = torch.tensor([True, True]), torch.tensor([False, False])
    none, heard = (net(ids, condition.dropped(gone, music), valid) for music in (gone, there))
    marked = replace(condition, no_text=torch.tensor([True, False]))
    assert_close(guided(net, ids, marked, valid, 3.0, 2.0)[0], (none + 2 * (heard - none))[0])
    text = Condition(text=condition.text)
    alone = net(ids, text.dropped(no, no), valid)
    assert_close(guided(net, ids, text, valid, 4.0, 9.0), alone + 4 * (net(ids, text, valid) - alone))
    heard = Condition(music=condition.music)
    alone = net(ids, heard.dropped(no, no), valid)
    assert_close(guided(net, ids, heard, valid, 9.0, 4.0), alone + 4 * (net(ids, heard, valid) - alone))


def test_unmasking_fixes_the_surest_first_and_ends_with_all():
    # Logits that depend on nothing: ids and their certainty are known.
    table = torch.zeros(1, 4, 2, 5)
    table[..., 3] = torch.arange(1.0, 9.0).view(1, 4, 2)
    seen = []

    def logits(ids):
        seen.append(ids.clone())
        return table

    valid = torch.tensor([[True, True, True, False]])
    g = torch.Generator().manual_seed(0)
    found = unmask(logits, valid, 2, 5, g, steps=4, temperature=0.0)
    assert found[0].tolist() == [[3, 3], [3, 3], [3, 3], [6, 6]]
    hidden = [(ids == 5).sum().item() for ids in seen]
    assert hidden == [6, round(6 * math.cos(math.pi / 6)), round(6 * math.cos(math.pi / 3)), 1]
    assert (seen[-1] == 5).nonzero().tolist() == [[0, 0, 0]]


def test_what_is_fixed_stays_however_sure_later_passes_are():
    g = torch.Generator().manual_seed(0)
    seen = []

    def logits(ids):
        seen.append(ids.clone())
        return 4 * torch.randn(3, 8, 2, 5, generator=g)

    valid = torch.ones(3, 8, dtype=torch.bool)
    seen.append(unmask(logits, valid, 2, 5, torch.Generator().manual_seed(1), steps=6))
    for before, after in pairwise(seen):
        fixed = before != 5
        assert torch.equal(before[fixed], after[fixed])
    assert [(ids == 5).sum().item() for ids in seen] == [48, 45, 39, 27, 15, 3, 0]


def test_an_edit_stays_inside_what_is_there():
    seen = []

    def logits(ids):
        seen.append(ids.clone())
        return torch.zeros(3, 6, 2, 5)

    valid = torch.arange(6) < torch.tensor([[6], [4], [5]])
    start = torch.randint(5, (3, 6, 2), generator=torch.Generator().manual_seed(0))
    edit = torch.zeros(3, 6, 2, dtype=torch.bool)
    edit[:2, 2:, 0] = True  # reaches into the padding of the second motion; nothing of the third is made
    found = unmask(logits, valid, 2, 5, torch.Generator().manual_seed(1), steps=3, start=start, edit=edit)
    there = valid[..., None].expand(3, 6, 2)
    for ids in (*seen, found):
        assert (ids[~there] == 6).all()
        assert torch.equal(ids[there & ~edit], start[there & ~edit])
    # Counts are of what is there: four cells and two.
    assert [(ids == 5).sum((1, 2)).tolist() for ids in seen] == [[4, 2, 0], [3, 1, 0], [1, 1, 0]]
    assert (found[there] < 5).all()


def test_a_rank_hides_its_largest_again():
    seen = []

    def logits(ids):
        seen.append(ids.clone())
        return torch.zeros(1, 4, 1, 5)

    valid = torch.ones(1, 4, dtype=torch.bool)
    rank = torch.tensor([1.0, 4, 2, 3]).view(1, 4, 1)
    unmask(logits, valid, 1, 5, torch.Generator().manual_seed(0), steps=3, rank=lambda ids: rank)
    hidden = [(ids[0, :, 0] == 5).nonzero()[:, 0].tolist() for ids in seen]
    assert hidden == [[0, 1, 2, 3], [1, 2, 3], [1]]


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -3.0])
    valid = torch.ones(4000, 1, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    found = unmask(lambda ids: logits.expand(4000, 1, 1, 4), valid, 1, 4, g, steps=1, keep=1.0).flatten()
    share = torch.bincount(found, minlength=4) / 4000
    assert (share - logits.softmax(0)).abs().max() < 0.03
    warm = unmask(lambda ids: logits.expand(4000, 1, 1, 4), valid, 1, 4, g, steps=1, keep=1.0, temperature=3.0)
    share = torch.bincount(warm.flatten(), minlength=4) / 4000
    assert (share - (logits / 3).softmax(0)).abs().max() < 0.03
    few = unmask(lambda ids: logits.expand(4000, 1, 1, 4), valid, 1, 4, g, steps=1, keep=0.5).flatten()
    assert set(few.tolist()) == {1, 2}


def test_an_edit_takes_every_token_that_reaches_into_it():
    found = edited(20, (0.3, 1.1), ["left arm"])  # tokens of a fifth of a second
    wanted = torch.zeros(1, 20, 6, dtype=torch.bool)
    wanted[:, 1:6, 4] = True
    assert torch.equal(found, wanted)
    assert edited(20, (0.0, 4.0), []).all()


def test_an_edit_keeps_what_it_does_not_make():
    net = model()
    ids, condition, valid = inputs()
    edit = torch.zeros_like(ids, dtype=torch.bool)
    edit[:, :, 1] = True
    g = torch.Generator().manual_seed(0)
    found = unmask(
        lambda now: guided(net, now, condition, valid, 2.0, 2.0), valid, 3, 7, g, steps=3, start=ids, edit=edit
    )
    assert torch.equal(found[~edit], ids[~edit])
    assert (found[edit] < 7).all()
    with pytest.raises(ValueError, match="needs both start"):
        unmask(lambda now: now, valid, 3, 7, g, start=ids)
    with pytest.raises(ValueError, match="needs both start"):
        unmask(lambda now: now, valid, 3, 7, g, edit=edit)
    with pytest.raises(ValueError, match=r"start and edit must be \[.*\], batch, time and parts; got"):
        draw_motion(net, condition, valid, g, start=ids[:1], edit=edit)
    with pytest.raises(TypeError, match=r"edit must be bool.*got torch\.int64"):
        draw_motion(net, condition, valid, g, start=ids, edit=edit.long())
    wrong = ids.clone()
    wrong[1, 0, 0] = 9
    with pytest.raises(ValueError, match=r"codes from 0 to 6; row 1, time step 0, part 0 of start has 9"):
        draw_motion(net, condition, valid, g, start=wrong, edit=edit)


def test_what_is_not_finite_is_no_motion():
    """Ids drawn of what is no number are the last code, everywhere."""
    net = model()
    _, condition, valid = inputs()
    g = torch.Generator().manual_seed(0)
    text = condition.text.clone()
    text[1] = torch.nan
    for broken in (replace(condition, text=text), condition):
        with pytest.raises(RuntimeError, match=r"logits are not finite in torch\.float64"):
            draw_motion(net, broken, valid, g, UnmaskConfig(steps=2))
        net.norm.weight.data[0] = torch.inf


def test_a_mask_that_hides_nothing_teaches_nothing():
    net = model()
    ids, condition, valid = inputs()
    with pytest.raises(ValueError, match="the mask hides no token"):
        masked_loss(net, ids, condition, valid, torch.zeros_like(ids, dtype=torch.bool), torch.Generator())
