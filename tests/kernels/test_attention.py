"""The reference attention and the Triton kernels against fp64 autograd of a masked softmax; the choice of back end."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from whet.kernels import attention as module
from whet.kernels import flash
from whet.kernels._triton import HAVE_TRITON
from whet.kernels.attention import Documents, Layout, Rows, attention, attention_backward

interpreter = pytest.mark.skipif(not HAVE_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter")

SCALE = 0.3
HEADS = [(4, 4), (6, 2), (3, 1)]
LAYOUTS = {
    "rows": Rows(3, 11),
    "one long row": Rows(1, 70),
    "rows of one": Rows(5, 1),
    "documents": Documents(torch.tensor([0, 1, 6, 19, 20, 59], dtype=torch.int32), 39),
    "equal documents": Documents(torch.tensor([0, 9, 18, 27, 31, 35], dtype=torch.int32), 9),
    "an empty document": Documents(torch.tensor([0, 0, 7, 7, 19], dtype=torch.int32), 12),
    "documents of one": Documents(torch.tensor([0, 1, 2, 3], dtype=torch.int32), 1),
}


def inputs(layout: Layout, heads: tuple[int, int] = (4, 2), width: int = 8, dtype=torch.float64) -> list[Tensor]:
    """dout, q, k, v."""
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads = heads
    return [
        torch.randn(sum(layout.lengths), h, width, generator=generator, dtype=torch.float64).mul(1.5).to(dtype)
        for h in (query_heads, query_heads, key_heads, key_heads)
    ]


def masked_softmax(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The plain formula over all tokens at once: out [T, H, d] and lse [H, T]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * SCALE
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    i = torch.arange(q.shape[0])
    document = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    distance = i[:, None] - i[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    s = s.masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", torch.softmax(s, -1), v), torch.logsumexp(s, -1)


def expected(given: list[Tensor], *rest) -> list[Tensor]:
    """out, lse, dq, dk, dv in fp64."""
    dout, *leaves = (x.double() for x in given)
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = masked_softmax(*leaves, *rest)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def found(given: list[Tensor], layout: Layout, window: int | None = None, softcap: float | None = None) -> list[Tensor]:
    dout, q, k, v = given
    options = {"scale": SCALE, "window": window, "softcap": softcap}
    out, saved = attention(q, k, v, layout, **options)
    return [out, saved[0], *attention_backward(dout, q, k, v, out, saved, layout, **options)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [((g - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("tile_bytes", [2**18, 4], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reference_is_the_masked_softmax_and_its_gradient(
    layout: Layout, heads: tuple[int, int], tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mask off by one, keys shared by the wrong heads, a cap without its derivative, a tile that loses the
    keys before it or the gradients of another, and documents that see each other."""
    monkeypatch.setitem(module.TILE_BYTES, "cpu", tile_bytes)
    given = inputs(layout, heads)
    for window, softcap in product((None, 1, 4, 17, 1000), (None, 1.5)):
        got, want = found(given, layout, window, softcap), expected(given, layout, window, softcap)
        for g, w in zip(got, want, strict=True):
            # absolute as well: with one key the softmax is constant, and dq and dk are nothing but rounding
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12, msg=lambda m: f"{window} {softcap} {m}")  # noqa: B023


def test_small_tiles_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the test above walking one tile only."""
    monkeypatch.setitem(module.TILE_BYTES, "cpu", 4)
    q = torch.empty(70, 4, 8)
    assert list(module._query_blocks(q, 70, 1, 20)) == [
        (0, 16, 0),
        (16, 32, 0),
        (32, 48, 13),
        (48, 64, 29),
        (64, 70, 45),
    ]
    assert list(module._spans(Rows(2, 35), q)) == [(0, 1, 35), (35, 1, 35)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_reference_computes_in_fp32_or_better(dtype: torch.dtype, softcap: float | None) -> None:
    """Catches scores or sums rounded to the storage dtype, results of another dtype, and overflow at large scores."""
    layout = LAYOUTS["documents"]
    given = inputs(layout, dtype=dtype)
    got, want = found(given, layout, 7, softcap), expected(given, layout, 7, softcap)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    limit = 2e-6 if dtype == torch.float32 else 2**-8
    assert max(errors(got, want)) < limit, errors(got, want)

    given[1] *= 300
    got, want = found(given, layout), expected(given, layout, None, None)
    assert max(errors(got[:2], want[:2])) < max(limit, 1e-4)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("layout", [Rows(3, 11), LAYOUTS["documents"]], ids=["rows", "documents"])
def test_slices_of_one_projection(layout: Layout) -> None:
    """Catches a view that takes q, k or v for contiguous, and results laid out in the projection's strides."""
    dout, *qkv = inputs(layout, (4, 2), 8, torch.float32)
    joined = torch.cat([x.flatten(1) for x in (*qkv, qkv[0])], dim=1)
    slices = [x.unflatten(1, (-1, 8)) for x in joined.split([32, 16, 16, 32], dim=1)][:3]
    wide = torch.cat([dout, dout], dim=1)[:, :4]
    assert not any(x.is_contiguous() for x in (wide, *slices))
    for a, b in zip(found([dout, *qkv], layout, 5, 2.0), found([wide, *slices], layout, 5, 2.0), strict=True):
        assert torch.equal(a, b)
        assert b.is_contiguous()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("layout", [Rows(5, 11), *LAYOUTS.values()], ids=["five rows", *LAYOUTS])
def test_documents_do_not_touch_each_other(layout: Layout, softcap: float | None) -> None:
    """Catches a tile, a sum or a mask that reaches over a document's boundary, in any bit."""
    given = inputs(layout, dtype=torch.float32)
    before = found(given, layout, 4, softcap)
    bounds = torch.tensor([0, *layout.lengths]).cumsum(0).tolist()
    for start, end in pairwise(bounds):
        others = torch.ones(bounds[-1], dtype=torch.bool)
        others[start:end] = False
        changed = [x.clone() for x in given]
        for x in changed:
            x[start:end] = torch.nan
        for a, b in zip(before, found(changed, layout, 4, softcap), strict=True):
            a, b = (x.T if x.dim() == 2 else x for x in (a, b))
            assert torch.equal(a[others], b[others])


def test_no_tokens() -> None:
    """Catches a walk over documents that stumbles where there are none."""
    for layout in (Rows(0, 8), Documents(torch.zeros(1, dtype=torch.int32), 0)):
        assert [x.shape[0] for x in found(inputs(layout), layout)] == [0, 4, 0, 0, 0]


def test_a_layout_of_other_tokens_is_refused() -> None:
    """Catches outputs left unwritten behind the last document."""
    _, q, k, v = inputs(Rows(3, 11))
    with pytest.raises(ValueError, match="the layout holds 22 tokens and q 33"):
        attention(q, k, v, Rows(2, 11), scale=1.0)


def test_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches work sent to a kernel that computes something else or refuses it: cuDNN knows no window here and heads of
    128 at most, FlashAttention no soft cap and heads of multiples of 8, and all of them 16 bits only."""

    def backend(layout: Layout, *, major=9, head=128, dtype=torch.bfloat16, window=None, softcap=None) -> str:
        monkeypatch.setattr(module, "_capability", lambda device: (major, 0))
        q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(64, 4, head), device="cuda")
        return module._backend(q, layout, module._effective(window, layout), softcap)

    monkeypatch.setattr(module, "_have_cudnn", lambda: True)
    monkeypatch.setattr(module, "HAVE_TRITON", True)
    monkeypatch.setattr(module, "flash4_takes", lambda q, capability: False)
    rows, ragged = Rows(2, 32), Documents(torch.tensor([0, 40, 64]), 40)
    assert backend(rows) == backend(rows, window=32) == backend(rows, head=96, dtype=torch.float16) == "cudnn"
    assert backend(rows, window=31) == backend(rows, major=8) == backend(rows, head=256) == "flash"
    assert backend(ragged) == backend(ragged, window=3) == backend(ragged, major=8, head=64) == "flash"
    assert (
        backend(rows, softcap=50.0) == backend(ragged, softcap=50.0, window=3) == backend(ragged, head=36) == "triton"
    )
    assert backend(rows, dtype=torch.float32) == backend(ragged, dtype=torch.float32, softcap=50.0) == "reference"
    assert backend(ragged, head=264) == backend(rows, major=7) == backend(Rows(64, 1)) == "reference"
    monkeypatch.setattr(module, "flash4_takes", lambda q, capability: capability == (9, 0))
    assert backend(rows) == backend(rows, window=31) == backend(ragged) == backend(ragged, head=256) == "flash4"
    assert backend(rows, softcap=50.0) == backend(ragged, head=36) == "triton"
    assert backend(Rows(64, 1)) == backend(rows, dtype=torch.float32) == "reference"
    assert (backend(rows, major=10), backend(ragged, major=8)) == ("cudnn", "flash")
    with monkeypatch.context() as patch:  # neither of the two keeps the order of its sums
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert backend(rows) == backend(rows, major=10) == backend(ragged) == "flash"
        assert backend(rows, softcap=50.0) == "triton"
    monkeypatch.setattr(module, "HAVE_TRITON", False)
    assert backend(rows, softcap=50.0) == "reference"


def interpreted(given: list[Tensor], layout: Layout, tiles: flash.Tiles, **options) -> list[Tensor]:
    """out, lse, dq, dk, dv of the kernels, under the interpreter, into memory that was poisoned."""
    dout, q, k, v = given
    bounds = layout.cu_seqlens if isinstance(layout, Documents) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_tiles", lambda *_: tiles)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)  # empty tensors are then full of NaN
        try:
            assert q.new_empty(2).isnan().all()
            out, lse = flash.flash_triton(q, k, v, bounds, layout.longest, **options)
            gradients = flash.flash_backward_triton(dout, q, k, v, out, lse, bounds, layout.longest, **options)
        finally:
            torch.use_deterministic_algorithms(False)
    return [out, lse, *gradients]


def strided(x: Tensor) -> Tensor:
    """The same numbers with foreign ones around each token's."""
    return torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=1)[
        :, x.shape[1] : -x.shape[1]
    ]


@interpreter
@pytest.mark.parametrize(
    "tiles", [flash.Tiles(16, 16, 4, 1), flash.Tiles(32, 16, 4, 1), flash.Tiles(16, 32, 4, 1)], ids=str
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 1.5), (5, 1.5), (20, None), (33, 1.5)])
def test_kernels_are_the_masked_softmax_and_its_gradient(
    window: int | None, softcap: float | None, tiles: flash.Tiles
) -> None:
    """Catches tiles skipped or walked past, masks off by one at the diagonal, the window's edge or a document's end,
    wrong heads, statistics of the wrong base, a cap without its derivative, and reads and writes outside of a tensor's
    own heads and columns (24 of 32)."""
    layout = Documents(torch.tensor([0, 1, 21, 21, 61, 77], dtype=torch.int32), 40)
    given = [strided(x) for x in inputs(layout, (2, 1), 24, torch.float32)]
    got = interpreted(given, layout, tiles, scale=SCALE, window=window, softcap=softcap)
    assert max(errors(got, expected(given, layout, window, softcap))) < 2e-6


@interpreter
@pytest.mark.parametrize(("heads", "width", "softcap"), [((3, 3), 16, None), ((6, 2), 64, 50.0), ((2, 1), 256, 30.0)])
def test_kernels_on_equal_rows(heads: tuple[int, int], width: int, softcap: float | None) -> None:
    """Catches starts of rows that have no cu_seqlens, and head sizes or groups other than the test's above."""
    layout = Rows(2, 35)
    given = inputs(layout, heads, width, torch.float32)
    got = interpreted(given, layout, flash.Tiles(32, 16, 4, 1), scale=SCALE, window=None, softcap=softcap)
    assert max(errors(got, expected(given, layout, None, softcap))) < 5e-6


@interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_kernels_keep_documents_apart() -> None:
    """Catches a tile that reads the next document, in any bit."""
    layout, tiles = Documents(torch.tensor([0, 20, 37, 60], dtype=torch.int32), 23), flash.Tiles(16, 16, 4, 1)
    given = inputs(layout, (2, 1), 16, torch.float32)
    changed = [x.clone() for x in given]
    for x in changed:
        x[20:37] = torch.nan
    others = torch.cat([torch.arange(20), torch.arange(37, 60)])
    before, after = (interpreted(x, layout, tiles, scale=SCALE, window=None, softcap=2.0) for x in (given, changed))
    for a, b in zip(before, after, strict=True):
        a, b = (x.T if x.dim() == 2 else x for x in (a, b))
        assert torch.equal(a[others], b[others])


def test_kernels_have_tiles_for_every_head_size() -> None:
    """Catches a head size or a device without tiles, or one padded to less than itself."""
    for width, memory in product((8, 64, 72, 96, 128, 200, 256), (101376, 166912, 232448)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "_shared_memory", lambda device, memory=memory: memory)
            padded = flash._padded(width)
            assert padded >= max(width, 16)
            for kernel in ("forward", "keys", "queries"):
                tiles = flash._tiles(kernel, padded, torch.device("cuda"))
                stay = {"forward": tiles.queries, "keys": 2 * tiles.keys, "queries": 2 * tiles.queries}[kernel]
                stream = 2 * (tiles.queries if kernel == "keys" else tiles.keys)
                # Hopper holds `stages` copies of what streams, Ampere one less
                copies = tiles.stages if memory > 200_000 else tiles.stages - 1
                assert (stay + copies * stream) * max(padded, 64) * 2 <= memory
