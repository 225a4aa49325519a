import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.config import TokenizerConfig
from hone_motion_anything.data import fake_batch
from hone_motion_anything.features import part_columns
from hone_motion_anything.mogents import MoGenTSTokenizer
from hone_motion_anything.tokenizers import RVQVAE, PartTokenizer, QuantizeEMAReset, ResidualVQ


def parts(seed=0):
    torch.manual_seed(seed)
    tokenizer = PartTokenizer(TokenizerConfig(width=8, depth=1, codes=16, code_dim=4)).eval()
    for quantizer in tokenizer.quantizers:
        quantizer.codebook.normal_()
    return tokenizer


def test_keys_and_shapes_are_momasks():
    with torch.device("meta"):
        model = RVQVAE()
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert state["encoder.model.0.weight"] == (512, 263, 3)
    assert state["encoder.model.2.0.weight"] == (512, 512, 4)
    assert state["encoder.model.3.1.model.2.conv1.weight"] == (512, 512, 3)
    assert state["encoder.model.2.1.model.0.conv2.bias"] == (512,)
    assert state["decoder.model.2.0.model.0.conv1.weight"] == (512, 512, 3)
    assert state["decoder.model.3.2.weight"] == (512, 512, 3)
    assert state["decoder.model.6.weight"] == (263, 512, 3)
    assert state["quantizer.layers.5.codebook"] == (512, 512)
    assert len(state) == 72


def test_nearest_code_is_the_nearest():
    torch.manual_seed(0)
    quantizer = QuantizeEMAReset(7, 3).eval()
    quantizer.codebook.normal_()
    x = torch.randn(50, 3)
    assert torch.equal(quantizer.nearest(x), torch.cdist(x, quantizer.codebook).argmin(-1))
    out, ids, commit = quantizer(x)
    assert_close(out, quantizer.codebook[ids])
    assert_close(commit, (x - quantizer.codebook[ids]).square().mean())


def test_residual_levels_take_what_is_left():
    torch.manual_seed(0)
    levels = ResidualVQ(3, 8, 4).eval()
    for layer in levels.layers:
        layer.codebook.normal_()
    x = torch.randn(2, 4, 5)
    ids, codes = levels.quantize(x)
    rest = x.clone()
    for level in range(3):
        near = torch.cdist(rest.mT.reshape(-1, 4), levels.layers[level].codebook).argmin(-1).view(2, 5)
        assert torch.equal(ids[..., level], near)
        assert_close(codes[level], levels.layers[level].codebook[near].mT)
        rest = rest - codes[level]
    assert_close(levels.get_codes_from_indices(ids).sum(0).mT, codes.sum(0))
    # Missing levels are zeros.
    assert_close(levels.get_codes_from_indices(ids[..., :1]).sum(0).mT, codes[0])
    out, found, _ = levels(x, drop_after=0)
    assert_close(out, codes[0])
    assert (found[..., 1:] == -1).all()


def test_the_codebook_moves_by_averages_and_rare_codes_are_replaced():
    torch.manual_seed(0)
    quantizer = QuantizeEMAReset(2, 1, mu=0.5, averages=True)
    quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.code_sum.copy_(quantizer.codebook)
    quantizer.code_count.fill_(2.0)
    x = torch.tensor([[1.0], [2.0], [3.0], [2.0]])
    quantizer(x)
    # Sums (0 + 8) / 2 over counts (2 + 4) / 2; the second code keeps a count of 1.
    assert_close(quantizer.codebook, torch.tensor([[4 / 3], [5.0]]))
    quantizer(x)
    assert float(quantizer.codebook[1]) in (1.0, 2.0, 3.0)


def test_a_new_codebook_begins_at_inputs_and_gradients_pass_through():
    quantizer = QuantizeEMAReset(4, 2)
    x = torch.randn(10, 2, requires_grad=True)
    out, _, _ = quantizer(x, generator=torch.Generator().manual_seed(0))
    out.sum().backward()
    assert_close(x.grad, torch.ones(10, 2))


def test_forward_and_decoding_agree():
    torch.manual_seed(0)
    model = RVQVAE(263, 16, 8, 8, 1, 2).eval()
    for layer in model.quantizer.layers:
        layer.codebook.normal_()
    x = torch.randn(2, 16, 263)
    ids, codes = model.encode(x)
    assert ids.shape == (2, 4, 2)
    assert codes.shape == (2, 2, 8, 4)
    assert_close(model.forward_decoder(ids), model(x)[0], atol=1e-5)


def test_a_parts_tokens_hold_that_part_alone():
    tokenizer = parts()
    features = fake_batch(2).features
    tokenizer.mean.copy_(features.flatten(0, 1).mean(0))
    ids = tokenizer.encode(features)
    assert ids.shape == (2, 20, 6)
    columns = part_columns()
    other = features.clone()
    other[..., list(columns[4])] += torch.randn(2, 80, len(columns[4]))
    changed = tokenizer.encode(other) != ids
    assert changed[..., 4].any()
    assert not changed[..., [0, 1, 2, 3, 5]].any()
    new = ids.clone()
    new[..., 4] = (new[..., 4] + 1) % 16
    moved = (tokenizer.decode(new) != tokenizer.decode(ids)).any(1).any(0)
    assert set(moved.nonzero()[:, 0].tolist()) == set(columns[4])
    with pytest.raises(ValueError, match="a multiple of 4 frames; got 79"):
        tokenizer.encode(features[:, :79])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda: RVQVAE(nb_code=16, code_dim=8, width=16, depth=1, num_quantizers=2),
        lambda: MoGenTSTokenizer(codes1d=16, dim1d=8, codes2d=16, dim2d=8, width=16, depth=1, levels=2),
        parts,
    ],
    ids=["momask", "mogents", "parts"],
)
def test_weights_of_another_dtype_take_features_of_float32(make, dtype):
    net = make().to(dtype).eval()
    for name, buffer in net.named_buffers():
        if name.endswith("codebook"):
            buffer.normal_(generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 16, 263, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = net.encode(features), net.encode(features.to(dtype))
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        assert torch.equal(one, other)
        assert one.unique().numel() > 1


def test_the_loss_falls():
    tokenizer = parts()
    for quantizer in tokenizer.quantizers:
        quantizer.code_count.zero_()
    tokenizer.train()
    features = fake_batch(8).features
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss, _ = tokenizer.loss(features, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
