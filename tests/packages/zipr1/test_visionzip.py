"""VisionZip as a peer: its merge against the release and by hand, and inside real classes against shorter prompts."""

import pytest
import torch
from hone_core.testing import assert_close
from hone_lm.decoders import find_decoder
from hone_lm.tiny import tiny, tiny_inputs
from hone_zipr1.config import SparseConfig
from hone_zipr1.models import attach, check_config
from hone_zipr1.visionzip import counts, merge_tokens, received

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def test_the_release_gives_the_same_tokens():
    """Its CLIP tower's forward on formulas, run apart; it puts the class token first and merged tokens last."""
    i = torch.arange(9, dtype=torch.float64)
    attention = ((i * 7 + 3) % 11 + 1)[1:]
    hidden = torch.stack([i.sin(), (2 * i).cos()], -1)[None, 1:]
    keys = torch.stack([(i + 1).sin(), (3 * i).cos(), (i * i).sin()], -1)[None, 1:]
    keep, merged = merge_tokens(hidden, attention[None], keys, 3, 2)
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4, 6]
    ours = merged[0, [0, 3, 6, 1, 4]]
    release = [
        [0.84147098, -0.41614684], [-0.75680250, -0.14550003], [0.65698660, 0.13673722],
        [1.26426880, -0.71054638], [-0.81780427, 0.12109876],
    ]  # fmt: skip
    assert_close(ours, torch.tensor(release, dtype=torch.float64), atol=1e-8, rtol=0)


def test_each_token_joins_the_likest_and_those_together_are_averaged():
    features = torch.tensor([[[1.0], [10.0], [100.0], [1000.0], [10000.0]]])
    metric = torch.tensor([[[1.0, 0.0], [0.0, 5.0], [0.0, 0.1], [9.0, 1.0], [1.0, 8.0]]])
    gets = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.1]])
    # Token 1 gets most. Of 0, 2, 3, 4 those at distance two are targets: 0 and 3; 2 is orthogonal to 0, 4 like 3.
    keep, merged = merge_tokens(features, gets, metric, 1, 2)
    assert keep.tolist() == [[True, True, False, True, False]]
    assert merged[keep][:, 0].tolist() == [1.0, 10.0, 1000.0 + (100.0 + 10000.0) / 2]
    keep, same = merge_tokens(features, gets, metric, 2, 0)
    assert keep.tolist() == [[False, True, False, True, False]]
    assert same is features
    assert merge_tokens(features, gets, metric, 3, 2)[0].all()


@pytest.mark.parametrize(("tokens", "share", "found"), [(576, 64 / 576, (54, 10)), (64, 0.001, (1, 0)), (7, 1, (6, 1))])
def test_the_share_that_is_merged_is_the_release_s(tokens, share, found):
    assert counts(tokens, share) == found


def test_attention_received_is_a_mean_over_heads_and_rows(monkeypatch):
    query, key = torch.randn(2, 3, 11, 8, generator=torch.Generator().manual_seed(0))
    whole = (query @ key.transpose(-1, -2) * 0.3).softmax(-1).mean((0, 1))
    assert_close(received(query, key, 0.3), whole)
    monkeypatch.setattr("hone_zipr1.visionzip._PAIRS", 3 * 11 * 2)
    assert_close(received(query, key, 0.3), whole)


@torch.no_grad()
def zipped_run(family, ratio, **options):
    """A run; what the decoder was given after the merge, its states, the choice, and what was known of the tower."""
    model, processor = tiny(family, layers=2)
    inputs = tiny_inputs(family, processor, ["What moves?"], **options)
    decoder = find_decoder(model).model
    seen = {}
    with attach(model, SparseConfig(policy="visionzip", ratio=ratio)) as handle:
        hooks = [
            decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True),
            decoder.register_forward_hook(lambda module, args, out: seen.update(out=out.last_hidden_state)),
            model.model.visual.register_forward_hook(
                lambda module, args, out: seen.update(tower=handle._state.current.tower, features=out.pooler_output)
            ),
        ]
        model(**inputs)
        keep = handle.stats.keep
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(k, keep[0]) for k in keep.values())
    return model, inputs, decoder, seen, keep[0]


@pytest.mark.parametrize("family", QWEN)
def test_the_decoder_is_as_one_that_is_given_only_the_kept_tokens(family):
    model, inputs, decoder, seen, keep = zipped_run(family, 0.7, size=168)
    visual = torch.isin(inputs["input_ids"], torch.tensor([model.config.image_token_id, model.config.video_token_id]))
    assert keep[~visual].all()
    assert 0 < int(keep[visual].sum()) < int(visual.sum())
    assert abs(float(keep.float().mean()) - 0.7) < 0.02
    few = {"inputs_embeds": seen["inputs_embeds"][:, keep[0]], "position_ids": seen["position_ids"][..., keep[0]]}
    if seen.get("visual_pos_masks") is not None:
        few["visual_pos_masks"] = seen["visual_pos_masks"][:, keep[0]]
        few["deepstack_visual_embeds"] = [deep[keep[visual]] for deep in seen["deepstack_visual_embeds"]]
    with torch.no_grad():
        alone = decoder(**few, use_cache=False).last_hidden_state
    assert_close(seen["out"][:, keep[0]], alone, atol=1e-5, rtol=1e-4)
    # Some tokens have taken others in, and those alone differ from what the tower gave.
    changed = (seen["inputs_embeds"][visual] != seen["features"]).any(-1)
    assert changed.any()
    assert not (changed & ~keep[visual]).any()


@pytest.mark.parametrize("family", QWEN)
def test_what_is_looked_at_is_the_attention_of_the_tower_s_last_block(family):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, processor = tiny(family, layers=1)
    inputs = tiny_inputs(family, processor, ["What moves?"], size=168)
    gets, merged = [], {}

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
        if module is model.model.visual.blocks[-1].attn:
            gets.append(weights.mean((0, 1, 2)))
        return (weights @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    model.set_attn_implementation({"vision_config": "spy"})
    tower = model.model.visual
    hook = tower.merger.register_forward_hook(lambda module, args, out: merged.update(out=out))
    with torch.no_grad(), attach(model, SparseConfig(policy="visionzip", ratio=0.5)) as handle:
        known = {}
        tower.register_forward_hook(
            lambda module, args, out: known.update(tower=handle._state.current.tower, out=out.pooler_output)
        )
        model(**inputs)
    hook.remove()
    unit = tower.spatial_merge_size**2
    # As the tower orders them: its windows' order, told by the features, which random weights make all different.
    places = torch.cdist(known["out"], merged["out"]).argmin(-1)
    assert sorted(places.tolist()) == list(range(len(places)))
    if family == "qwen2_5_vl":
        assert places.tolist() != list(range(len(places))), "windows move tokens"
    want = torch.cat(gets).view(-1, unit).mean(1)[places]
    assert_close(torch.cat(known["tower"].received), want, atol=1e-6, rtol=1e-4)
    assert len(known["tower"].received) == len(gets)


def test_a_padded_batch_is_its_prompts_alone():
    family, questions = "qwen2_5_vl", ["What moves?", "Which of the two is first, and where?"]
    model, processor = tiny(family, layers=2)
    both = tiny_inputs(family, processor, questions)
    found = []
    with torch.no_grad(), attach(model, SparseConfig(policy="visionzip", ratio=0.6)) as handle:
        out = model(**both).logits
        keep = handle.stats.keep[0]
        for seed, question in enumerate(questions):
            logits = model(**tiny_inputs(family, processor, [question], seed=seed)).logits
            found.append((logits[0, -1], handle.stats.keep[0][0]))
        ids = model.generate(**both, max_new_tokens=3, do_sample=False)
        # Newer transformers run the tower before the model there.
        assert torch.equal(handle.stats.keep[0], keep)
    assert ids.shape[1] == keep.shape[1] + 3
    for row, (logits, own) in enumerate(found):
        assert torch.equal(keep[row, -len(own) :], own)
        assert_close(out[row, -1], logits, atol=1e-5, rtol=1e-4)


def test_the_host_without_a_tower_is_pruned_by_the_likeness_of_its_features(small_host):
    from hone_zipr1.grading import ask, at_budget, held_out

    asked = held_out(small_host, 6, 0)
    other = at_budget(SparseConfig(rows="all"), 0.5, small_host.model.config)["VisionZip"]
    outcome = ask(small_host, asked, other, batch=4)
    assert outcome.tau == pytest.approx(0.5, abs=0.05)
    assert outcome.uniform is None
    assert torch.equal(ask(small_host, asked, other, batch=6).ids, outcome.ids)
    # Through the processor and the tower's own forward, which has no block either.
    with torch.no_grad(), attach(small_host.model, other) as handle:
        small_host.model(**small_host.inputs(asked.part(slice(0, 1))))
        one = handle.stats.keep[0]
    assert float(one.float().mean()) == pytest.approx(outcome.tau)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="ratio belongs to policy top-k, fastv, visionzip"):
        SparseConfig(policy="visionzip")
    for change in ({"dense_layers": (0,)}, {"cache": "retrieve"}, {"protect": "none"}):
        with pytest.raises(ValueError, match="before the first layer, for good"):
            SparseConfig(policy="visionzip", ratio=0.5, **change)
    model, _ = tiny("llava_onevision", layers=1)
    with pytest.raises(ValueError, match=r"knows the vision towers of qwen2_vl, .*; got llava_onevision"):
        check_config(model.config, SparseConfig(policy="visionzip", ratio=0.5))
