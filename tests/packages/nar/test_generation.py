from functools import partial

import pytest
import torch
from hone_core.errors import UnsupportedHardwareError
from hone_core.testing import assert_close, requires_gpu
from hone_nar.bench import check_draws
from hone_nar.generation import Decoding, GraphedDecoding, generate
from hone_nar.models import attach, tiny
from hone_nar.transformer import Pieces, compiled_pieces
from hone_visual_ar.sampling import Sampling

SAMPLING = Sampling(guidance=2.0, top_k=10, top_p=0.9)


def draw(model, labels, seeds, **options):
    sampling = options.pop("sampling", SAMPLING)
    condition = model.condition(torch.tensor(labels), guided=sampling.guidance != 1)
    return generate(model, condition, seeds=seeds, sampling=sampling, **options)


@pytest.mark.parametrize("kind", ["nar", "llamagen", "flashar", "video"])
def test_an_image_does_not_depend_on_its_company(kind):
    model = tiny(kind)
    both = draw(model, [3, 7], [11, 12])
    assert torch.equal(draw(model, [7], [12]), both[1:])
    assert not torch.equal(draw(model, [7], [13]), both[1:])
    assert not torch.equal(draw(model, [6], [12]), both[1:])


@pytest.mark.parametrize("kind", ["nar", "llamagen", "flashar", "video"])
def test_steps_on_fixed_buffers_can_be_repeated(kind):
    """What a graph replays: the same work on the same buffers, whatever was in them before."""
    model = tiny(kind)
    captured = []

    def capture(work):
        captured.append(work)
        return work

    run = GraphedDecoding(model, 2, sampling=SAMPLING, capture=capture)
    for labels, seeds in (([3, 7], [11, 12]), ([0, 1], [5, 6]), ([3, 7], [11, 12])):
        run.load(model.condition(torch.tensor(labels), guided=True), seeds)
        assert torch.equal(run.run(), draw(model, labels, seeds))
        assert run.passes == len(model.order.steps)
    assert len(captured) == len(model.order.steps)


def test_graphs_work_on_texts():
    model = tiny("nar", num_classes=None, cls_token_num=5, caption_dim=24)
    run = GraphedDecoding(model, 1, sampling=SAMPLING, capture=lambda work: work)
    for words in ([False, True, True, True, True], [False, False, False, False, True]):
        given = {"text": torch.randn(1, 5, 24), "words": torch.tensor([words])}
        run.load(model.condition(**given, guided=True), [4])
        wanted = generate(model, model.condition(**given, guided=True), seeds=[4], sampling=SAMPLING)
        assert torch.equal(run.run(), wanted)


KINDS = ["nar", "llamagen", "flashar", "video", "text"]
DTYPES = [torch.float32, torch.bfloat16]


def on_a_gpu(kind, dtype):
    """A model, and what gives the condition of a seed's batch of two."""
    options = {"num_classes": None, "cls_token_num": 5, "caption_dim": 24} if kind == "text" else {}
    model = tiny("nar" if kind == "text" else kind, **options).to("cuda", dtype)

    def given(seed):
        if kind != "text":
            return {"labels": torch.tensor([seed, 7], device="cuda")}
        words = torch.tensor([[False, seed > 0, True, True, True], [True] * 5])
        text = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return {"text": text.cuda(), "words": words.cuda()}

    return model, given


@requires_gpu()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_draw_what_steps_draw(kind, dtype):
    model, given = on_a_gpu(kind, dtype)
    runs = [Decoding(model, 2, sampling=SAMPLING), GraphedDecoding(model, 2, sampling=SAMPLING)]
    for seed in range(3):
        for run in runs:
            run.load(model.condition(**given(seed), guided=True), [seed, 5])
        eager, graphs = (run.run() for run in runs)
        assert torch.equal(eager, graphs)


@requires_gpu()
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:TensorFloat32")  # torch.compile's own
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_compiled_blocks_give_the_teacher_forced_logits(kind, dtype):
    """Of its own codes: it rounds otherwise than the uncompiled one, and may draw others."""
    model, given = on_a_gpu(kind, dtype)
    torch._dynamo.reset()
    compiled_pieces.cache_clear()
    run = GraphedDecoding(model, 2, sampling=Sampling(guidance=2.0), pieces=compiled_pieces())
    for seed in range(3):
        run.load(model.condition(**given(seed), guided=True), [seed, 5])
        codes = run.run()
        with torch.no_grad():
            without = model(codes, **given(seed), drop=torch.ones(2, dtype=torch.bool, device="cuda")).logits
            wanted = without + 2.0 * (model(codes, **given(seed)).logits - without)
        wanted = wanted[:, list(model.order.steps[-1])]
        error = float((run.logits - wanted).norm() / wanted.norm())
        assert error < (1e-4 if dtype == torch.float32 else 5e-2)


def test_a_graph_needs_a_gpu():
    with pytest.raises(UnsupportedHardwareError, match="needs a CUDA device"):
        GraphedDecoding(tiny(), 1, sampling=SAMPLING)


def test_draws_follow_the_distribution():
    """The first token of many seeds, by chi-square."""
    model, count = tiny("nar", vocab_size=8, grid=(1, 2)), 4000
    with torch.no_grad():
        wanted = model(torch.zeros(1, 2, dtype=torch.long), torch.tensor([3])).logits[0, 0].softmax(-1)
    drawn = draw(model, [3] * count, range(count), sampling=Sampling())[:, 0]
    found = torch.bincount(drawn, minlength=8).float()
    # 24.3 is passed by one in a thousand at 7 degrees of freedom.
    assert float(((found - count * wanted) ** 2 / (count * wanted)).sum()) < 24.3


def test_greedy_and_one_choice_do_not_draw():
    model = tiny()
    for sampling in (Sampling(greedy=True), Sampling(top_k=1)):
        assert torch.equal(draw(model, [3], [1], sampling=sampling), draw(model, [3], [2], sampling=sampling))


def test_guidance_ends_after_some_tokens():
    model = tiny()
    greedy = Sampling(guidance=4.0, greedy=True)
    full, none = draw(model, [3], [0], sampling=greedy), draw(model, [3], [0], sampling=Sampling(greedy=True))
    assert torch.equal(draw(model, [3], [0], sampling=greedy, guided_tokens=36), full)
    part = draw(model, [3], [0], sampling=greedy, guided_tokens=6)
    # Steps of 1, 2, 3 and 4 tokens are guided: when the fifth begins, 10 tokens are more than 6.
    ids = list(model.order.ids)
    assert torch.equal(part[:, ids[:10]], full[:, ids[:10]])
    assert not torch.equal(part, full)
    assert not torch.equal(part, none)


def test_what_does_not_go_together_is_refused():
    model = tiny()
    run = Decoding(model, 2, sampling=SAMPLING)
    with pytest.raises(ValueError, match="expected 2 images in 4 rows"):
        run.load(model.condition(torch.tensor([1, 2])), [0, 1])
    with pytest.raises(ValueError, match="as many seeds"):
        run.load(model.condition(torch.tensor([1, 2]), guided=True), [0])
    with pytest.raises(ValueError, match="have no scales"):
        Decoding(model, 2, sampling=Sampling(guidance=(1.0, 2.0)))


def test_compiled_pieces_are_made_once_for_all_blocks_and_steps():
    """By a backend that runs what was traced, so that no compiler is needed."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pieces = Pieces(*(torch.compile(piece, dynamic=True, backend=backend) for piece in Pieces()))
    model = tiny("nar", n_layer=4)
    run = Decoding(model, 2, sampling=SAMPLING, pieces=pieces)
    run.load(model.condition(torch.tensor([3, 7]), guided=True), [11, 12])
    assert torch.equal(run.run(), draw(model, [3, 7], [11, 12]))
    # Two pieces, of one token and of several.
    assert len(made) <= 4


@pytest.mark.parametrize("options", [{"fused": True}, {"few": 12}, {"few": 64, "fused": True}])
@pytest.mark.parametrize("kind", ["nar", "llamagen", "video"])
def test_fused_draws_and_passes_are_the_others(kind, options):
    model, sampling = tiny(kind), Sampling(guidance=2.0, temperature=0.8, top_k=10)
    runs = [Decoding(model, 2, sampling=sampling, guided_tokens=12, **given) for given in ({}, options)]
    for run in runs:
        run.load(model.condition(torch.tensor([3, 7]), guided=True), [11, 12])
    assert torch.equal(*(run.run() for run in runs))
    if "fused" in options:
        assert runs[1].logits is None
    else:
        assert_close(runs[1].logits, runs[0].logits)


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (5, 2)])
def test_passes_over_few_tokens_give_the_logits_of_texts(grid):
    """Of every step; rows of one text and two, padded by different lengths, and keys that heads share."""
    model = tiny("nar", num_classes=None, cls_token_num=5, caption_dim=24, grid=grid, n_kv_head=2)
    for words in ([[False, True, True, True, True]], [[False, False, False, False, True], [True] * 5]):
        images = len(words)
        given = {"text": torch.randn(images, 5, 24), "words": torch.tensor(words)}
        runs = [Decoding(model, images, sampling=Sampling(guidance=2.0), few=few) for few in (0, 64)]
        for run in runs:
            run.load(model.condition(**given, guided=True), list(range(images)))
        for step in range(len(model.order.steps)):
            with torch.no_grad():
                for run in runs:
                    run.step(step)
            assert_close(runs[1].logits, runs[0].logits)
        # All steps but the text's own are over few tokens.
        assert runs[1]._small == [False] + [True] * (len(model.order.steps) - 1)


def test_passes_over_few_tokens_are_of_plain_layers():
    wrong = [tiny("flashar"), *(tiny() for _ in range(4))]
    wrong[1].layers[1].feed_forward.w2 = torch.nn.Sequential(wrong[1].layers[1].feed_forward.w2)
    wrong[2].layers[0].attention_norm.register_forward_hook(lambda module, given, out: 2 * out)
    wrong[3].layers[1].forward = wrong[3].layers[1].forward
    wrong[4].layers[0].attention.wo.bias = torch.nn.Parameter(torch.ones(wrong[4].config.dim))
    for model in wrong:
        with pytest.raises(ValueError, match="of the published blocks, with plain linear layers"):
            Decoding(model, 1, sampling=SAMPLING, few=8)
    with pytest.raises(ValueError, match="few must be 0 to 64; got 65"):
        Decoding(tiny(), 1, sampling=SAMPLING, few=65)


def test_graphs_of_what_was_replaced_moved_or_mixed_otherwise_are_refused():
    def replace(model):
        model.layers[0].attention.wqkv = torch.nn.Sequential(model.layers[0].attention.wqkv)  # as a LoRA is put in

    def move(model):
        model.norm.weight.data = model.norm.weight.data.clone()  # as .to() does

    def swap(model):
        model.norm.weight = torch.nn.Parameter(model.norm.weight.data)

    for kind, options in ((GraphedDecoding, {"capture": lambda work: work}), (Decoding, {"few": 8})):
        for change in (replace, move, swap):
            model = tiny()
            run = kind(model, 1, sampling=Sampling(), **options)
            condition = model.condition(torch.tensor([3]))
            run.load(condition, [1])
            change(model)
            with pytest.raises(RuntimeError, match="replaced, wrapped or moved since this decoding was made"):
                run.load(condition, [1])
    model = tiny()
    run, condition = Decoding(model, 1, sampling=Sampling()), model.condition(torch.tensor([3]))
    replace(model)
    run.load(condition, [1])  # which calls what is there
    with attach(model, "right-only"):
        with pytest.raises(ValueError, match="mixes heads by 'average', and the model by 'right' by now"):
            run.load(condition, [1])
        Decoding(model, 1, sampling=Sampling(), kind="average").load(condition, [1])


@pytest.mark.parametrize("part", ["layers.1.feed_forward.w2", "layers.2.feed_forward.w2", "norm", "output"])
@pytest.mark.parametrize("kind", [Decoding, partial(GraphedDecoding, capture=lambda work: work)])
@pytest.mark.parametrize("fused", [False, True])
def test_values_that_are_not_finite_are_named(kind, part, fused):
    model = tiny()
    run = kind(model, 1, sampling=Sampling(top_k=10), fused=fused)
    run.load(model.condition(torch.tensor([3])), [1])
    run.run()
    model.get_submodule(part).weight.data[0] = torch.inf
    run.load(model.condition(torch.tensor([3])), [1])
    with pytest.raises(RuntimeError, match=r"not finite in torch\.float32"):
        run.run()


def test_a_model_in_training_mode_draws_nothing():
    with pytest.raises(ValueError, match="in training mode"):
        Decoding(tiny().train(), 1, sampling=Sampling())
    model = tiny()
    run, condition = Decoding(model, 1, sampling=Sampling()), model.condition(torch.tensor([3]))
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        run.load(condition, [1])


def test_what_is_not_fused_is_refused():
    for model, sampling in (
        (tiny("flashar"), Sampling()),
        (tiny(), Sampling(greedy=True)),
        (tiny(), Sampling(top_p=0.5)),
    ):
        with pytest.raises(ValueError, match="leave fused out for a gate, greedy or top_p"):
            Decoding(model, 1, sampling=sampling, fused=True)


@requires_gpu()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few", [0, 16, 64])
@pytest.mark.parametrize("kind", ["nar", "llamagen", "video", "text"])
def test_fused_draws_in_graphs_fall_on_their_uniforms(kind, dtype, few):
    model, given = on_a_gpu(kind, dtype)
    run = GraphedDecoding(model, 2, sampling=Sampling(guidance=2.0), fused=True, few=few)
    for seed in range(3):
        run.load(model.condition(**given(seed), guided=True), [seed, 5])
        codes = run.run()
        with torch.no_grad():
            without = model(codes, **given(seed), drop=torch.ones(2, dtype=torch.bool, device="cuda")).logits
            logits = without + 2.0 * (model(codes, **given(seed)).logits - without)
        check_draws("fused", codes, logits, run.uniforms_raster(), tolerance=1e-3 if dtype == torch.float32 else 0.1)


def test_temperature_divides_the_logits_and_draws_belong_to_places():
    model, seed = tiny(), 3
    runs = []
    for temperature in (1.0, 0.5):
        run = Decoding(model, 1, sampling=Sampling(guidance=2.0, temperature=temperature))
        run.load(model.condition(torch.tensor([3]), guided=True), [seed])
        with torch.no_grad():
            run.step(0)
        runs.append(run)
    assert torch.equal(runs[1].logits, 2 * runs[0].logits)
    # The uniform of a slot is that of its place in raster order, whatever the order of drawing.
    by_place = torch.rand(36, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(runs[0].uniform[0], by_place[list(model.order.ids)])
