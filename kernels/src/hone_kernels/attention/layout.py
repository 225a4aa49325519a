"""Which key blocks each query block reads: index lists, and the builders that make them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hone_kernels.checks import unit_last
from hone_kernels.launch import geometry, unchanged

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockLayout"]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _grid(tokens_q: int, tokens_k: int, block_q: int, block_k: int) -> tuple[int, int]:
    """Blocks of queries and of keys.

    Raises:
        ValueError: A number is not positive.
    """
    numbers = {"tokens_q": tokens_q, "tokens_k": tokens_k, "block_q": block_q, "block_k": block_k}
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive; got {value}")
    return _ceil_div(tokens_q, block_q), _ceil_div(tokens_k, block_k)


def _block_sizes(tokens: int, block: int, device: torch.device) -> Tensor:
    """True token count of each block of a sequence: ``[N]`` int32; only the last one may be short."""
    starts = torch.arange(0, tokens, block, device=device, dtype=torch.int32)
    return (tokens - starts).clamp(max=block).to(torch.int32)


def _check_grid(name: str, x: Tensor, tokens_q: int, tokens_k: int, block_q: int, block_k: int) -> None:
    want = _grid(tokens_q, tokens_k, block_q, block_k)
    if x.shape[-2:] != want:
        raise ValueError(
            f"{name} must end in [NQ, NK] = {list(want)} for {tokens_q} queries and {tokens_k} keys in blocks of "
            f"{block_q} and {block_k}; got {list(x.shape)}"
        )


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A block-sparse attention pattern as ascending lists of key blocks.

    Query block ``i`` covers queries ``[i * block_q, (i + 1) * block_q)``; key block ``j`` likewise. With ``NQ =
    ceil(tokens_q / block_q)`` and ``NK = ceil(tokens_k / block_k)``, only the last block of either side may be short.

    What a call makes of the lists (an order of the rows, columns for gradients) is kept for the next one, and made anew
    where torch counts a change of them. Who writes past it (``.data``, a kernel of their own) makes a new layout.

    Attributes:
        kv_num: ``[B or 1, H or 1, NQ]`` int32, how many key blocks each query block reads, 0 to ``L``.
        kv_idx: ``[B or 1, H or 1, NQ, L]`` int32, which ones: strictly ascending in the first ``kv_num`` entries, each
            in ``[0, NK)``; what stands behind them is ignored.
        tokens_q: Number of queries.
        tokens_k: Number of keys.
        block_q: Queries in a query block.
        block_k: Keys in a key block.
        k_valid: ``[B or 1, NK]`` int32 or None. Keys that exist at the head of each key block; those behind them
            (padding of a batch, of a ragged tile) get no weight and no gradient. They must be finite all the same,
            since no weight times NaN is NaN. None: every key below ``tokens_k`` exists.

    Args:
        check: Look at the values, which waits for the device. False where an op made them: then lists that are not as
            above give wrong results in silence.

    Raises:
        ValueError: A shape does not fit, a count is outside ``[0, L]``, an index outside ``[0, NK)``, a list is not
            strictly ascending.
        TypeError: A tensor is not int32.
    """

    kv_num: Tensor
    kv_idx: Tensor
    tokens_q: int
    tokens_k: int
    block_q: int
    block_k: int
    k_valid: Tensor | None = None
    check: InitVar[bool] = field(default=True, kw_only=True)

    def __post_init__(self, check: bool) -> None:
        rows, _ = _grid(self.tokens_q, self.tokens_k, self.block_q, self.block_k)
        lead = self.kv_num.shape[:-1]
        if self.kv_num.dim() != 3 or self.kv_num.shape[-1] != rows:
            raise ValueError(
                f"kv_num must be [B or 1, H or 1, {rows}] (NQ = ceil({self.tokens_q} / {self.block_q})); "
                f"got {list(self.kv_num.shape)}"
            )
        if self.kv_idx.dim() != 4 or self.kv_idx.shape[:-1] != (*lead, rows) or not self.kv_idx.shape[-1]:
            raise ValueError(
                f"kv_idx must be {[*lead, rows, 'L']} with L >= 1, to match kv_num; got {list(self.kv_idx.shape)}"
            )
        tensors = {"kv_num": self.kv_num, "kv_idx": self.kv_idx}
        if self.k_valid is not None:
            tensors["k_valid"] = self.k_valid
            if self.k_valid.dim() != 2 or self.k_valid.shape[-1] != self.num_k_blocks:
                raise ValueError(
                    f"k_valid must be [B or 1, {self.num_k_blocks}] (NK = ceil({self.tokens_k} / {self.block_k})); "
                    f"got {list(self.k_valid.shape)}"
                )
        for name, tensor in tensors.items():
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be int32; got {tensor.dtype}. Convert it with .to(torch.int32)")
            if tensor.device != self.kv_num.device:
                raise ValueError(
                    f"{name} is on {tensor.device} but kv_num is on {self.kv_num.device}; move one of them"
                )

        if check:
            self._check_values()

    def _check_values(self) -> None:
        width, cols = self.kv_idx.shape[-1], self.num_k_blocks
        wrong = (self.kv_num < 0) | (self.kv_num > width)
        if bool(wrong.any()):
            got = int(self.kv_num[wrong][0])
            raise ValueError(f"kv_num must lie in [0, {width}], the width of kv_idx; got {got}")
        used = torch.arange(width, device=self.device) < self.kv_num.unsqueeze(-1)
        wrong = used & ((self.kv_idx < 0) | (self.kv_idx >= cols))
        if bool(wrong.any()):
            raise ValueError(
                f"kv_idx must lie in [0, {cols}): there are {cols} blocks of {self.block_k} keys in {self.tokens_k}; "
                f"got {int(self.kv_idx[wrong][0])}"
            )
        if bool((used[..., 1:] & (self.kv_idx[..., 1:] <= self.kv_idx[..., :-1])).any()):
            raise ValueError("kv_idx must be strictly ascending within each row; sort it and drop repeated blocks")
        if self.k_valid is not None and bool(((self.k_valid < 0) | (self.k_valid > self.block_k)).any()):
            raise ValueError(f"k_valid must lie in [0, {self.block_k}], the key block size")

    @property
    def num_q_blocks(self) -> int:
        """NQ."""
        return _ceil_div(self.tokens_q, self.block_q)

    @property
    def num_k_blocks(self) -> int:
        """NK."""
        return _ceil_div(self.tokens_k, self.block_k)

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.kv_num.device

    @classmethod
    def dense(
        cls,
        tokens_q: int,
        tokens_k: int,
        *,
        block_q: int = 128,
        block_k: int = 128,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Every query block reads every key block."""
        rows, cols = _grid(tokens_q, tokens_k, block_q, block_k)
        num = torch.full((1, 1, rows), cols, dtype=torch.int32, device=device)
        idx = torch.arange(cols, dtype=torch.int32, device=device).expand(1, 1, rows, cols).contiguous()
        return cls(num, idx, tokens_q, tokens_k, block_q, block_k, check=False)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        tokens_q: int,
        tokens_k: int,
        *,
        block_q: int = 128,
        block_k: int = 128,
        k_valid: Tensor | None = None,
        width: int | None = None,
    ) -> BlockLayout:
        """From a boolean block mask, without waiting for the device.

        Args:
            mask: ``[B or 1, H or 1, NQ, NK]`` bool, True where the block pair is computed.
            tokens_q: Number of queries.
            tokens_k: Number of keys.
            block_q: Queries in a query block.
            block_k: Keys in a key block.
            k_valid: See the class.
            width: ``L``, the length of the lists, at least the largest count of a row (asserted on the device). NK if
                None.
        """
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [B or 1, H or 1, NQ, NK]; got {mask.dtype} {list(mask.shape)}")
        _check_grid("mask", mask, tokens_q, tokens_k, block_q, block_k)
        cols = mask.shape[-1]
        width = cols if width is None else width
        num = mask.sum(-1, dtype=torch.int32)
        if width < cols:
            torch._assert_async((num <= width).all(), "BlockLayout.from_mask: a row keeps more blocks than width")
        # A kept block goes to the slot that counts the kept ones before it; everything else goes to a spare last slot.
        slot = mask.cumsum(-1).sub_(1).masked_fill_(~mask, width)
        idx = mask.new_zeros((*mask.shape[:-1], width + 1), dtype=torch.int32)
        columns = torch.arange(cols, dtype=torch.int32, device=mask.device).expand(mask.shape)
        idx.scatter_(-1, slot, columns)
        return cls(num, idx[..., :width].contiguous(), tokens_q, tokens_k, block_q, block_k, k_valid, check=False)

    @classmethod
    def from_topk(
        cls,
        scores: Tensor,
        keep: int,
        tokens_q: int,
        tokens_k: int,
        *,
        block_q: int = 128,
        block_k: int = 128,
        k_valid: Tensor | None = None,
        forced: Tensor | None = None,
    ) -> BlockLayout:
        """The ``keep`` best-scored key blocks of each row, and those that ``forced`` adds.

        Args:
            scores: ``[B, H, NQ, NK]``, larger is kept first.
            keep: Blocks per row, 1 to NK.
            tokens_q: Number of queries.
            tokens_k: Number of keys.
            block_q: Queries in a query block.
            block_k: Keys in a key block.
            k_valid: See the class.
            forced: bool, broadcastable to ``scores``: block pairs kept whatever their score, beyond ``keep``.
        """
        if scores.dim() != 4:
            raise ValueError(f"scores must be [B, H, NQ, NK]; got {list(scores.shape)}")
        _check_grid("scores", scores, tokens_q, tokens_k, block_q, block_k)
        cols = scores.shape[-1]
        if not 1 <= keep <= cols:
            raise ValueError(f"keep must lie in [1, {cols}], the number of key blocks; got {keep}")
        best = scores.topk(keep, dim=-1, sorted=False).indices
        if forced is None:
            idx = best.sort(dim=-1).values.to(torch.int32)
            num = torch.full(idx.shape[:-1], keep, dtype=torch.int32, device=idx.device)
            return cls(num, idx, tokens_q, tokens_k, block_q, block_k, k_valid, check=False)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) | forced
        return cls.from_mask(mask, tokens_q, tokens_k, block_q=block_q, block_k=block_k, k_valid=k_valid)

    @classmethod
    def sliding_tile(
        cls,
        grid: tuple[int, int, int],
        tile: tuple[int, int, int],
        window: tuple[int, int, int],
        *,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """A static 3-D window over a video in tile order: each tile reads the tiles in a box around it.

        The sequence is tile by tile, ``tile_f * tile_h * tile_w`` slots a tile, tiles in (frame, height, width) order.
        At the border the box is shifted inwards, so every tile reads equally many. A tile that sticks out of the grid
        holds its tokens first and padding behind them (``k_valid``).

        Args:
            grid: Tokens along (frame, height, width).
            tile: Tokens of a tile along each; their product is both block sizes.
            window: Tiles of the box along each, odd; clipped to the number of tiles.
            device: Where to put the lists.

        Source: the window rule of Sliding Tile Attention (arXiv 2502.04507).
        """
        if any(w < 1 or w % 2 == 0 for w in window):
            raise ValueError(f"window must be odd and positive along each axis, so that it has a centre; got {window}")
        counts = [_ceil_div(g, t) for g, t in zip(grid, tile, strict=True)]
        near = []
        for count, size in zip(counts, window, strict=True):
            at, size = torch.arange(count, device=device), min(size, count)
            first = (at - size // 2).clamp(0, count - size)
            near.append((at >= first[:, None]) & (at < first[:, None] + size))
        f, h, w = near
        mask = f[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
        tiles = counts[0] * counts[1] * counts[2]
        block = tile[0] * tile[1] * tile[2]
        sizes = [_block_sizes(g, t, mask.device) for g, t in zip(grid, tile, strict=True)]
        valid = (sizes[0][:, None, None] * sizes[1][:, None] * sizes[2]).reshape(1, tiles).contiguous()
        return cls.from_mask(
            mask.reshape(1, 1, tiles, tiles),
            tiles * block,
            tiles * block,
            block_q=block,
            block_k=block,
            k_valid=valid if any(g % t for g, t in zip(grid, tile, strict=True)) else None,
        )

    def to_mask(self) -> Tensor:
        """Boolean block mask ``[B or 1, H or 1, NQ, NK]``."""
        cols, width = self.num_k_blocks, self.kv_idx.shape[-1]
        used = torch.arange(width, device=self.device) < self.kv_num.unsqueeze(-1)
        slot = torch.where(used, self.kv_idx, cols).long()
        mask = self.kv_num.new_zeros((*self.kv_num.shape, cols + 1), dtype=torch.bool)
        return mask.scatter_(-1, slot, True)[..., :cols]

    def transpose(self) -> BlockLayout:
        """The same block pairs with queries and keys exchanged: for each key block, the query blocks that read it.

        The lists are NQ long, since no count is waited for. ``k_valid`` stays behind: it speaks of what are now rows.
        """
        return BlockLayout.from_mask(
            self.to_mask().transpose(-1, -2),
            self.tokens_k,
            self.tokens_q,
            block_q=self.block_k,
            block_k=self.block_q,
        )

    def lists(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``kv_num``, ``kv_idx`` and ``k_valid``, each as the kernels read it: neighbours side by side."""
        k_valid = None if self.k_valid is None else unit_last(self.k_valid)
        return unit_last(self.kv_num), unit_last(self.kv_idx), k_valid

    def geometry(self) -> tuple[Any, ...] | None:
        """All of it that a call depends on but what is in the lists and where; None as ``launch.geometry`` has it."""
        if "_geometry" not in self.__dict__:
            lists = geometry(self.kv_num, self.kv_idx, self.k_valid)
            sizes = (self.tokens_q, self.tokens_k, self.block_q, self.block_k)
            self.__dict__["_geometry"] = lists and (*sizes, *lists)
        return self.__dict__["_geometry"]

    def kept(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for as long as this layout's lists are what they are.

        Where nobody could tell that they are (``launch.unchanged``), or whether it is there already (on another
        stream), it is made anew.

        Args:
            what: Names it.
            make: From the lists, without waiting for the device.
        """
        state = unchanged(self.kv_num, self.kv_idx)
        if state is None:
            return make()
        held: dict[Hashable, Any] = self.__dict__.setdefault("_held", {})
        found = held.get(what)
        if found is None or found[0] != state:
            found = held[what] = (state, make())
        return found[1]

    def key_counts(self) -> Tensor:
        """Keys that exist in each key block: ``[B or 1, NK]`` int32."""
        sizes = _block_sizes(self.tokens_k, self.block_k, self.device).unsqueeze(0)
        return sizes if self.k_valid is None else torch.minimum(self.k_valid, sizes)

    def density(self) -> Tensor:
        """Computed query-key pairs over all pairs of existing tokens: 0-d float32, on the lists' device."""
        queries = _block_sizes(self.tokens_q, self.block_q, self.device).double()
        keys = self.key_counts().double()
        pairs = torch.einsum("bhij,i,bj->bh", self.to_mask().double(), queries, keys)
        return (pairs / (queries.sum() * keys.sum(-1, keepdim=True))).mean().float()

    def to_block_mask(self) -> BlockMask:
        """The same pattern for ``torch.nn.attention.flex_attention``."""
        from torch.nn.attention.flex_attention import BlockMask

        cols, width = self.num_k_blocks, self.kv_idx.shape[-1]
        idx = torch.nn.functional.pad(self.kv_idx, (0, cols - width)) if width < cols else self.kv_idx[..., :cols]
        idx = idx.contiguous()
        sizes: dict[str, Any] = dict(
            BLOCK_SIZE=(self.block_q, self.block_k), seq_lengths=(self.tokens_q, self.tokens_k)
        )
        if self.k_valid is None:
            # Whole blocks: FlexAttention itself stops at the end of the sequence.
            return BlockMask.from_kv_blocks(torch.zeros_like(self.kv_num), idx, self.kv_num, idx, **sizes)
        valid, block = self.k_valid, self.block_k

        def exists(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k % block < valid[b if valid.shape[0] > 1 else 0, k // block]

        return BlockMask.from_kv_blocks(self.kv_num, idx, mask_mod=exists, **sizes)

    @classmethod
    def from_block_mask(cls, mask: BlockMask, *, partial: str = "reject") -> BlockLayout:
        """From FlexAttention's ``BlockMask`` (this waits for the device).

        Args:
            mask: The pattern.
            partial: What to do with blocks that a ``mask_mod`` cuts further, which lists cannot express: ``"reject"``
                them, or ``"include"`` them whole.

        Raises:
            ValueError: If there are such blocks and ``partial`` is ``"reject"``.
        """
        if partial not in ("reject", "include"):
            raise ValueError(f"partial must be 'reject' or 'include'; got {partial!r}")
        (tokens_q, tokens_k), (block_q, block_k) = mask.seq_lengths, mask.BLOCK_SIZE
        sizes: dict[str, Any] = dict(block_q=block_q, block_k=block_k)

        def blocks(num: Tensor, idx: Tensor) -> Tensor:
            return cls(num, idx, tokens_q, tokens_k, **sizes, check=False).to_mask()

        cut = blocks(mask.kv_num_blocks, mask.kv_indices)
        if partial == "reject" and bool(cut.any()):
            raise ValueError(
                "this BlockMask has partial blocks, whose mask_mod a list of blocks cannot express; pass "
                "partial='include' to compute them whole, or mark them full"
            )
        if mask.full_kv_num_blocks is not None:
            assert mask.full_kv_indices is not None
            cut = cut | blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
        return cls.from_mask(cut, tokens_q, tokens_k, **sizes)
