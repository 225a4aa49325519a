# ruff: noqa: B905, E501, E731, RUF005
"""Functional re-implementation of the published hosts and of ZPressor, compared with the releases at random weights.

Slow, one scene, CPU: the oracle of the tests.
"""

import math

import torch
import torch.nn.functional as F


class SD:  # state-dict view with a key prefix
    def __init__(s, d, p=""):
        s.d, s.p = d, p

    def __getitem__(s, k):
        return s.d[s.p + k]

    def has(s, k):
        return s.p + k in s.d

    def sub(s, k):
        return SD(s.d, s.p + k + ".")


def conv(sd, k, x, stride=1, pad=None, rep=False):  # rep: replicate padding
    w = sd[k + ".weight"]
    b = sd[k + ".bias"] if sd.has(k + ".bias") else None
    pad = w.shape[-1] // 2 if pad is None else pad
    if rep:
        x, pad = F.pad(x, (pad,) * 4, mode="replicate"), 0
    return F.conv2d(x, w, b, stride, pad)


def convT(sd, k, x, s):
    return F.conv_transpose2d(x, sd[k + ".weight"], sd[k + ".bias"], s)


def gn(sd, k, x, g=None):
    return F.group_norm(x, g or (8 if x.shape[1] % 8 == 0 else 4), sd[k + ".weight"], sd[k + ".bias"], 1e-5)


def ln(sd, k, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], sd[k + ".weight"], sd[k + ".bias"], eps)


def lin(sd, k, x):
    return F.linear(x, sd[k + ".weight"], sd[k + ".bias"] if sd.has(k + ".bias") else None)


def up(x, s):
    return F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=True)


def upto(x, hw):
    return F.interpolate(x, hw, mode="bilinear", align_corners=True)


def near2(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def cnn(sd, x, s2, s3):  # strides of layer2, layer3; returns [64ch, 96ch, 128ch]
    nrm = lambda t: F.instance_norm(t, eps=1e-5)

    def blk(p, x, st):
        y = F.relu(nrm(conv(sd, p + ".conv1", x, st)))
        y = F.relu(nrm(conv(sd, p + ".conv2", y)))
        if sd.has(p + ".downsample.0.weight"):
            x = nrm(conv(sd, p + ".downsample.0", x, st, 0))
        return F.relu(x + y)

    x = F.relu(nrm(conv(sd, "conv1", x, 2, 3)))
    o = []
    for i, st in ((1, 1), (2, s2), (3, s3)):
        x = blk(f"layer{i}.1", blk(f"layer{i}.0", x, st), 1)
        o.append(x)
    o[2] = conv(sd, "conv2", o[2])
    return o


def addpos(x):  # sine position inside each of the 2x2 windows
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    i = torch.arange(64)
    fr = 10000 ** (2 * (i // 2) / 64)

    def ax(n):
        a = (2 * math.pi * torch.arange(1, n + 1) / (n + 1e-6))[:, None] / fr
        return torch.where(i % 2 == 0, a.sin(), a.cos())

    p = torch.cat([ax(h)[:, None].expand(h, w, 64), ax(w)[None].expand(h, w, 64)], -1).permute(2, 0, 1)
    return x + p.repeat(1, 2, 2)


def win(t, h, w):  # [...,h,w,c] -> [...,4,P,c]
    s, c = t.shape[:-3], t.shape[-1]
    n = len(s)
    t = t.reshape(*s, 2, h // 2, 2, w // 2, c).permute(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return t.reshape(*s, 4, (h // 2) * (w // 2), c)


def unwin(t, h, w):
    s, c = t.shape[:-3], t.shape[-1]
    n = len(s)
    return t.reshape(*s, 2, 2, h // 2, w // 2, c).permute(*range(n), n, n + 2, n + 1, n + 3, n + 4).reshape(*s, h, w, c)


def swinmask(h, w):  # [4,P,P]
    def reg(n):
        r = torch.zeros(n, dtype=torch.long)
        r[n - n // 2 : n - n // 2 // 2] = 1
        r[n - n // 2 // 2 :] = 2
        return r

    r = win((reg(h)[:, None] * 3 + reg(w)[None])[..., None].float(), h, w)[..., 0]
    return torch.where(r[:, :, None] == r[:, None, :], 0.0, -100.0)


def attn_layer(sd, x, tgt, h, w, shift, mask):  # x [V,L,C]; tgt [V,m,L,C]
    B, L, C = x.shape
    m = tgt.shape[1]
    sh, sw = h // 2 // 2, w // 2 // 2
    q = lin(sd, "q_proj", x).view(B, h, w, C)
    k, v = [lin(sd, n, tgt).view(B, m, h, w, C) for n in ("k_proj", "v_proj")]
    if shift:
        q, k, v = [torch.roll(t, (-sh, -sw), (-3, -2)) for t in (q, k, v)]
    q = win(q, h, w)
    P = q.shape[-2]
    k, v = [
        win(t, h, w).permute(0, 2, 3, 1, 4).reshape(B, 4, P * m, C) for t in (k, v)
    ]  # pixel-major keys, view fastest
    s = q @ k.transpose(-1, -2) / C**0.5
    if shift:
        s = s + mask.repeat(1, 1, m)  # official quirk for m > 1: mask tiled view-major
    o = unwin(torch.softmax(s, -1) @ v, h, w)
    if shift:
        o = torch.roll(o, (sh, sw), (1, 2))
    msg = ln(sd, "norm1", lin(sd, "merge", o.reshape(B, L, C)))
    if sd.has("mlp.0.weight"):
        msg = ln(sd, "norm2", lin(sd, "mlp.2", F.gelu(lin(sd, "mlp.0", torch.cat([x, msg], -1)))))
    return x + msg


def transformer(sd, x, nbr):  # x [V,C,h,w], nbr: per view list of other views (order matters)
    V, C, h, w = x.shape
    t = x.flatten(2).transpose(1, 2)
    mask = swinmask(h, w)
    for l in range(6):
        tgt = torch.stack([t[n] for n in nbr])
        s = sd.sub(f"layers.{l}")
        t = attn_layer(s.sub("self_attn"), t, t[:, None], h, w, l % 2 == 1, mask)
        t = attn_layer(s.sub("cross_attn_ffn"), t, tgt, h, w, l % 2 == 1, mask)
    return t.transpose(1, 2).reshape(V, C, h, w)


def unet(sd, x, mult, attn_ds, V, post=False):  # post: MVSplat's post-norm variant
    def res(p, x):
        if post:
            h = F.silu(gn(sd, p + ".in_layers.1", conv(sd, p + ".in_layers.0", x)))
            h = F.silu(gn(sd, p + ".out_layers.1", conv(sd, p + ".out_layers.0", h)))
        else:
            h = conv(sd, p + ".in_layers.2", F.silu(gn(sd, p + ".in_layers.0", x)))
            h = conv(sd, p + ".out_layers.3", F.silu(gn(sd, p + ".out_layers.0", h)))
        return (conv(sd, p + ".skip_connection", x) if sd.has(p + ".skip_connection.weight") else x) + h

    def att(p, x):
        B, C, h, w = x.shape
        t = x.reshape(B, C, h * w)
        n = C // 32
        qkv = F.conv1d(t if post else gn(sd, p + ".norm", t), sd[p + ".qkv.weight"], sd[p + ".qkv.bias"])
        q, k, v = qkv.view(B // V, V, 3 * C, h * w).transpose(1, 2).reshape(B // V, n, 3, 32, V * h * w).unbind(2)
        a = torch.softmax(torch.einsum("bnct,bncs->bnts", q, k) / 32**0.5, -1)
        o = torch.einsum("bnts,bncs->bnct", a, v).reshape(B // V, C, V, h * w).transpose(1, 2).reshape(B, C, h * w)
        o = F.conv1d(o, sd[p + ".proj_out.weight"], sd[p + ".proj_out.bias"])
        return (t + (gn(sd, p + ".norm", o) if post else o)).view(B, C, h, w)

    L = len(mult)
    h = conv(sd, "input_blocks.0.0", x)
    sk = [h]
    i, j, ds = 1, 0, 1
    for lv in range(L):
        h = res(f"input_blocks.{i}.0", h)
        if ds in attn_ds:
            h = att(f"input_blocks.{i}.1", h)
        sk.append(h)
        i += 1
        if lv < L - 1:
            h = conv(sd, f"input_blocks.{i}.0.op", h, 2)
            sk.append(h)
            i += 1
            ds *= 2
    h = res("middle_block.2", res("middle_block.0", h))
    for lv in reversed(range(L)):
        for r in range(2):
            h = res(f"output_blocks.{j}.0", torch.cat([h, sk.pop()], 1))
            n = 1
            if ds in attn_ds:
                h = att(f"output_blocks.{j}.1", h)
                n = 2
            if lv > 0 and r == 1:
                h = conv(sd, f"output_blocks.{j}.{n}.conv", near2(h))
                ds //= 2
            j += 1
    return F.silu(gn(sd, "out.1", conv(sd, "out.0", h))) if post else conv(sd, "out.2", F.silu(gn(sd, "out.0", h)))


def dino(sd, x, layers, heads):
    B, _, H, W = x.shape
    h, w = H // 14, W // 14
    pe = sd["pos_embed"]
    D = pe.shape[-1]
    pp = pe[:, 1:].view(1, 37, 37, D).permute(0, 3, 1, 2)
    if (h, w) != (37, 37):
        pp = F.interpolate(pp, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
    t = F.conv2d(x, sd["patch_embed.proj.weight"], sd["patch_embed.proj.bias"], 14)
    t = torch.cat([(sd["cls_token"] + pe[:, :1]).expand(B, 1, D), (t + pp).flatten(2).transpose(1, 2)], 1)
    out = []
    for i in range(max(layers) + 1):
        s = sd.sub(f"blocks.{i}")
        q, k, v = lin(s, "attn.qkv", ln(s, "norm1", t, 1e-6)).view(B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, D)
        t = t + s["ls1.gamma"] * lin(s, "attn.proj", o)
        t = t + s["ls2.gamma"] * lin(s, "mlp.fc2", F.gelu(lin(s, "mlp.fc1", ln(s, "norm2", t, 1e-6))))
        if i in layers:
            out.append(ln(sd, "norm", t, 1e-6)[:, 1:].transpose(1, 2).reshape(B, D, h, w))
    return out


def dpt(
    sd, mono, c, mv, depth, uf, ns, feat
):  # c: CNN maps high->low res, mv: high->low; feat: feature upsampler (no depth, no output conv)
    l = [conv(sd, f"projects.{i}", mono[i]) for i in range(4)]
    dd = [] if feat else [depth]
    l[0], l[1], l[3] = (
        convT(sd, "resize_layers.0", l[0], 4),
        convT(sd, "resize_layers.1", l[1], 2),
        conv(sd, "resize_layers.3", l[3], 2),
    )
    if (uf, ns) == (4, 1):
        cc = [[c[0], c[1], l[0]], [c[2], l[1], mv[0]] + dd, [l[2]]]
    elif (uf, ns) == (2, 2):
        cc = [[c[0], c[1], mv[0]] + dd + [l[0]], [c[2], l[1], mv[1]], [l[2]]]
    elif (uf, ns) == (4, 2):
        cc = [[c[0], l[0]], [c[1], l[1], mv[0]] + dd, [c[2], l[2], mv[1]]]
    else:
        cc = [[c[0], l[0]], [c[1], l[1]], [c[2], l[2], mv[0]] + dd]
    for i in range(3):
        l[i] = conv(sd, f"concat_projects.{i}", torch.cat(cc[i], 1))
    l = [conv(sd, f"scratch.layer{i + 1}_rn", l[i]) for i in range(4)]
    p = None
    rcu = lambda k, x: conv(sd, k + ".conv2", F.relu(conv(sd, k + ".conv1", F.relu(x)))) + x
    for i in (4, 3, 2, 1):
        b = f"scratch.refinenet{i}"
        p = l[3] if i == 4 else p + rcu(b + ".resConfUnit1", l[i - 1])
        p = rcu(b + ".resConfUnit2", p)
        p = conv(sd, b + ".out_conv", upto(p, l[i - 2].shape[-2:]) if i > 1 else up(p, 2))
    if feat:
        return p
    for k in (0, 2):
        p = F.gelu(conv(sd, f"scratch.output_conv.{k}", p, rep=True))
    return conv(sd, "scratch.output_conv.4", p)


def costvol(f, K, E, nbr, cand):  # f [V,C,h,w]; K [V,3,3] px; E c2w; cand [V,D,h,w] inverse depth
    V, C, h, w = f.shape
    v, u = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    px = torch.stack([u, v, torch.ones_like(u)]).reshape(3, -1)
    D = cand.shape[1]
    out = []
    for i in range(V):
        acc = []
        for j in nbr[i]:
            T = E[j].inverse() @ E[i]
            X = (T[:3, :3] @ K[i].inverse() @ px)[None] / cand[i].reshape(D, 1, -1) + T[:3, 3:]
            X = K[i] @ X
            q = X[:, :2] / X[:, 2:].clamp(min=1e-3)  # reference K for both
            g = torch.stack([2 * q[:, 0] / (w - 1) - 1, 2 * q[:, 1] / (h - 1) - 1], -1).view(1, D * h, w, 2)
            s = F.grid_sample(f[j][None], g, mode="bilinear", padding_mode="zeros", align_corners=True).view(C, D, h, w)
            acc.append((f[i][:, None] * s).sum(0) / C**0.5)
        out.append(torch.stack(acc).mean(0))
    return torch.stack(out)


def neighbours(E, n):  # n counts the view itself; None = all others
    V = len(E)
    if n is None:
        return [[j for j in range(V) if j != i] for i in range(V)]
    d = torch.cdist(E[None, :, :3, 3], E[None, :, :3, 3])[0]
    return [torch.argsort(d[i])[:n][1:].tolist() for i in range(V)]


def zpressor(sd, x, E, N):  # x [K,C,h,w] -> z [N,C,h,w], anchors
    p = E[:, :3, 3]
    K = len(p)
    cur = ((p - p.mean(0)) ** 2).sum(-1).argmax().item()
    D = torch.full((K,), 1e10)
    c = []
    for _ in range(N):
        c.append(cur)
        d = ((p - p[cur]) ** 2).sum(-1)
        d[c] = 0
        D = torch.minimum(D, d)
        cur = D.argmax().item()
    a = ((p[:, None] - p[c]) ** 2).sum(-1).argmin(1).tolist()
    C = x.shape[1]
    tok = x.flatten(2).transpose(1, 2)
    q = tok[c]
    for l in range(6):
        ca, sa, nq = sd.sub(f"cross_attn_layers.0.{l}"), sd.sub(f"self_attn_layers.0.{l}"), []
        for j in range(N):
            sup = [k for k in range(K) if a[k] == j and k != c[j]]
            y = q[j]
            if sup:
                k, v = lin(ca, "proj_kv", ln(ca, "norm2", tok[sup].reshape(-1, C))).chunk(2, -1)
                Q = lin(ca, "projq", ln(ca, "norm1", y))
                o = F.scaled_dot_product_attention(*[t.bfloat16()[None, None] for t in (Q, k, v)])[0, 0].float()
                y = y + lin(ca, "proj", o)
            nq.append(y)
        y = torch.stack(nq)
        Q, k, v = lin(sa, "to_qkv", ln(sa, "norm", y)).chunk(3, -1)
        u = y + torch.softmax(Q @ k.transpose(1, 2) * C**-0.5, -1) @ v
        q = u + lin(sa, "mlp.fc2", F.gelu(lin(sa, "mlp.fc1", ln(sa, "mlp.norm", u))))
    return q.transpose(1, 2).reshape(N, C, *x.shape[-2:]), c


def sh_std(d):  # standard 3DGS basis to degree 3, [n,16]
    x, y, z = d.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack(
        [
            0 * x + 0.28209479177387814,
            -0.4886025119029199 * y,
            0.4886025119029199 * z,
            -0.4886025119029199 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ],
        -1,
    )


def rotate_sh(sh, R, deg):  # == e3nn wigner_D(l, *matrix_to_angles(R)) applied per band, degree <= 3
    g = torch.Generator().manual_seed(1)
    d = F.normalize(torch.randn(200, 3, generator=g, dtype=torch.float64), dim=-1)
    out = []
    e3 = lambda d: sh_std(torch.stack([-d[:, 2], -d[:, 0], d[:, 1]], -1))  # e3nn's real basis
    for l in range(deg + 1):
        s = slice(l * l, (l + 1) ** 2)
        D = torch.linalg.lstsq(e3(d)[:, s], e3(d @ R.double().T)[:, s]).solution.T
        out.append(sh[..., s] @ D.to(sh).T)
    return torch.cat(out, -1)


def adapter(
    raw, depth, img, K, E, opac, scale_fn, offset_fn, rgb_dc, zdepth, deg
):  # raw [V, 2+3+4+3*nsh, H, W]; K normalised
    V, _, H, W = raw.shape
    nsh = (raw.shape[1] - 9) // 3
    G = []
    xx, yy = torch.meshgrid((torch.arange(W) + 0.5) / W, (torch.arange(H) + 0.5) / H, indexing="xy")
    mask = torch.cat([torch.full((2 * l + 1,), 1.0 if l == 0 else 0.1 * 0.25**l) for l in range(deg + 1)])
    for i in range(V):
        r = raw[i].flatten(1).T
        off = offset_fn(r[:, :2])
        R = E[i, :3, :3]
        z = depth[i].flatten()
        ray = (
            torch.stack([xx.flatten() + off[:, 0] / W, yy.flatten() + off[:, 1] / H, torch.ones(H * W)], -1)
            @ K[i].inverse().T
        )
        ray = ray / (ray[:, 2:] if zdepth else ray.norm(dim=-1, keepdim=True))
        mean = E[i, :3, 3] + (ray @ R.T) * z[:, None]
        s = scale_fn(r[:, 2:5], z, K[i], H, W)
        q = r[:, 5:9]
        x, y, k, w = (q / (q.norm(dim=-1, keepdim=True) + 1e-8)).unbind(-1)
        Rq = torch.stack(
            [
                1 - 2 * (y * y + k * k),
                2 * (x * y - k * w),
                2 * (x * k + y * w),
                2 * (x * y + k * w),
                1 - 2 * (x * x + k * k),
                2 * (y * k - x * w),
                2 * (x * k - y * w),
                2 * (y * k + x * w),
                1 - 2 * (x * x + y * y),
            ],
            -1,
        ).view(-1, 3, 3)
        M = R @ Rq * s[:, None, :]
        sh = r[:, 9:].reshape(-1, 3, nsh)[..., : (deg + 1) ** 2] * mask
        if rgb_dc:
            sh = torch.cat(
                [sh[..., :1] + ((img[i].flatten(1).T - 0.5) / 0.28209479177387814)[..., None], sh[..., 1:]], -1
            )
        G.append((mean, M @ M.transpose(1, 2), rotate_sh(sh, R, deg), opac[i].flatten()))
    return [
        torch.cat(t) for t in zip(*G)
    ]  # means [VHW,3], covariances, SH [VHW,3,(deg+1)^2] (official raster axes), opacities


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ORI = lambda o: o.sigmoid() - 0.5  # PM-Loss checkpoint: lambda o: .5 * o


def depthsplat(sd, img, E, K, near, far, ns, uf, lowest, vit, gen, nn=None, N=None, offset=ORI):
    # one scene: img [V,3,H,W], E [V,4,4] c2w, K [V,3,3] normalised; gen 'oct'|'head'; nn neighbours incl. self; N anchors (ZPressor)
    sd = SD(sd)
    dp = sd.sub("depth_predictor")
    V, _, H, W = img.shape
    f = cnn(dp.sub("backbone"), (img - MEAN) / STD, 1 if lowest == 4 else 2, 2)
    pos = addpos(f[2])
    if N is not None:
        pos, c = zpressor(dp.sub("zipmatch"), pos, E, N)
        f = [t[c] for t in f]
        img, E, K, near, far = [t[c] for t in (img, E, K, near, far)]
        V = N
    x = (img - MEAN) / STD
    Kp = K.clone()
    Kp[:, 0] *= W
    Kp[:, 1] *= H
    nbr = neighbours(E, nn)
    mv = [transformer(dp.sub("transformer"), pos, nbr)]
    mo = dino(
        dp.sub("pretrained"),
        upto(x, (H // 14 * 14, W // 14 * 14)),
        [4, 11, 17, 23] if vit == "vitl" else [2, 5, 8, 11],
        {"vits": 6, "vitb": 12, "vitl": 16}[vit],
    )
    mo = [upto(t, (H // 8, W // 8)) for t in mo]
    mono = [mo[3] if lowest == 8 else up(mo[3], 2)]
    pyr = lambda p, t: conv(dp, p + ".stages.1.2", F.gelu(convT(dp, p + ".stages.1.0", t, 2)))
    if ns == 2:
        mv.append(pyr("mv_pyramid", mv[0]))
        mono.append(pyr("mono_pyramid", mono[0]))
    cl = [f[2], f[1]]
    mn, mx = (1 / far).view(V, 1, 1, 1), (1 / near).view(V, 1, 1, 1)
    dep = None
    for i in range(ns):
        Ki = Kp.clone()
        Ki[:, :2] /= uf * 2 ** (ns - 1 - i)
        D = 128 // 4**i
        t = torch.linspace(0, 1, D).view(1, D, 1, 1)
        if i == 0:
            cand = (mn + t * (mx - mn)).expand(V, D, *mv[0].shape[-2:])
        else:
            dep = up(dep, 2).detach()
            step = (mx - mn) / 127 / 2**i
            lo, hi = torch.maximum(dep - step * (D // 2), mn), torch.minimum(dep + step * (D // 2 - 1), mx)
            cand = lo + t * (hi - lo)
        u = torch.cat([costvol(mv[i], Ki, E, nbr, cand), cl[i], mv[i], mono[i]], 1)
        r = dp.sub(f"regressor.{i}")
        hd = dp.sub(f"depth_head.{i}")
        y = conv(r, "4", unet(r.sub("3"), F.gelu(gn(r, "1", conv(r, "0", u), 8)), [1] * (3 + i), [4 * 2**i], V)) + conv(
            dp, f"regressor_residual.{i}", u
        )
        prob = torch.softmax(conv(hd, "2", F.gelu(conv(hd, "0", y, rep=True)), rep=True), 1)
        dep = (prob * cand).sum(1, keepdim=True)
    inv = torch.maximum(
        torch.minimum(up(dep, uf) + dpt(dp.sub("upsampler"), mo, f, mv[::-1], dep, uf, ns, False), mx), mn
    )
    depth = 1 / inv
    pm = F.interpolate(prob.max(1, keepdim=True)[0], size=(H, W), mode="nearest")
    fu, gr, gh = [sd.sub(k) for k in ("feature_upsampler", "gaussian_regressor", "gaussian_head")]
    if gen == "head":
        feat = dpt(fu, mo, f, mv[::-1], None, uf, ns, True)
    else:
        feat = []
        for i in range(ns):
            n = int(math.log2(lowest // 2**i))
            t = conv(fu, f"upsampler.{i}.0", torch.cat([cl[i], mv[i], mono[i]], 1))
            for a in range(n):
                t = conv(fu, f"upsampler.{i}.{2 + 3 * a}", near2(t), rep=True)
                t = F.gelu(t) if a < n - 1 else t
            feat.append(t)
        feat = torch.cat(feat, 1)
    u = torch.cat([img, depth, pm, feat], 1)
    if gen == "head":
        r = conv(gr, "2", F.gelu(conv(gr, "0", u)))
    else:
        y = F.gelu(gn(gr, "1", conv(gr, "0", u), 8))
        r = conv(gr, "4", unet(gr.sub("3"), y, [1, 2, 4, 4, 4] if y.shape[1] == 32 else [1] * 5, [16], V))
    raw = conv(gh, "2", F.gelu(conv(gh, "0", torch.cat([r, img, feat, pm], 1), rep=True)), rep=True)
    sf = (
        (lambda s, *_: F.softplus(s - 4).clamp(1e-10, 3.0))
        if gen == "head"
        else (lambda s, *_: torch.exp(s - 4).clamp(max=0.3))
    )
    return depth[:, 0], adapter(
        raw[:, 1:],
        depth[:, 0],
        img,
        K,
        E,
        raw[:, 0].sigmoid(),
        sf,
        offset,
        True,
        gen == "head",
        2 if gen == "head" else 3,
    )


def mvsplat(sd, img, E, K, near, far, N=None):
    sd = SD(sd)
    bb, d = sd.sub("backbone"), sd.sub("depth_predictor")
    V, _, H, W = img.shape
    f = cnn(bb.sub("backbone"), (img - MEAN) / STD, 2, 1)[2]
    if N is not None:
        f, c = zpressor(bb.sub("zipmatch"), f, E, N)
        img, E, K, near, far = [t[c] for t in (img, E, K, near, far)]
        V = N
    t = transformer(bb.sub("transformer"), addpos(f), neighbours(E, None))
    Ki = K.clone()
    Ki[:, 0] *= W // 4
    Ki[:, 1] *= H // 4
    mn, mx = (1 / far).view(V, 1, 1, 1), (1 / near).view(V, 1, 1, 1)
    cand = (mn + torch.linspace(0, 1, 128).view(1, 128, 1, 1) * (mx - mn)).expand(V, 128, H // 4, W // 4)
    u = torch.cat([costvol(t, Ki, E, neighbours(E, None), cand), t], 1)
    c, ru = d.sub("corr_refine_net"), d.sub("refine_unet")
    y = conv(c, "4", unet(c.sub("3"), F.gelu(gn(c, "1", conv(c, "0", u), 8)), [1] * 3, [4], V, True)) + conv(
        d, "regressor_residual", u
    )
    pdf = torch.softmax(conv(d, "depth_head_lowres.2", F.gelu(conv(d, "depth_head_lowres.0", y))), 1)
    disp = up((pdf * cand).sum(1, keepdim=True), 4)
    pm = F.interpolate(pdf.max(1, keepdim=True)[0], scale_factor=4, mode="nearest")
    Fu = F.gelu(up(conv(d, "upsampler.0", torch.cat([t, f], 1)), 4))
    R = unet(
        ru.sub("3"),
        F.gelu(gn(ru, "1", conv(ru, "0", torch.cat([img, conv(d, "proj_feature", Fu), disp, pm], 1)), 4)),
        [1] * 5,
        [16],
        V,
        True,
    )
    raw = conv(d, "to_gaussians.2", F.gelu(conv(d, "to_gaussians.0", torch.cat([R, img, Fu], 1))))
    dd = conv(d, "to_disparity.2", F.gelu(conv(d, "to_disparity.0", R)))
    depth = 1 / torch.maximum(torch.minimum(disp + dd[:, :1], mx), mn)
    sf = lambda s, z, K, H, W: (
        (0.5 + 14.5 * s.sigmoid()) * z[:, None] * 0.1 * (K[:2, :2].inverse() @ torch.tensor([1.0 / W, 1.0 / H])).sum()
    )
    return depth[:, 0], adapter(raw, depth[:, 0], img, K, E, dd[:, 1].sigmoid(), sf, ORI, False, False, 3)
