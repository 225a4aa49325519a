import torch
from hone_core.testing import assert_close
from hone_motion_anything.config import EvaluatorConfig
from hone_motion_anything.evaluator import Evaluator, MotionEncoderBiGRUCo, MovementConvEncoder, TextEncoderBiGRUCo


def test_keys_and_shapes_are_t2ms():
    with torch.device("meta"):
        movement, motion = MovementConvEncoder(259, 512, 512), MotionEncoderBiGRUCo(512, 1024, 512)
        text = TextEncoderBiGRUCo(300, 15, 512, 512)
    shapes = {name: tuple(value.shape) for name, value in movement.state_dict().items()}
    assert shapes["main.0.weight"] == (512, 259, 4)
    assert shapes["main.3.weight"] == (512, 512, 4)
    assert shapes["out_net.weight"] == (512, 512)
    shapes = {name: tuple(value.shape) for name, value in motion.state_dict().items()}
    assert shapes["hidden"] == (2, 1, 1024)
    assert shapes["input_emb.weight"] == (1024, 512)
    assert shapes["gru.weight_hh_l0_reverse"] == (3072, 1024)
    assert shapes["output_net.0.weight"] == (1024, 2048)
    assert shapes["output_net.3.weight"] == (512, 1024)
    assert tuple(text.state_dict()["pos_emb.weight"].shape) == (300, 15)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (movement, motion, text)]
    assert [round(size, 2) for size in sizes] == [1.84, 15.75, 4.10]


def test_padding_and_order_change_nothing():
    torch.manual_seed(0)
    net = Evaluator(30, EvaluatorConfig(movement=8, motion=8, text=8, out=4, word=6)).eval()
    x = torch.randn(3, 40, 263)
    lengths = torch.tensor([24, 40, 32])
    found = net.motion(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        # Beyond the end lies padding, which the strided convolutions of the last movement see three frames of.
        y = torch.zeros_like(x[row : row + 1])
        y[:, : length + 3] = x[row : row + 1, : length + 3]
        assert_close(net.motion(y, torch.tensor([length])), found[row : row + 1], atol=1e-6)
    words = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    assert_close(net.text(words)[:1], net.text(words[:1, :2]), atol=1e-6)
