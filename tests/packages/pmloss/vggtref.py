"""VGGT's points by plain functions over a state dict: the oracle of the tests, compared with the release's modules."""

import torch
import torch.nn.functional as F

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def lin(s, k, x):
    return F.linear(x, s[k + ".weight"], s[k + ".bias"])


def ln(s, k, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], s[k + ".weight"], s[k + ".bias"], eps)


def conv(s, k, x, stride=1):
    w = s[k + ".weight"]
    return F.conv2d(x, w, s.get(k + ".bias"), stride, w.shape[-1] // 2)


def conv_t(s, k, x, stride):
    return F.conv_transpose2d(x, s[k + ".weight"], s[k + ".bias"], stride)


def upto(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def sub(s, prefix):
    return {k[len(prefix) + 1 :]: v for k, v in s.items() if k.startswith(prefix + ".")}


def rope(t, pos):
    d = t.shape[-1] // 2
    fr = 100.0 ** (-torch.arange(0, d, 2) / d)

    def one(x, p):
        a = p[:, None].float() * fr
        a = torch.cat([a, a], -1)
        x1, x2 = x[..., : d // 2], x[..., d // 2 :]
        return x * a.cos() + torch.cat([-x2, x1], -1) * a.sin()

    return torch.cat([one(t[..., :d], pos[:, 0]), one(t[..., d:], pos[:, 1])], -1)


def block(s, x, pos, heads, eps):
    """Without positions a block of DINOv2, with them norms of queries and keys and rotary position."""
    b, n, width = x.shape
    qkv = lin(s, "attn.qkv", ln(s, "norm1", x, eps)).view(b, n, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if pos is not None:
        q, k = rope(ln(s, "attn.q_norm", q), pos), rope(ln(s, "attn.k_norm", k), pos)
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
    x = x + s["ls1.gamma"] * lin(s, "attn.proj", o)
    return x + s["ls2.gamma"] * lin(s, "mlp.fc2", F.gelu(lin(s, "mlp.fc1", ln(s, "norm2", x, eps))))


def vggt_points(sd, im, heads, depth, patch_depth, taps):
    """Points ``[S, H, W, 3]`` and confidence of one scene's pictures ``[S, 3, H, W]``."""
    count, _, height, width = im.shape
    a, p = sub(sd, "aggregator"), sub(sd, "point_head")
    pe = sub(a, "patch_embed")
    h, w = height // 14, width // 14
    t = F.conv2d((im - MEAN) / STD, pe["patch_embed.proj.weight"], pe["patch_embed.proj.bias"], 14).flatten(2).mT
    dim, place = t.shape[-1], pe["pos_embed"]
    grid = place[:, 1:].view(1, 37, 37, dim).permute(0, 3, 1, 2)
    if (h, w) != (37, 37):
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
    first = (pe["cls_token"] + place[:, :1]).expand(count, 1, dim)
    t = torch.cat([first, pe["register_tokens"].expand(count, 4, dim), t + grid.flatten(2).mT], 1)
    for i in range(patch_depth):
        t = block(sub(pe, f"blocks.{i}"), t, None, heads, 1e-6)
    special = [
        torch.cat([a[k][0, :1], a[k][0, 1:].expand(count - 1, -1, -1)]) for k in ("camera_token", "register_token")
    ]
    t = torch.cat([*special, ln(pe, "norm", t, 1e-6)[:, 5:]], 1)
    n = t.shape[1]
    pos = torch.cat([torch.zeros(5, 2, dtype=torch.long), torch.cartesian_prod(torch.arange(h), torch.arange(w)) + 1])
    outs = []
    for i in range(depth):
        f = block(sub(a, f"frame_blocks.{i}"), t, pos, heads, 1e-5)
        whole = f.reshape(1, count * n, dim)
        t = block(sub(a, f"global_blocks.{i}"), whole, pos.repeat(count, 1), heads, 1e-5).view(count, n, dim)
        outs.append(torch.cat([f, t], -1))

    def uv(x):
        c, hh, ww = x.shape[1:]
        aspect = width / height
        g = (aspect * aspect + 1) ** 0.5
        om = 100.0 ** (-torch.arange(c // 4) / (c / 4))
        xs = torch.linspace(-aspect / g * (ww - 1) / ww, aspect / g * (ww - 1) / ww, ww)
        ys = torch.linspace(-1 / g * (hh - 1) / hh, 1 / g * (hh - 1) / hh, hh)

        def e(v):
            return torch.cat([(v[:, None] * om).sin(), (v[:, None] * om).cos()], -1)

        both = torch.cat([e(xs)[None].expand(hh, ww, -1), e(ys)[:, None].expand(hh, ww, -1)], -1)
        return x + 0.1 * both.permute(2, 0, 1)

    levels = [
        uv(conv(p, f"projects.{k}", ln(p, "norm", outs[i][:, 5:]).mT.reshape(count, -1, h, w)))
        for k, i in enumerate(taps)
    ]
    levels[0] = conv_t(p, "resize_layers.0", levels[0], 4)
    levels[1] = conv_t(p, "resize_layers.1", levels[1], 2)
    levels[3] = conv(p, "resize_layers.3", levels[3], 2)
    levels = [conv(p, f"scratch.layer{i + 1}_rn", levels[i]) for i in range(4)]

    def rcu(k, x):
        x = F.relu(x)
        return conv(p, k + ".conv2", F.relu(conv(p, k + ".conv1", x))) + x

    y = None
    for i in (4, 3, 2, 1):
        b = f"scratch.refinenet{i}"
        y = levels[3] if i == 4 else y + rcu(b + ".resConfUnit1", levels[i - 1])
        y = rcu(b + ".resConfUnit2", y)
        size = levels[i - 2].shape[-2:] if i > 1 else (2 * y.shape[-2], 2 * y.shape[-1])
        y = conv(p, b + ".out_conv", upto(y, size))
    y = uv(upto(conv(p, "scratch.output_conv1", y), (h * 14, w * 14)))
    y = conv(p, "scratch.output_conv2.2", F.relu(conv(p, "scratch.output_conv2.0", y))).permute(0, 2, 3, 1)
    return y[..., :3].sign() * torch.expm1(y[..., :3].abs()), 1 + y[..., 3].exp()
