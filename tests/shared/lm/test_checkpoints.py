import json

import pytest
import torch
from hone_lm.checkpoints import find_licence, load_model, read_config
from hone_lm.tiny import tiny, tiny_inputs


def test_checkpoint_folder_round_trip(tmp_path):
    model, processor = tiny("llava_onevision", layers=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = load_model(str(tmp_path))
    inputs = tiny_inputs("llava_onevision", reader)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("card", "said", "level"),
    [
        (None, "unknown, neither", "INFO"),
        ("A model card.", "unknown, neither", "INFO"),
        ("---\ntags: [video]\n---\nlicense: mit, says the text", "unknown, neither", "INFO"),
        ("---\ntags:\n- video\nlicense: apache-2.0\n---\n# A model", "apache-2.0", "INFO"),
        ("---\nlicense: cc-by-nc-4.0  # their words\n---\n", "cc-by-nc-4.0 (no commercial use)", "WARNING"),
        (
            '---\nlicense: other\nlicense_name: "lab-research"\nlicense_link: https://lab.example/LICENSE\n---\n',
            "other, lab-research, https://lab.example/LICENSE",
            "INFO",
        ),
    ],
)
def test_licence_is_said_once_at_load(tmp_path, caplog, card, said, level):
    model, processor = tiny("qwen2_vl", layers=1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with caplog.at_level("INFO", "hone_lm"):
        load_model(str(tmp_path))
    (record,) = [record for record in caplog.records if "licence" in record.message]
    assert record.levelname == level
    assert record.message.startswith(f"licence of {tmp_path}: {said}")


def test_licence_in_a_config(tmp_path):
    config = tiny("qwen2_vl", layers=1)[0].config
    config.license = "mit"
    config.save_pretrained(tmp_path)
    assert find_licence(str(tmp_path)) == "mit"


def test_text_model_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a qwen2 model without visual tokens"):
        load_model(str(tmp_path))


def test_a_hybrid_decoder_is_refused(tmp_path):
    config = tiny("qwen2_vl", layers=1)[0].config
    config.save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).model_type == "qwen2_vl"
    text = json.loads((tmp_path / "config.json").read_text())
    text["text_config"]["layer_types"] = ["linear_attention"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"hybrid decoder \(linear_attention\)"):
        read_config(str(tmp_path))
