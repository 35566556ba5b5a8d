"""Substitutes for flash attention on a CPU: functions with the signatures of its releases, computed densely.

``forward`` and ``backward`` compute the same as the kernels, in any dtype. In particular, the backward uses the given
output and log-sum-exp, and ignores the gradient of the log-sum-exp. Arguments that the kernels refuse fail here.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

backwards: list[bool] = []  # for each backward that ran: whether it was to be deterministic
at_the_ends = True  # where causal masks are aligned; a test may plant the start


@torch.autocast("cpu", enabled=False)
def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap) -> tuple[Tensor, Tensor]:
    """Returns (output, (Hq, T) log-sum-exp)."""
    check(q, k, v, cu_q, cu_k, max_q, max_k)
    outputs, lses = [], []
    for rows, keys in segments(cu_q, cu_k):
        scores, _ = capped_scores(q[rows], k[keys], scale, causal, left, right, softcap)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse[..., None])
        outputs.append(torch.einsum("hqk,khd->qhd", weights, grouped(v[keys], q)))
        lses.append(lse)
    return torch.cat(outputs).to(q.dtype), torch.cat(lses, dim=1)


def backward(dout, q, k, v, out, lse, cu_q, cu_k, scale, causal, left, right, softcap) -> tuple[Tensor, Tensor, Tensor]:
    assert dout.shape == out.shape == q.shape and lse.shape == (q.shape[1], q.shape[0]) and dout.is_contiguous()
    assert lse.dtype == wide(q).dtype
    grads = [torch.zeros_like(wide(x)) for x in (q, k, v)]
    for rows, keys in segments(cu_q, cu_k):
        scores, slope = capped_scores(q[rows], k[keys], scale, causal, left, right, softcap)
        p = torch.exp(scores - lse[:, rows, None])
        d = (wide(dout[rows]) * wide(out[rows])).sum(-1).t()[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", wide(dout[rows]), grouped(v[keys], q)) - d) * slope * scale
        grads[0][rows] += torch.einsum("hqk,khd->qhd", ds, grouped(k[keys], q))
        grads[1][keys] += ungrouped(torch.einsum("hqk,qhd->khd", ds, wide(q[rows])), k)
        grads[2][keys] += ungrouped(torch.einsum("hqk,qhd->khd", p, wide(dout[rows])), v)
    return tuple(grad.to(q.dtype) for grad in grads)


def capped_scores(q, k, scale, causal, left, right, softcap) -> tuple[Tensor, Tensor]:
    """Returns (Hq, Q, K) scores, -inf where masked, and the derivative of the soft-cap."""
    scores = torch.einsum("qhd,khd->hqk", wide(q), grouped(k, q)) * scale
    slope = torch.ones_like(scores)
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped**2
    i = torch.arange(q.shape[0], device=q.device)[:, None]
    i = i + (k.shape[0] - q.shape[0] if at_the_ends else 0)  # the key that a query is aligned with
    j = torch.arange(k.shape[0], device=q.device)
    right = 0 if causal else right
    hidden = torch.zeros(len(i), len(j), dtype=torch.bool, device=q.device)
    if left is not None and left >= 0:
        hidden |= j < i - left
    if right is not None and right >= 0:
        hidden |= j > i + right
    return scores.masked_fill(hidden, -torch.inf), slope


def segments(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = ([slice(*ends) for ends in zip(cu.tolist(), cu.tolist()[1:])] for cu in (cu_q, cu_k))
    return list(zip(q, k))


def check(q, k, v, cu_q, cu_k, max_q, max_k) -> None:
    assert q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0 and all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[1] % k.shape[1] == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grouped(x: Tensor, q: Tensor) -> Tensor:
    return wide(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def ungrouped(grad: Tensor, x: Tensor) -> Tensor:
    return grad.unflatten(1, (x.shape[1], -1)).sum(2)


class Flash(torch.autograd.Function):
    """Autograd as in the public functions: the log-sum-exp has no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, deterministic, *scores):
        out, lse = forward(q, k, v, cu_q, cu_k, max_q, max_k, *scores)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.scores, ctx.deterministic = scores, deterministic
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        backwards.append(ctx.deterministic)
        return *backward(dout.contiguous(), *ctx.saved_tensors, *ctx.scores), *(None,) * 10


def _public(q, k, v, cu_q, cu_k, max_q, max_k, deterministic, *scores) -> tuple[Tensor, Tensor]:
    scale, *rest = scores
    return Flash.apply(
        q, k, v, cu_q, cu_k, max_q, max_k, deterministic, q.shape[-1] ** -0.5 if scale is None else scale, *rest
    )


def _write(gradients, *targets) -> None:
    for gradient, target in zip(gradients, targets):
        assert target.is_contiguous()
        target.copy_(gradient)


# --- flash_attn 2.x ---


def flash_attn_2_8() -> SimpleNamespace:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert dropout_p == 0 and alibi_slopes is None and block_table is None
        out, lse = _public(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, softmax_scale, causal,
            *window_size, softcap,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0 and not return_softmax
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right, softcap,
        )  # fmt: skip
        return out, lse, q.new_empty(0), q.new_zeros(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        backwards.append(deterministic)
        grads = backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left,
            window_size_right, softcap,
        )  # fmt: skip
        _write(grads, dq, dk, dv)
        return q.new_empty(0)

    return SimpleNamespace(**locals())


def flash_attn_2_5() -> SimpleNamespace:
    """Has no soft-cap. Its inner functions take the window as a pair, and also return the padded inputs."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), alibi_slopes=None, deterministic=False, return_attn_probs=False,
        block_table=None,
    ):  # fmt: skip
        assert dropout_p == 0
        return _public(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, softmax_scale, causal,
            *window_size, 0.0,
        )[0]  # fmt: skip

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        return_softmax, alibi_slopes=None, block_table=None,
    ):  # fmt: skip
        raise AssertionError("its results differ from those of 2.7 and later")

    def _flash_attn_varlen_backward(*args):
        raise AssertionError("its arguments differ from those of 2.7 and later")

    return SimpleNamespace(**locals())


def flash_attn_2_3() -> SimpleNamespace:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), return_attn_probs=False,
    ):  # fmt: skip
        raise AssertionError("its backward is never deterministic")

    return SimpleNamespace(**locals())


# --- flash_attn 3 ---


def flash_attn_3(always_returns_lse: bool = False) -> SimpleNamespace:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
        return_attn_probs=False,
    ):  # fmt: skip
        out, lse = _public(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, softmax_scale, causal,
            *window_size, softcap,
        )  # fmt: skip
        return (out, lse) if return_attn_probs or always_returns_lse else out

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None,
        leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
        softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right, softcap,
        )  # fmt: skip
        return out, lse, q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        backwards.append(deterministic)
        grads = backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal, window_size_left,
            window_size_right, softcap,
        )  # fmt: skip
        _write(grads, dq, dk, dv)
        return q.new_empty(0)

    return SimpleNamespace(**{k: v for k, v in locals().items() if callable(v)})


# --- flash_attn 4 ---


def flash_attn_4() -> SimpleNamespace:
    """Version 4.0.0b36, without the parameters after those used here. An unlimited window is None."""

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
        seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        score_mod=None, return_lse=False,
    ):  # fmt: skip
        assert qv is None and -1 not in window_size
        return _public(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, softmax_scale, causal,
            *window_size, softcap,
        )  # fmt: skip

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, num_splits=1, return_lse=False, out=None,
        lse=None,
    ):  # fmt: skip
        assert out is None and lse is None and return_lse
        found = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right, softcap,
        )  # fmt: skip
        return *found, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, dlse=None,
    ):  # fmt: skip
        backwards.append(deterministic)
        return backward(
            dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left,
            window_size_right, softcap,
        )  # fmt: skip

    return SimpleNamespace(**locals())


# --- PyTorch's operators ---


def torch_operators() -> SimpleNamespace:
    """The operators in ``torch.ops.aten``, with the arguments that torch 2.10 to 2.14 share."""

    def _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    ):  # fmt: skip
        assert dropout_p == 0 and not return_debug_mask
        out, lse = forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, window_size_left,
            window_size_right, None,
        )  # fmt: skip
        return out, lse, None, None, None

    def _flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout_p == 0 and rng_state.dtype == torch.uint64
        backwards.append(torch.get_deterministic_debug_mode() == 2)
        assert not backwards[-1] or not torch.utils.deterministic.fill_uninitialized_memory
        return backward(
            grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale, is_causal, window_size_left,
            window_size_right, None,
        )  # fmt: skip

    return SimpleNamespace(**locals())


def cudnn_operators() -> SimpleNamespace:
    """PyTorch's operators for cuDNN, with the arguments of torch 2.10 to 2.13."""

    def _cudnn_attention_forward(
        query, key, value, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, compute_log_sumexp, dropout_p=0.0,
        is_causal=False, return_debug_mask=False, *, scale=None,
    ):  # fmt: skip
        assert attn_bias is None and dropout_p == 0 and compute_log_sumexp and not return_debug_mask
        assert all(x.is_contiguous() for x in (query, key, value)) and query.shape[1] == key.shape[1]
        out, lse = forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, None, None, None
        )  # fmt: skip
        return out, lse.t()[..., None].contiguous(), cum_seq_q, cum_seq_k, max_q, max_k, None, None, None

    def _cudnn_attention_backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
        max_q, max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        assert attn_bias is None and dropout_p == 0 and philox_seed.numel() == philox_offset.numel() == 1
        assert logsumexp.shape == (*query.shape[:2], 1) and logsumexp.is_contiguous()
        backwards.append(False)
        return backward(
            grad_out, query, key, value, out, logsumexp[..., 0].t(), cum_seq_q, cum_seq_k, scale, is_causal, None,
            None, None,
        )  # fmt: skip

    return SimpleNamespace(**locals())
