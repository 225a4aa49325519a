"""Drawing grids step by step over fixed buffers, so that each step can be a CUDA graph.

Slots lie in the order in which they are drawn: a step reads the prefix of the cache and writes the slice after it, and
no mask is needed but for the padding of texts. Everything of a run is in ``Decoding``, nothing on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from hone_core.errors import UnsupportedHardwareError
from hone_kernels.draw_codes import draw_codes
from hone_kernels.few_tokens import TOKENS
from hone_visual_ar.sampling import Sampling, draw, uniforms
from torch import Tensor

from .config import Mix
from .few import is_plain, run_few
from .method import guide, mask_of
from .transformer import Condition, NARTransformer, Pieces, slot_ids

__all__ = ["Decoding", "GraphedDecoding", "generate", "graphed"]

Capture = Callable[[Callable[[], None]], Callable[[], None]]


class _Parts:
    """Layers and weights of a model as they are now, which graphs go on to read where they lie."""

    def __init__(self, model: Any) -> None:
        places = [place for module in model.modules() for place in (module._modules, module._parameters)]
        self._links = [(place, name, part) for place in places for name, part in place.items()]
        self._addresses = [(weight, weight.data_ptr()) for weight in model.parameters()]

    def stand(self) -> bool:
        """Whether none was replaced, wrapped or moved."""
        return all(place.get(name) is part for place, name, part in self._links) and all(
            weight.data_ptr() == address for weight, address in self._addresses
        )


def _single_values(sampling: Sampling) -> tuple[float, float]:
    """Strength of guidance, and temperature.

    Raises:
        ValueError: Guidance or temperature are given per scale, which these models do not have.
    """
    if not isinstance(sampling.guidance, float | int) or not isinstance(sampling.temperature, float | int):
        raise ValueError("these models have no scales; give guidance and temperature one value each")
    return float(sampling.guidance), float(sampling.temperature)


def _check_eval(model: Any) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes what is drawn; call its eval()")


def _fuses(model: Any, sampling: Sampling) -> bool:
    return type(model).mixed is NARTransformer.mixed and not sampling.greedy and sampling.top_p <= 0


class Decoding:
    """Buffers of batches of one size, and the steps that fill them.

    Args:
        model: Of images or clips.
        images: Of a batch.
        sampling: How tokens are drawn.
        kind: How heads are mixed; None: as ``attach`` says, or their average.
        guided_tokens: Guidance ends once more tokens than this are drawn; None: never.
        pieces: What blocks run, such as ``compiled_pieces()``.
        fused: Average, guide and draw by one kernel, ``hone_kernels.draw_codes``, whose sums round in another order.
        few: Passes over at most so many tokens, all rows counted, take seven launches a block (``few.run_few``), whose
            sums round in another order; ``few_tokens.TOKENS`` at most.

    Attributes:
        tokens: ``[B, tokens]`` codes in slots, drawn so far.
        logits: Of the last step, guided, ``[B, n, vocabulary]``; None where draws are fused.
        passes: Forwards of the model so far.

    Raises:
        ValueError: The model is in training mode; draws are fused of a model with a gate, or greedy or by top-p; or
            ``few`` is out of range, or given with a model that it is not made for.
    """

    def __init__(
        self,
        model: Any,
        images: int,
        *,
        sampling: Sampling,
        kind: Mix | None = None,
        guided_tokens: int | None = None,
        pieces: Pieces | None = None,
        fused: bool = False,
        few: int = 0,
    ) -> None:
        self.pieces, self.fused, self.few = pieces, fused, few
        _check_eval(model)
        if not 0 <= few <= TOKENS:
            raise ValueError(f"few must be 0 to {TOKENS}; got {few}")
        if few and not is_plain(model):
            raise ValueError(
                "passes over few tokens are of the published blocks, with plain linear layers; merge or take off what "
                "was added to them, or leave few out"
            )
        if fused and not _fuses(model, sampling):
            raise ValueError(
                "the fused kernel averages heads, cuts by top_k and draws; leave fused out for a gate, greedy or top_p"
            )
        self.model, self.images, self.sampling, self.guided_tokens = model, images, sampling, guided_tokens
        self.strength, self._temperature = _single_values(sampling)
        self.guided = self.strength != 1
        self.rows, device = images * (1 + self.guided), model.tok_embeddings.weight.device
        self._asked, self.kind = kind, model.mixing(kind)
        self.plan = model.plan(kind, device)
        self._parts = _Parts(model) if few else None
        self.cache = model.new_cache(self.rows)
        count, start = model.tokens, model.cls_token_num
        self.tokens = torch.zeros(images, count, dtype=torch.long, device=device)
        self.uniform = torch.zeros(images, count, device=device)
        self.embedding = torch.zeros(
            self.rows,
            start,
            model.tok_embeddings.weight.shape[1],
            device=device,
            dtype=model.tok_embeddings.weight.dtype,
        )
        self.mask: Tensor | None = None
        self.words: Tensor | None = None
        if model.num_classes is None:
            shape = (self.rows, 1, start + count, start + count)
            self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
            self.words = torch.zeros(self.rows, start, dtype=torch.bool, device=device)
        self._first = mask_of(model.order, start, device)[:start, :start]
        self.starts = model.order.starts
        # Sources of a step as places among the tokens of the step before, and the same weights for every row.
        self._sources, self._small = [], []
        for step in range(len(model.order.steps)):
            begin, end = self.starts[step], self.starts[step + 1]
            before = start + self.starts[step - 1] if step else 0
            count = self.starts[step] - self.starts[step - 1] if step else start
            self._sources.append((self.plan.source[begin:end] - before).clamp(min=0))
            # A text is causal, and all others see each other.
            self._small.append(self.rows * count <= few and (step > 0 or start == 1))
        self.logits: Tensor | None = None
        self._unmixed: Sequence[Tensor] = ()  # logits of the last step's heads, where draws are fused
        self.passes = 0

    @torch.no_grad()
    def load(self, condition: Condition, seeds: Sequence[int]) -> None:
        """Put in the condition of a batch and the draws of its images' seeds.

        Raises:
            ValueError: There are not as many rows or seeds as images, or the model mixes its heads otherwise by now, or
                is in training mode.
            RuntimeError: What graphs or ``few`` were made of was replaced or moved.
        """
        _check_eval(self.model)
        if self.model.mixing(self._asked) != self.kind:
            raise ValueError(
                f"this decoding mixes heads by {self.kind!r}, and the model by {self.model.mixing(self._asked)!r} by "
                "now; make another after attach or detach"
            )
        if self._parts is not None and not self._parts.stand():
            raise RuntimeError(
                "layers or weights of the model were replaced, wrapped or moved since this decoding was made; make "
                "another"
            )
        if condition.images != self.images or len(condition.embedding) != self.rows or len(seeds) != self.images:
            raise ValueError(
                f"expected {self.images} images in {self.rows} rows and as many seeds; got {condition.images}, "
                f"{len(condition.embedding)} and {len(seeds)}"
            )
        self.embedding.copy_(condition.embedding)
        ids = slot_ids(self.model.order, self.tokens.device)
        self.uniform.copy_(uniforms(seeds, self.model.tokens, 1, self.tokens.device)[:, ids, 0])
        if self.mask is not None and self.words is not None:
            assert condition.words is not None, "a text has words"
            self.words.copy_(condition.words)
            start = self.model.cls_token_num
            self.mask.copy_(mask_of(self.model.order, start, self.tokens.device, condition.words)[:, None])
        self.passes = 0

    def step(self, step: int) -> None:
        """One forward, and the draws of a step's tokens; reads and writes buffers alone."""
        model, start = self.model, self.model.cls_token_num
        if step == 0:
            x, begin = self.embedding, 0
        else:
            first, last = self.starts[step - 1], self.starts[step]
            begin = start + first
            x = model.tok_embeddings(self.tokens[:, first:last])
            x = torch.cat([x, x]) if self.guided else x
        each = self._heads(step, x, begin)
        first, last = self.starts[step], self.starts[step + 1]
        over = self.guided_tokens is not None and first > self.guided_tokens
        if self.fused:
            self._unmixed = each
            if self.guided and over:
                each = [logits[: self.images] for logits in each]
            self.tokens[:, first:last] = draw_codes(
                each,
                self.plan.weight[first:last],
                self.uniform[:, first:last],
                guidance=1.0 if over else self.strength,
                temperature=self._temperature,
                top_k=self.sampling.top_k,
            )
            return
        logits = model.mixed(each, self.plan.weight[first:last])
        if self.guided:
            conditional, unconditional = logits.split(self.images)
            logits = conditional if over else guide(conditional, unconditional, self.strength)
        self.logits = logits / self._temperature
        self.tokens[:, first:last] = draw(self.logits, self.uniform[:, first:last], self.sampling)

    def _heads(self, step: int, x: Tensor, begin: int) -> list[Tensor]:
        """Logits ``[R, n, vocabulary]`` of each head for a step's n tokens, of the tokens before them."""
        model, end = self.model, begin + x.shape[1]
        if self._small[step]:
            hidden = run_few(model, x, begin=begin, cache=self.cache, words=self.words)
        else:
            mask: Tensor | None
            if self.mask is not None:
                mask = self.mask[:, :, begin:end, :end]
            else:
                mask = self._first if step == 0 and model.cls_token_num > 1 else None
            hidden = model.run_blocks(x, begin=begin, mask=mask, cache=self.cache, pieces=self.pieces)
        return [
            model.head(head, state[:, self._sources[step][:, head]], wide=not self.fused)
            for head, state in enumerate(hidden)
        ]

    @torch.no_grad()
    def run(self, on_step: Callable[[int], None] | None = None) -> Tensor:
        """All steps.

        Args:
            on_step: Called after each with its number, such as to show what is there.

        Returns:
            Codes ``[B, tokens]`` in raster order.

        Raises:
            RuntimeError: The model's values are not finite.
        """
        for step in range(len(self.model.order.steps)):
            self.step(step)
            self.passes += 1
            if on_step is not None:
                on_step(step)
        return self._drawn()

    def _drawn(self) -> Tensor:
        # What goes into the last block stays there, of all passes; what comes out of it, of the last pass.
        kept = (self.cache.v[-1], *(self._unmixed if self.logits is None else (self.logits,)))
        if not bool(torch.stack([values.isfinite().all() for values in kept]).all()):
            raise RuntimeError(
                f"the model's values are not finite in {self.cache.v[-1].dtype}; take bfloat16 or float32, or look at "
                "its weights"
            )
        return self.raster()

    def raster(self) -> Tensor:
        """Codes ``[B, tokens]`` as they stand, in raster order."""
        return self.tokens[:, slot_ids(self.model.order, self.tokens.device).argsort()]

    def uniforms_raster(self) -> Tensor:
        """Uniforms ``[B, tokens]`` that codes are drawn by, in raster order."""
        return self.uniform[:, slot_ids(self.model.order, self.tokens.device).argsort()]


class GraphedDecoding(Decoding):
    """The same, each step captured once as a CUDA graph and replayed; arguments are those of ``Decoding``.

    Shapes differ between steps and never within one, so that there is a graph of each. ``load`` may put in another
    batch of the size, and refuses where weights or layers were moved, replaced or wrapped meanwhile. What else is
    switched on a module after the first run, such as its hooks, is not seen.

    Args:
        capture: Makes what repeats a step's work on the same buffers; a CUDA graph's capture unless given.

    Raises:
        UnsupportedHardwareError: The model is not on a CUDA device, and ``capture`` is not given.
    """

    def __init__(self, *args: Any, capture: Capture | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if capture is None and self.tokens.device.type != "cuda":
            raise UnsupportedHardwareError(
                "a graph for each step needs a CUDA device", f"the model is on {self.tokens.device}", "Decoding"
            )
        self._parts = _Parts(self.model)
        self._capture: Capture = capture or self._capture_graph
        self._replays: list[Callable[[], None]] = []
        self._pool: Any = None

    @torch.no_grad()
    def run(self, on_step: Callable[[int], None] | None = None) -> Tensor:
        """See the base class."""
        if not self._replays:
            # Libraries make their workspaces in a first run that is not captured.
            self._aside(lambda: Decoding.run(self))
            steps = range(len(self.model.order.steps))
            self._replays = [self._capture(partial(self.step, step)) for step in steps]
            self.passes = 0
        for number, replay in enumerate(self._replays):
            replay()
            self.passes += 1
            if on_step is not None:
                on_step(number)
        return self._drawn()

    def _aside(self, work: Callable[[], Any]) -> None:
        if self.tokens.device.type != "cuda":
            work()
            return
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)

    def _capture_graph(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = self._pool or graph.pool()
        return graph.replay


def graphed(
    model: Any,
    images: int,
    *,
    sampling: Sampling,
    guided_tokens: int | None = None,
    capture: Capture | None = None,
) -> GraphedDecoding:
    """A CUDA graph for each step, with the fused kernels that model and sampling allow; arguments of the class.

    Raises:
        UnsupportedHardwareError: As the class.
    """
    return GraphedDecoding(
        model,
        images,
        sampling=sampling,
        guided_tokens=guided_tokens,
        fused=_fuses(model, sampling),
        few=TOKENS if is_plain(model) else 0,
        capture=capture,
    )


@torch.no_grad()
def generate(
    model: Any,
    condition: Condition,
    *,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    kind: Mix | None = None,
    guided_tokens: int | None = None,
    on_step: Callable[[Decoding, int], None] | None = None,
) -> Tensor:
    """Draw codes ``[B, tokens]`` in raster order.

    Args:
        model: Of images or clips.
        condition: Of the images, with unconditional rows where the guidance is not 1.
        seeds: Of each image; an image does not depend on its company.
        sampling: How tokens are drawn.
        kind: How heads are mixed; None: as ``attach`` says, or their average.
        guided_tokens: Guidance ends once more tokens than this are drawn; None: never.
        on_step: Called after each step with the run and the step's number.

    Raises:
        ValueError: These do not go together.
    """
    run = Decoding(model, condition.images, sampling=sampling or Sampling(), kind=kind, guided_tokens=guided_tokens)
    run.load(condition, seeds)
    return run.run(None if on_step is None else lambda step: on_step(run, step))
