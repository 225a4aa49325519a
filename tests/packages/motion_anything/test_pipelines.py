import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_motion_anything.pipelines import MoMaskPipeline
from hone_motion_anything.published import LengthEstimator, MaskTransformer, ResidualTransformer
from hone_motion_anything.tokenizers import RVQVAE


def texts_to_vectors(texts):
    return torch.stack([torch.randn(512, generator=torch.Generator().manual_seed(len(text))) for text in texts])


@pytest.fixture(scope="module")
def pipe():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
    plain = MoMaskPipeline(
        pipe.tokenizer, pipe.mask, pipe.residual, pipe.text, torch.zeros(263), torch.ones(263)
    )(["walks"], [16], steps=2)[0]  # fmt: skip
    assert torch.allclose(found, plain * 0.5 + 2, atol=1e-5)


def test_an_edit_keeps_the_first_level_outside_its_interval(pipe, monkeypatch):
    import hone_motion_anything.pipelines as pipelines

    seen = {}

    def keep(model, ids, *args, **kwargs):
        seen["ids"] = ids
        return refine(model, ids, *args, **kwargs)

    refine = pipelines.refine
    monkeypatch.setattr(pipelines, "refine", keep)
    features = 0.5 * torch.randn(40, 263) + 2
    known = pipe.tokenizer.encode(((features - 2) / 0.5)[None])[0][..., 0]
    edited = pipe.edit(features, "jumps", (0.5, 1.2), steps=3)
    assert edited.shape == (40, 263)
    kept = [0, 1, 6, 7, 8, 9]
    assert torch.equal(seen["ids"][:, kept, 0], known[:, kept])
    with pytest.raises(ValueError, match="an interval within 2 s"):
        pipe.edit(features, "jumps", (1.0, 3.0))


def test_bad_lengths(pipe):
    for frames in ([15], [200], [16, 16]):
        with pytest.raises(ValueError, match="a multiple of 4 from 16 to 196"):
            pipe(["walks"], frames)
    bare = MoMaskPipeline(pipe.tokenizer, pipe.mask, pipe.residual, pipe.text, pipe.mean, pipe.std)
    with pytest.raises(ValueError, match="give the pipeline a length estimator"):
        bare(["walks"])


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
