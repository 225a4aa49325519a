"""Protocols on tiny pipelines; scorers are stand-ins that are called as the real ones."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError, MissingExtraError
from hone_nar.benchmarks import write_npz
from hone_nar.config import EvalConfig
from hone_nar.evaluate import evaluate
from hone_nar.extract import clips_of
from hone_nar.inputs import find_graded
from hone_nar.larp import LARPTokenizer
from hone_nar.models import tiny, tiny_tokenizer
from hone_nar.pipelines import NARPipeline, NARVideoPipeline
from hone_visual_ar.quality import frechet
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

ADM = """
import sys, numpy
reference, samples = sys.argv[1:]
images = numpy.load(samples)["arr_0"]
assert reference.endswith("reference.npz") and images.dtype == numpy.uint8 and images.shape == (4, 24, 24, 3)
print("warming up TensorFlow...")
print("Inception Score:", 100.5)
print("FID:", images.mean())
print("sFID: 6.5")
print("Precision: 0.5")
print("Recall: 0.25")
"""
DETECT = """
import argparse, json, pathlib
p = argparse.ArgumentParser()
p.add_argument("imagedir"); p.add_argument("--outfile"); p.add_argument("--model-path")
a = p.parse_args()
assert pathlib.Path(a.model_path).is_dir() and pathlib.Path("evaluation").is_dir()
with open(a.outfile, "w") as out:
    for folder in sorted(pathlib.Path(a.imagedir).iterdir()):
        facts = json.load(open(folder / "metadata.jsonl"))
        for number, file in enumerate(sorted((folder / "samples").iterdir())):
            out.write(json.dumps({"tag": facts["tag"], "correct": facts["tag"] == "colors" or number == 0}) + "\\n")
"""


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    path = tmp_path_factory.mktemp("classes")
    NARPipeline(tiny("nar"), tiny_tokenizer()).save_pretrained(path)
    return path


def run_eval(start, cfg, out):
    with start(cfg, "eval", out) as run:
        report = evaluate(cfg, run)
    return {row.metric: row.value for row in report.rows}, report


def test_imagenet_by_adms_evaluator(classes, start, tmp_path):
    (tmp_path / "adm" / "evaluations").mkdir(parents=True)
    (tmp_path / "adm" / "evaluations" / "evaluator.py").write_text(ADM)
    (tmp_path / "reference.npz").touch()
    cfg = EvalConfig(
        protocol="imagenet", model=classes, limit=4, batch=3, scorer=tmp_path / "adm", scorer_python=sys.executable,
        reference=tmp_path / "reference.npz",
    )  # fmt: skip
    values, report = run_eval(start, cfg, tmp_path / "run")
    images = [np.asarray(Image.open(file)) for file in sorted((report.path / "artifacts" / "images").glob("*.png"))]
    assert len(images) == 4
    assert values == {
        "images": 4, "inception_score": 100.5, "fid": pytest.approx(np.stack(images).mean(), abs=1e-9), "sfid": 6.5,
        "precision": 0.5, "recall": 0.25,
    }  # fmt: skip
    assert "fid" in str(report)
    # Images belong to their seeds and classes, whatever the batch.
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (4,), generator=generator).tolist()
    third = NARPipeline.from_pretrained(classes)(labels[2], seeds=2).images[0]
    assert np.abs(np.asarray(third).astype(int) - images[2]).max() <= 1
    (tmp_path / "adm" / "evaluations" / "evaluator.py").write_text("raise SystemExit('no TensorFlow')")
    with pytest.raises(RuntimeError, match="no TensorFlow"):
        run_eval(start, cfg, tmp_path / "again")
    with pytest.raises(ValueError, match="there is no Python at 'nowhere'"):
        find_graded(replace(cfg, scorer_python="nowhere"))
    with pytest.raises(CheckpointError, match="checkout of openai/guided-diffusion"):
        find_graded(replace(cfg, scorer=tmp_path))
    with pytest.raises(CheckpointError, match=r"needs --reference VIRTUAL_imagenet256_labeled\.npz"):
        find_graded(replace(cfg, reference=None))


def test_imagenet_by_torch_fidelity_has_names_of_its_own(classes, start, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    cfg = EvalConfig(protocol="imagenet", model=classes, limit=2, reference=tmp_path / "real")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match="fid"):
        find_graded(cfg)
    asked = []

    def metrics(**options):
        asked.append(options)
        return {
            "frechet_inception_distance": 12.5, "inception_score_mean": 3.0, "precision": 0.5, "recall": 0.25
        }  # fmt: skip

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=metrics))
    values, report = run_eval(start, cfg, tmp_path / "run")
    assert values["fid_torch_fidelity"] == 12.5
    assert "fid" not in values
    assert asked[0]["input1"] == str(report.path / "artifacts" / "images")
    with pytest.raises(CheckpointError, match=r"an \.npz needs --scorer"):
        find_graded(replace(cfg, reference=tmp_path / "reference.npz"))


def test_the_npz_is_what_numpy_writes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    files = [tmp_path / f"{at}.png" for at in range(3)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    write_npz(files, tmp_path / "samples.npz")
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], images)


def test_geneval_by_its_own_scorer(classes, start, tmp_path):
    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat"]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model = tiny("nar", num_classes=None, cls_token_num=6, caption_dim=24, grid=(2, 2))
    NARPipeline(model, tiny_tokenizer(), encoder.eval(), fast).save_pretrained(tmp_path / "texts")
    for name in ("geneval/evaluation", "weights"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "geneval" / "evaluation" / "evaluate_images.py").write_text(DETECT)
    prompts = tmp_path / "prompts.jsonl"
    entries = [{"tag": "single_object", "prompt": "a cat"}, {"tag": "colors", "prompt": "a red cat"}]
    prompts.write_text("\n".join(map(json.dumps, entries)))
    cfg = EvalConfig(
        protocol="geneval", model=tmp_path / "texts", prompts=prompts, scorer=tmp_path / "geneval",
        scorer_python=sys.executable, weights=tmp_path / "weights",
    )  # fmt: skip
    values, report = run_eval(start, cfg, tmp_path / "run")
    assert values == {"images": 8, "single_object": 0.25, "colors": 1.0, "score": 0.625}
    assert len(list((report.path / "artifacts" / "images" / "00001" / "samples").glob("*.png"))) == 4
    drawn, _ = run_eval(start, replace(cfg, scorer=None, weights=None, limit=1), tmp_path / "drawn")
    assert drawn == {"images": 4}
    with pytest.raises(ValueError, match="there is no Python at 'nowhere'"):
        find_graded(replace(cfg, scorer_python="nowhere"))
    with pytest.raises(CheckpointError, match="no folder of GenEval's Mask2Former at"):
        find_graded(replace(cfg, weights=tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="checkout of djghosh13/geneval"):
        find_graded(replace(cfg, scorer=tmp_path))
    with pytest.raises(ValueError, match="needs a model of texts"):
        find_graded(replace(cfg, model=classes))
    prompts.write_text("{}")
    with pytest.raises(CheckpointError, match="holds no prompts as GenEval"):
        find_graded(cfg)


class Detector(torch.nn.Module):
    """Stands for I3D: means of the halves of a clip's frames and channels."""

    def forward(
        self, clips: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert not rescale
        assert resize
        assert return_features
        return torch.cat([clips[:, :, :2].mean((2, 3, 4)), clips[:, :, 2:].mean((2, 3, 4))], 1)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio-ffmpeg's pipes
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_fvd_of_clips(start, tmp_path, classes, monkeypatch):
    vae = LARPTokenizer(frames=4, size=16, tokens=24, dim=16, depth=1, heads=2, codebook_size=32).eval()
    NARVideoPipeline(tiny("video", num_classes=2), vae).save_pretrained(tmp_path / "clips")
    for at, name in enumerate(("jump", "run")):
        (tmp_path / "videos" / name).mkdir(parents=True)
        writer = imageio_ffmpeg.write_frames(str(tmp_path / "videos" / name / "a.mp4"), (32, 32), macro_block_size=1)
        writer.send(None)
        for frame in range(4):
            writer.send(np.full((32, 32, 3), 100 * at + 20 * frame, dtype=np.uint8))
        writer.close()
    torch.jit.script(Detector()).save(tmp_path / "i3d.pt")
    cfg = EvalConfig(
        protocol="ucf", model=tmp_path / "clips", reference=tmp_path / "videos", detector=tmp_path / "i3d.pt", limit=8,
        batch=3,
    )  # fmt: skip
    # A run that is stopped goes on with what it has drawn, and with the same clips.
    calls, again, original = [], [], NARVideoPipeline.__call__
    with monkeypatch.context() as patched:

        def stopped(self, labels, **options):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(labels)
            return original(self, labels, **options)

        patched.setattr(NARVideoPipeline, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_eval(start, cfg, tmp_path / "run")
    monkeypatch.setattr(
        NARVideoPipeline,
        "__call__",
        lambda self, labels, **options: again.append(labels) or original(self, labels, **options),
    )
    values, report = run_eval(start, cfg, tmp_path / "run")
    assert [len(part) for part in (*calls, *again)] == [3, 3, 2]
    labels = [label for _, label in json.loads((report.path / "artifacts" / "clips.json").read_text())]
    assert set(labels) == {0, 1}
    pipe, detector = NARVideoPipeline.from_pretrained(tmp_path / "clips"), Detector()
    options = {"rescale": False, "resize": True, "return_features": True}
    real = torch.cat(
        [clips_of(tmp_path / "videos" / ("jump", "run")[at] / "a.mp4", 4, 16, "center")[:, 0] for at in labels]
    )
    drawn = pipe(labels, seeds=0, output_type="pt")
    wanted = frechet(detector(2 * drawn - 1, **options), detector(2 * real - 1, **options), ddof=0)
    assert values["fvd"] == pytest.approx(wanted, rel=1e-3)
    NARVideoPipeline(tiny("video"), vae).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds 2 classes; the model has 10"):
        find_graded(replace(cfg, model=tmp_path / "other"))
    with pytest.raises(CheckpointError, match="holds a NARPipeline; protocol ucf needs a NARVideoPipeline"):
        find_graded(replace(cfg, model=classes))
    with pytest.raises(CheckpointError, match="there is no I3D at"):
        find_graded(replace(cfg, detector=tmp_path / "none.pt"))
