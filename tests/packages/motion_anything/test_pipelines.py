import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_motion_anything.config import TokenizerConfig, TransformerConfig, UnmaskConfig
from hone_motion_anything.features import part_columns
from hone_motion_anything.method import MotionTransformer
from hone_motion_anything.mogents import MoGenTSTokenizer
from hone_motion_anything.music import click_track
from hone_motion_anything.pipelines import MoGenTSPipeline, MoMaskPipeline, MotionAnythingPipeline
from hone_motion_anything.published import (
    LengthEstimator,
    MaskTransformer,
    MaskTransformer2D,
    ResidualTransformer,
    ResidualTransformer2D,
)
from hone_motion_anything.tokenizers import RVQVAE, PartTokenizer


def texts_to_vectors(texts):
    return torch.stack([torch.randn(512, generator=torch.Generator().manual_seed(len(text))) for text in texts])


def momask():
    tokenizer = RVQVAE(263, 20, 12, 8, 1, 4).eval()
    for layer in tokenizer.quantizer.layers:
        layer.codebook.normal_()
    return MoMaskPipeline(
        tokenizer,
        MaskTransformer(20, 12, 24, 32, 1, 3).eval(),
        ResidualTransformer(20, 12, 24, 32, 1, 3, levels=4).eval(),
        texts_to_vectors,
        torch.full((263,), 2.0),
        torch.full((263,), 0.5),
        LengthEstimator().eval(),
    )


def mogents():
    tokenizer = MoGenTSTokenizer(22, 20, 12, 18, 10, 8, 1, 4).eval()
    for layer in [*tokenizer.quantizer1d.layers, *tokenizer.quantizer2d.layers]:
        layer.codebook.normal_()
    return MoGenTSPipeline(
        tokenizer,
        MaskTransformer(20, 12, 24, 32, 1, 3, aux=True).eval(),
        ResidualTransformer(20, 12, 24, 32, 1, 3, levels=4, aux=True).eval(),
        MaskTransformer2D(18, 10, 24, 32, 1, 3).eval(),
        ResidualTransformer2D(18, 10, 24, 32, 1, 3, levels=4).eval(),
        texts_to_vectors,
        torch.full((263,), 2.0),
        torch.full((263,), 0.5),
        LengthEstimator().eval(),
    )


@pytest.fixture(scope="module", params=[momask, mogents])
def pipe(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return request.param()


def test_motions_have_the_lengths_asked_for_and_do_not_depend_on_their_company(pipe):
    both = pipe(["walks", "a person runs"], [24, 16], steps=3, temperature=0.0)
    assert [motion.shape for motion in both] == [(24, 263), (16, 263)]
    alone = pipe(["a person runs"], [16], steps=3, temperature=0.0)
    assert torch.allclose(both[1], alone[0], atol=1e-4)
    drawn = pipe(["walks"], steps=2)
    assert len(drawn[0]) % 4 == 0
    assert 16 <= len(drawn[0]) <= 196


def test_features_are_brought_back_to_their_scale(pipe):
    found = pipe(["walks"], [16], steps=2)[0]
    plain = replace(pipe, mean=torch.zeros(263), std=torch.ones(263))(["walks"], [16], steps=2)[0]
    assert torch.allclose(found, plain * 0.5 + 2, atol=1e-5)


def test_an_edit_keeps_the_first_level_outside_its_interval(pipe, monkeypatch):
    import hone_motion_anything.pipelines as pipelines

    seen = []

    def keep(model, ids, *args, **kwargs):
        seen.append(ids)
        return refine(model, ids, *args, **kwargs)

    refine = pipelines.refine
    monkeypatch.setattr(pipelines, "refine", keep)
    features = 0.5 * torch.randn(40, 263) + 2
    known = pipe.encode(((features - 2) / 0.5)[None])
    edited = pipe.edit(features, "jumps", (0.5, 1.2), steps=3)
    assert edited.shape == (40, 263)
    kept = [0, 1, 6, 7, 8, 9]
    assert len(seen) == len(known) == len(pipe.streams())
    for ids, levels, (_, _, parts) in zip(seen, known, pipe.streams(), strict=True):
        assert ids.shape == (1, 49 if pipe.whole else 10, parts)
        assert torch.equal(ids[:, kept], levels[:, kept, :, 0])
        assert not torch.equal(ids[:, :10], levels[..., 0])
    with pytest.raises(ValueError, match="an interval within 2 s"):
        pipe.edit(features, "jumps", (1.0, 3.0))


def test_strengths_and_values_that_are_not_finite_are_named(pipe):
    for options in ({"guidance": float("nan")}, {"residual_guidance": float("inf")}):
        with pytest.raises(ValueError, match="must be finite"):
            pipe(["walks"], [16], steps=2, **options)
    with pytest.raises(ValueError, match="temperature finite and not negative"):
        pipe(["walks"], [16], steps=2, temperature=float("nan"))
    broken = replace(pipe, text=lambda texts: torch.full((len(texts), 512), torch.nan))
    with pytest.raises(RuntimeError, match=r"logits are not finite in torch\.float32"):
        broken(["walks"], [16], steps=2)
    residual = copy.deepcopy(pipe.residual)
    residual.output_process.LayerNorm.weight.data[0] = torch.inf
    with pytest.raises(RuntimeError, match=r"logits are not finite in torch\.float32"):
        replace(pipe, residual=residual)(["walks"], [16], steps=2)


def test_texts_are_a_list(pipe, ours):
    for call in (pipe, ours):
        with pytest.raises(TypeError, match=r"texts must be a list.*Pass \['a person walks'\]"):
            call("a person walks", [16])
    with pytest.raises(ValueError, match="at least one text; got none"):
        pipe([])


def test_bad_lengths(pipe):
    for frames in ([15], [200], [16, 16]):
        with pytest.raises(ValueError, match="a multiple of 4 from 16 to 196"):
            pipe(["walks"], frames)
    with pytest.raises(ValueError, match="give the pipeline a length estimator"):
        replace(pipe, length=None)(["walks"])


def test_files_are_looked_at(tmp_path):
    paths = {name: tmp_path / f"{name}.tar" for name in ("tokenizer", "mask", "residual")}
    with pytest.raises(FileNotFoundError, match=r"mean\.npy"):
        MoMaskPipeline.from_files(**paths, clip=tmp_path, meta=tmp_path)
    np.save(tmp_path / "mean.npy", np.zeros(9))
    with pytest.raises(CheckpointError, match="must hold 263 finite numbers"):
        MoMaskPipeline.from_files(**paths, clip=tmp_path, meta=tmp_path)
    for name in ("mean", "std"):
        np.save(tmp_path / f"{name}.npy", np.ones(263))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.tar"):
        MoMaskPipeline.from_files(**paths, clip=tmp_path, meta=tmp_path)


@torch.no_grad()
def test_both_streams_are_read_from_the_authors_files_and_reach_the_motion(tmp_path, monkeypatch):
    import hone_motion_anything.checkpoints as checkpoints

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = mogents()
    names = {"tokenizer": "vq_model", "mask": "t2m_transformer_ts", "mask_aux": "t2m_transformer_aux"}
    names |= {"residual": "res_transformer_ts", "residual_aux": "res_transformer_aux"}
    state = {key: getattr(pipe, name).state_dict() for name, key in names.items()}
    for name in ("tokenizer", "mask", "residual"):
        torch.save({key: state[key] for own, key in names.items() if own.startswith(name)}, tmp_path / f"{name}.tar")
        for own in (name, f"{name}-aux"):
            if f"mogents-{own}" in checkpoints.MANIFESTS:
                made = copy.deepcopy(getattr(pipe, own.replace("-", "_")))
                small = replace(checkpoints.MANIFESTS[f"mogents-{own}"], build=lambda made=made: made.to("meta"))
                monkeypatch.setitem(checkpoints.MANIFESTS, f"mogents-{own}", small)
    for name, value in (("mean", 2.0), ("std", 0.5)):
        np.save(tmp_path / f"{name}.npy", np.full(263, value))
    monkeypatch.setattr("hone_motion_anything.pipelines.ClipText", lambda folder, device: texts_to_vectors)
    files = {"tokenizer": "tokenizer.tar", "masks": "mask.tar", "residuals": "residual.tar"}
    loaded = MoGenTSPipeline.from_files(
        **{name: tmp_path / file for name, file in files.items()}, clip=tmp_path, meta=tmp_path
    )
    known = pipe(["walks"], [16], steps=2)[0]
    assert torch.equal(loaded(["walks"], [16], steps=2)[0], known)
    for name in ("mask", "mask_aux", "residual", "residual_aux"):
        other = copy.deepcopy(getattr(pipe, name))
        for parameter in other.parameters():
            parameter.mul_(-1)
        assert not torch.equal(replace(pipe, **{name: other})(["walks"], [16], steps=2)[0], known), name


@pytest.fixture(scope="module")
def ours():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = PartTokenizer(TokenizerConfig(width=8, depth=1, codes=16, code_dim=4)).eval()
        for quantizer in tokenizer.quantizers:
            torch.nn.init.normal_(quantizer.codebook)
        sizes = TransformerConfig(width=16, heads=2, hidden=16, layers=2, codes=16, max_tokens=24)
        return MotionAnythingPipeline(tokenizer, MotionTransformer(sizes).eval(), texts_to_vectors)


def test_motion_anything_follows_texts_and_music(ours):
    made = ours(["walks", "a person runs"], [24, 16], settings=UnmaskConfig(steps=3))
    assert [motion.shape for motion in made] == [(24, 263), (16, 263)]
    greedy = UnmaskConfig(steps=3, temperature=0.0)
    alone = ours(["a person runs"], [16], settings=greedy)[0]
    assert torch.allclose(ours(["walks", "a person runs"], [24, 16], settings=greedy)[1], alone, atol=1e-4)
    # Without frames a motion is as long as its music; music changes it, and is enough.
    track, other = click_track(100, 0.1, 2.1), click_track(130, 0.3, 2.1)
    both = ours(["a person runs"], music=track, settings=greedy)[0]
    assert both.shape == (40, 263)
    assert not torch.allclose(both, ours(["a person runs"], music=other, settings=greedy)[0])
    assert ours(music=track, settings=greedy)[0].shape == (40, 263)
    ranked = replace(greedy, remask="attention")
    assert ours(["a person runs"], [16], settings=ranked)[0].shape == (16, 263)
    assert replace(ours, length=LengthEstimator().eval())(["walks"], settings=greedy)[0].shape[0] % 4 == 0


def test_motion_anything_edits_by_part_and_interval(ours):
    features = torch.randn(40, 263)
    known = ours.tokenizer.encode(features[None])
    arm = ours.edit(features, "waves", parts=["left arm"], settings=UnmaskConfig(steps=3))
    before = ours.tokenizer.decode(known)[0]
    own = list(part_columns()[4])
    others = [column for column in range(263) if column not in own]
    assert torch.equal(arm[:, others], before[:, others])
    assert not torch.equal(arm[:, own], before[:, own])
    seen = {}

    def decode(ids):
        seen["ids"] = ids
        return ours.tokenizer.__class__.decode(ours.tokenizer, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.tokenizer, "decode", decode)
        ours.edit(features, None, seconds=(0.5, 1.2), music=click_track(100, 0.1, 2.1))
    kept = [0, 1, 6, 7, 8, 9]
    assert torch.equal(seen["ids"][:, kept], known[:, kept])
    assert not torch.equal(seen["ids"], known)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe(), "say what to make"),
        (lambda pipe: replace(pipe, text=None)(["walks"], [16]), "no CLIP"),
        (lambda pipe: pipe(["walks"]), "a length estimator"),
        (lambda pipe: pipe(["walks"], [100]), "a multiple of 4 up to 96"),
        (lambda pipe: pipe(["walks"], [40], music=click_track(100, 0.1, 1.0)), "the music is shorter than the motion"),
        (lambda pipe: pipe.edit(torch.zeros(40, 263), "walks", parts=["tail"]), "no part tail"),
        (lambda pipe: pipe.edit(torch.zeros(40, 263), "walks", seconds=(1.0, 3.0)), "an interval within 2 s"),
        (lambda pipe: pipe.edit(torch.zeros(40, 263)), "say what to make"),
    ],
)
def test_motion_anything_names_what_is_wrong(ours, call, message):
    with pytest.raises(ValueError, match=message):
        call(ours)
