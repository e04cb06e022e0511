"""Attention's back ends on a GPU against the fp64 reference on the CPU, and against torch's own in the same 16 bits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from whet.kernels import attention as module
from whet.kernels import flash4
from whet.kernels.attention import Documents, Layout, Rows, attention, attention_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(params=["torch's", "flash4"])
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """cuDNN and FlashAttention 2, or FlashAttention 4 where it is installed."""
    if request.param == "torch's":
        monkeypatch.setattr(module, "flash4_takes", lambda q, capability: False)
    elif not (torch.cuda.get_device_capability()[0] == 9 and flash4.installed()):
        pytest.skip("needs Hopper and whet[flash4]")
    return request.param


def documents(lengths: list[int]) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda(), max(lengths))


LAYOUTS = {
    "rows": lambda: Rows(3, 200),
    "odd rows": lambda: Rows(2, 77),
    "one row": lambda: Rows(1, 513),
    "documents": lambda: documents([1, 130, 5, 64, 300, 1, 17]),
    "one document": lambda: documents([257]),
    "empty documents": lambda: documents([64, 0, 130, 3, 0, 0, 0]),  # a recorded pass has room for more than it holds
}


def inputs(layout: Layout, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """dout, q, k, v: q, k and v slices of one projection, dout the first heads of a wider gradient."""
    tokens, (query_heads, key_heads) = sum(layout.lengths), heads
    generator = torch.Generator(device="cuda").manual_seed(0)
    counts = [query_heads, key_heads, key_heads]
    joined = torch.randn(tokens, (sum(counts) + 1) * width, device="cuda", generator=generator).mul(1.5).to(dtype)
    q, k, v, _ = (x.unflatten(1, (-1, width)) for x in joined.split([n * width for n in (*counts, 1)], dim=1))
    dout = torch.randn(tokens, query_heads + 1, width, device="cuda", generator=generator).to(dtype)[:, :query_heads]
    return [dout, q, k, v]


def ours(given: list[Tensor], layout: Layout, **options) -> list[Tensor]:
    dout, q, k, v = given
    out, saved = attention(q, k, v, layout, **options)
    return [out, *attention_backward(dout, q, k, v, out, saved, layout, **options)]


def exact(given: list[Tensor], layout: Layout, **options) -> list[Tensor]:
    """The reference in fp64 on the CPU (tests/kernels/test_attention.py holds it against autograd)."""
    if isinstance(layout, Documents):
        layout = Documents(layout.cu_seqlens.cpu(), layout.longest)
    return ours([x.cpu().double() for x in given], layout, **options)


def peer(
    given: list[Tensor], layout: Layout, *, scale: float, window: int | None = None, softcap: float | None = None
) -> list[Tensor]:
    """SDPA, document by document; with a soft cap the plain formula in 16 bits, its softmax in fp32.

    Heads are filled up with zeros to a multiple of 8: with a mask SDPA would compute others in fp32, which no kernel
    in 16 bits comes near.
    """
    width = given[1].shape[-1]
    dout, *leaves = (x.detach().contiguous() for x in given)
    leaves = [x.requires_grad_() for x in leaves]
    parts = []
    for q, k, v in zip(*(x.split(layout.lengths) for x in leaves), strict=True):
        i = torch.arange(len(q), device="cuda")
        distance = i[:, None] - i[None, :]
        mask = (distance >= 0) & (distance < (window or len(q)))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        q, k, v = (pad(x.transpose(0, 1)[None], (0, -width % 8)) for x in (q, k, v))
        if softcap is None:
            causal = {"is_causal": True} if window is None else {"attn_mask": mask}
            out = scaled_dot_product_attention(q, k, v, scale=scale, **causal)
        else:
            scores = softcap * torch.tanh(q @ k.mT * (scale / softcap))
            weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1, dtype=torch.float32)
            out = weights.to(q.dtype) @ v
        parts.append(out[0].transpose(0, 1)[..., :width])
    out = torch.cat(parts)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(got: list[Tensor], peers: list[Tensor], want: list[Tensor], given: list[Tensor]) -> None:
    for name, g, p, w, like in zip(NAMES, got, peers, want, [given[1], *given[1:]], strict=True):
        assert (g.shape, g.dtype, g.stride(-1)) == (like.shape, like.dtype, 1), name
        mine, theirs = ((x.cpu().double() - w).norm() / w.norm() for x in (g, p))
        assert mine <= 1.1 * theirs, (name, mine.item(), theirs.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 16, 129])
@pytest.mark.parametrize(("heads", "width"), [((8, 8), 64), ((8, 2), 128), ((6, 1), 96), ((4, 2), 256)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_further_from_fp64_than_sdpa(
    layout, heads, width: int, window: int | None, dtype: torch.dtype, back_end: str
) -> None:
    """Catches wrong boundaries, windows, scales, grouped heads, strides or saved statistics, forward and backward."""
    if back_end == "flash4" and dtype == torch.float16 and width != 128:
        pytest.skip("every form of its kernels takes seconds to compile")
    layout = layout()
    given = inputs(layout, heads, width, dtype)
    options = {"scale": width**-0.5, "window": window}
    check(ours(given, layout, **options), peer(given, layout, **options), exact(given, layout, **options), given)


@pytest.mark.parametrize("window", [None, 50, 129])
@pytest.mark.parametrize(
    ("heads", "width", "softcap"),
    [((8, 4), 256, 50.0), ((4, 4), 128, 30.0), ((6, 1), 64, 2.0), ((4, 2), 96, 2.0), ((4, 2), 36, None)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_triton_is_no_further_from_fp64_than_torch(
    layout, heads, width: int, softcap: float | None, window: int | None
) -> None:
    """Catches what the interpreter cannot show of the kernels: 16-bit tiles, pipelined loads, shared memory."""
    layout = layout()
    given = inputs(layout, heads, width, torch.bfloat16)
    options = {"scale": width**-0.5, "window": window, "softcap": softcap}
    assert module._backend(given[1], layout, window, softcap) == "triton"
    check(ours(given, layout, **options), peer(given, layout, **options), exact(given, layout, **options), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1024])
def test_gemma_2_shapes(window: int | None, dtype: torch.dtype) -> None:
    """Catches tiles of heads of 256 that are right for short documents only."""
    layout = documents([1500, 48, 700])
    given = inputs(layout, (16, 8), 256, dtype)
    options = {"scale": 256**-0.5, "window": window, "softcap": 50.0}
    check(ours(given, layout, **options), peer(given, layout, **options), exact(given, layout, **options), given)


@pytest.mark.parametrize(
    "layout", [lambda: Rows(2, 2048), lambda: documents([700, 2048, 1300, 48])], ids=["rows", "ragged"]
)
def test_8b_shapes(layout, back_end: str) -> None:
    """Catches what only many tokens show: sums in 16 bits, and offsets."""
    layout = layout()
    given = inputs(layout, (32, 8), 128, torch.bfloat16)
    check(ours(given, layout, scale=0.1), peer(given, layout, scale=0.1), exact(given, layout, scale=0.1), given)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("layout", "window"), [("rows", None), ("rows", 50), ("documents", 50)])
def test_documents_do_not_touch_each_other(
    layout: str, window: int | None, softcap: float | None, back_end: str
) -> None:
    """Catches a kernel that reaches over a document's boundary, in any bit of the output."""
    layout = LAYOUTS[layout]()
    given = inputs(layout, (8, 2), 128, torch.bfloat16)
    options = {"scale": 0.1, "window": window, "softcap": softcap}
    before = ours(given, layout, **options)
    start, end = layout.lengths[0], sum(layout.lengths[:2])
    changed = [x.clone() for x in given]
    for x in changed:
        x[start:end] = x[start:end].flip(0) * 3
    after = ours(changed, layout, **options)
    assert not torch.equal(before[0][start:end], after[0][start:end])
    others = torch.ones(len(given[0]), dtype=torch.bool, device="cuda")
    others[start:end] = False
    assert torch.equal(before[0][others], after[0][others])


def test_nothing_waits_for_the_device(back_end: str) -> None:
    """Catches a look at the documents' lengths, or any other, in the fused back ends."""
    rows, ragged = Rows(3, 200), documents([64, 300, 17])
    for layout, window, softcap in product((rows, ragged), (None, 50), (None, 30.0)):
        given = inputs(layout, (8, 2), 128, torch.bfloat16)
        options = {"scale": 0.1, "window": window, "softcap": softcap}
        ours(given, layout, **options)
        fresh = layout if layout is rows else Documents(layout.cu_seqlens, layout.longest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(given, fresh, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("many", [9, 300])
def test_many_documents_in_a_recorded_pass(many: int, back_end: str) -> None:
    """Catches boundaries that are read when a pass is recorded instead of when it is replayed, whose documents are
    others, and a kernel of its own for hundreds of documents."""
    room, tokens = 2 * many, 8 * many
    q, k, v, dout = torch.randn(tokens, 4 + 2 + 2 + 4, 64, device="cuda").bfloat16().split((4, 2, 2, 4), dim=1)
    bounds = [torch.tensor([0, *lengths, *[0] * (room - len(lengths))]).cumsum(0).int().cuda()
              for lengths in ([8] * many, [3, 13, 8] * (many // 3))]  # fmt: skip
    ours([dout, q, k, v], Documents(bounds[0], 16), scale=0.1)
    layout = Documents(bounds[0].clone(), 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = ours([dout, q, k, v], layout, scale=0.1)
    layout.cu_seqlens.copy_(bounds[1])
    graph.replay()
    want = exact([dout, q, k, v], Documents(bounds[1], 13), scale=0.1)
    for name, x, w in zip(NAMES, found, want, strict=True):
        assert ((x.cpu().double() - w).norm() / w.norm()).item() < 1e-2, name


def test_the_output_of_cudnn_is_not_copied() -> None:
    """Catches an output in head order, which costs the block a copy a layer."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is taken from Hopper on")
    rows = Rows(3, 200)
    _, q, k, v = inputs(rows, (8, 2), 128, torch.bfloat16)
    heads = (module._by_row(x, rows).transpose(1, 2) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, True, False, scale=0.1)[0]
    assert out.transpose(1, 2).is_contiguous()
