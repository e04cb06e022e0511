"""A stand-in for FlashAttention 4, which needs a GPU."""

from __future__ import annotations

from torch import Tensor

from whet.kernels.attention import Documents, Layout, Rows, attention_backward_reference, attention_reference


class StandIn:
    """Its two functions as the reference computes them, in the shapes that it takes and gives."""

    def _flash_attn_fwd(self, q, k, v, *, return_lse, **options) -> tuple[Tensor, Tensor, None]:
        assert return_lse
        layout, scale, window, shape = self.read(q, options)
        out, lse = attention_reference(*(flat(x) for x in (q, k, v)), layout, scale=scale, window=window)
        return out.view(q.shape), lse.view(shape[1], *shape[::2]).transpose(0, 1) if q.dim() == 4 else lse, None

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, *, dq, dk, dv, **options) -> None:
        layout, scale, window, shape = self.read(q, options)
        assert lse.shape == shape
        lse = lse.transpose(0, 1).flatten(1) if q.dim() == 4 else lse
        given = (flat(x) for x in (dout, q, k, v, out))
        found = attention_backward_reference(*given, lse, layout, scale=scale, window=window)
        for out, x in zip((dq, dk, dv), found, strict=True):
            assert out.is_contiguous()
            out.copy_(x.view(out.shape))

    def read(self, q: Tensor, options: dict) -> tuple[Layout, float, int | None, tuple[int, ...]]:
        """The layout, scale and window, and the shape of lse."""
        assert options.pop("causal") is True
        scale, window = options.pop("softmax_scale"), options.pop("window_size_left", None)
        if window is not None:
            assert options.pop("window_size_right") == 0
            window += 1  # it counts the keys before the query's own
        if q.dim() == 4:
            assert options == {}
            return Rows(*q.shape[:2]), scale, window, (q.shape[0], q.shape[2], q.shape[1])
        bounds = options.pop("cu_seqlens_q")
        assert options.pop("cu_seqlens_k") is bounds
        assert options.pop("max_seqlen_q") == options.pop("max_seqlen_k")
        assert options == {}
        return Documents(bounds, int(bounds.diff().max())), scale, window, (q.shape[1], q.shape[0])


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x
