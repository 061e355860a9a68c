"""The Qwen3 forward over a slotted KV cache, in plain torch.

One call forwards the new tokens of many rows, packed; only attention sees rows, padded inside
groups of rows with a similar number of new tokens. All sizes are rounded up, so that few distinct
shapes occur: bfloat16 kernels are compiled per shape, which costs more than five calls of one.

Shapes: T new tokens of all rows, R rows of a group, Q most new tokens of a row in the group,
L longest live length in the group, S slots, C context, H hidden, N heads, K key-value heads,
D head size, V vocabulary, X rows whose next token is wanted. T, R, Q and L are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from services.rollout.qwen3_config import Qwen3Config
from services.rollout.qwen3_experts import mix, route
from services.rollout.qwen3_weights import DeviceWeights, LayerWeights
from services.rollout.routing_rows import RoutingRows

Ints = npt.NDArray[np.int64]

_TOKENS, _ROWS, _LENGTHS = 32, 16, 32
"""T (and Q above one), R (and X) and L are rounded up to multiples of these."""
_FEW_QUERIES = 8
"""Q of a group of short extensions."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows forwarded together: their new tokens lie end to end in the packed order."""

    slots_R: Ints
    starts_R: Ints
    """Tokens of the row already in the cache."""
    counts_R: Ints
    """New tokens of the row, at least one."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """What attention needs of a group, the same for every layer."""

    slots_R: torch.Tensor
    num_queries: int
    length: int
    mask: torch.Tensor
    """[R, 1, Q, 1, L]: 0 where the key is at or before the query, -inf elsewhere."""
    pad_RQ: torch.Tensor
    """Packed index of the token behind every padded query."""
    unpad: torch.Tensor
    """Padded query of each of the group's tokens, in packed order."""


class KvCache:
    """Keys and values of all slots, and of one more for what is only padding."""

    def __init__(self, config: Qwen3Config, slots: int, context: int, dtype: torch.dtype) -> None:
        shape = (slots + 1, config.num_kv_heads, context, config.head_dim)
        self.context = context
        self.spare_slot = slots
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]


class Qwen3Forward:
    """Computes next-token logits and extends the cache, and `routing` where it is given."""

    def __init__(
        self, weights: DeviceWeights, cache: KvCache, routing: RoutingRows | None = None
    ) -> None:
        config = weights.config
        self._config = config
        self._weights = weights
        self._cache = cache
        self._routing = routing
        # float32 angles by this very formula, then the cast: what the model was trained with.
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.arange(cache.context).float()[:, None] * (1.0 / config.rope_theta**half)
        cos, sin = angles.cos(), angles.sin()
        self._cos_CD = torch.cat((cos, cos), -1).to(weights.dtype)[:, None]
        self._sin_CD = torch.cat((-sin, sin), -1).to(weights.dtype)[:, None]

    @torch.inference_mode()
    def __call__(
        self, token_ids_T: Ints, groups: Sequence[RowGroup], wanted_X: Ints
    ) -> torch.Tensor:
        """Forward the new tokens and return logits[X, V], upcast to at least float32.

        Args:
            token_ids_T: packed, in the order of the groups and of the rows inside.
            groups: where they belong.
            wanted_X: packed indices of the tokens whose successor is to be sampled.
        """
        config, weights = self._config, self._weights
        num_tokens, num_wanted = len(token_ids_T), len(wanted_X)
        size = _rounded(num_tokens, _TOKENS)
        token_ids_T = _padded(token_ids_T, size)
        wanted_X = _padded(wanted_X, _rounded(num_wanted, _ROWS))
        slots_T = np.concatenate([np.repeat(g.slots_R, g.counts_R) for g in groups])
        slots_T = _padded(slots_T, size, self._cache.spare_slot)
        positions_T = _padded(np.concatenate([_positions(g) for g in groups]), size)
        attentions = self._attentions(groups)
        heads = np.arange(config.num_kv_heads)
        cells = (slots_T[:, None] * config.num_kv_heads + heads) * self._cache.context
        cells_TK = torch.from_numpy((cells + positions_T[:, None]).reshape(-1))
        positions = torch.from_numpy(positions_T)
        rotation = (
            self._cos_CD.index_select(0, positions),
            self._sin_CD.index_select(0, positions),
        )
        x_TH = F.embedding(torch.from_numpy(token_ids_T), weights.embed_VH)
        for index, layer in enumerate(weights.layers):
            normed = F.rms_norm(
                x_TH, (config.hidden_size,), layer.input_norm_H, config.rms_norm_eps
            )
            x_TH = x_TH + self._attend(index, layer, normed, rotation, cells_TK, attentions)
            normed = F.rms_norm(x_TH, (config.hidden_size,), layer.post_norm_H, config.rms_norm_eps)
            if layer.router_EH is None:
                gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
                x_TH = x_TH + F.linear(F.silu(gate).mul_(up), layer.down)
            else:
                # Padding goes to no expert: it would have weights read for nothing.
                slots, places = slots_T[:num_tokens], positions_T[:num_tokens]
                mixed = self._mix(index, layer, normed[:num_tokens], slots, places)
                x_TH[:num_tokens] += mixed
        x_XH = x_TH.index_select(0, torch.from_numpy(wanted_X))
        normed = F.rms_norm(x_XH, (config.hidden_size,), weights.final_norm_H, config.rms_norm_eps)
        logits_XV = F.linear(normed, weights.head_VH)[:num_wanted]
        return logits_XV if weights.dtype == torch.float64 else logits_XV.float()

    def _mix(
        self,
        index: int,
        layer: LayerWeights,
        x_NH: torch.Tensor,
        slots_N: Ints,
        positions_N: Ints,
    ) -> torch.Tensor:
        """Return what the experts make of N tokens, [N, H]; record which they were."""
        config = self._config
        assert layer.router_EH is not None
        weights_NK, experts_NK = route(
            x_NH, layer.router_EH, config.experts_per_token, renormalised=config.renormalised
        )
        if self._routing is not None:
            ordinal = config.expert_layers.index(index)
            self._routing.write(ordinal, slots_N, positions_N, experts_NK.numpy())
        return mix(x_NH, weights_NK, experts_NK, layer.gate_up, layer.down)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x_TH: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cells_TK: torch.Tensor,
        attentions: Sequence[_Attention],
    ) -> torch.Tensor:
        config = self._config
        num_heads, num_kv, size = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = F.linear(x_TH, layer.qkv)
        qk, v = qkv.view(len(x_TH), -1, size).split([num_heads + num_kv, num_kv], 1)
        qk = F.rms_norm(qk, (size,), None, config.rms_norm_eps) * layer.qk_norm
        cos, sin = rotation
        # addcmul would be one call less and is three times slower in bfloat16.
        qk = (qk * cos).add_(qk.roll(size // 2, -1).mul_(sin))
        q_TND, k_TKD = qk.split([num_heads, num_kv], 1)
        keys, values = self._cache.keys[index], self._cache.values[index]
        keys.view(-1, size).index_copy_(0, cells_TK, k_TKD.reshape(-1, size))
        values.view(-1, size).index_copy_(0, cells_TK, v.reshape(-1, size))
        mixed = [self._attend_group(group, q_TND, index) for group in attentions]
        missing = len(x_TH) - sum(len(part) for part in mixed)
        mixed.append(x_TH.new_zeros(missing, num_heads * size))
        return F.linear(torch.cat(mixed), layer.out)

    def _attend_group(self, group: _Attention, q_TND: torch.Tensor, index: int) -> torch.Tensor:
        """Return the attention's output for the tokens of one group, each [N D]."""
        config = self._config
        num_kv, per_kv, size = config.num_kv_heads, config.queries_per_kv, config.head_dim
        rows, queries, length = len(group.slots_R), group.num_queries, group.length
        q = q_TND.index_select(0, group.pad_RQ).view(rows, queries, num_kv, per_kv, size)
        q = q.transpose(1, 2).reshape(rows * num_kv, queries * per_kv, size)
        keys = self._cache.keys[index][:, :, :length].index_select(0, group.slots_R)
        values = self._cache.values[index][:, :, :length].index_select(0, group.slots_R)
        scores = torch.bmm(q, keys.view(-1, length, size).transpose(1, 2))
        scores.view(rows, num_kv, queries, per_kv, length).add_(group.mask)
        # Softmax in float32 at least, as in every training forward.
        high = torch.float64 if scores.dtype == torch.float64 else torch.float32
        shares = torch.softmax(scores, -1, dtype=high).to(scores.dtype)
        mixed = torch.bmm(shares, values.view(-1, length, size))
        mixed = mixed.view(rows, num_kv, queries, per_kv * size).transpose(1, 2)
        return mixed.reshape(rows * queries, -1).index_select(0, group.unpad)

    def _attentions(self, groups: Sequence[RowGroup]) -> list[_Attention]:
        attentions: list[_Attention] = []
        first = 0
        for group in groups:
            attentions.append(self._attention(group, first))
            first += int(group.counts_R.sum())
        return attentions

    def _attention(self, group: RowGroup, first: int) -> _Attention:
        """Lay a group out; `first` is the packed index of its first token."""
        most = int(group.counts_R.max())
        queries = most if most == 1 else _FEW_QUERIES
        queries = queries if most <= queries else _rounded(most, _TOKENS)
        longest = int((group.starts_R + group.counts_R).max())
        length = min(_rounded(longest, _LENGTHS), self._cache.context)
        rows = _rounded(len(group.counts_R), _ROWS)
        # A spare row attends to one key of the spare slot; its output is dropped.
        slots = _padded(group.slots_R, rows, self._cache.spare_slot)
        starts, counts = _padded(group.starts_R, rows), _padded(group.counts_R, rows, 1)
        ordinal_Q = np.arange(queries)
        # A padded query repeats the row's last one: its mask is valid, its output is dropped.
        ordinal_RQ = np.minimum(ordinal_Q, counts[:, None] - 1)
        hidden = np.arange(length) > (starts[:, None] + ordinal_RQ)[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._weights.dtype)
        mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
        firsts = first + np.cumsum(group.counts_R) - group.counts_R
        tokens_RQ = _padded(firsts, rows)[:, None] + ordinal_RQ
        real_RQ = ordinal_Q < _padded(group.counts_R, rows)[:, None]
        return _Attention(
            slots_R=torch.from_numpy(slots),
            num_queries=queries,
            length=length,
            mask=mask[:, None, :, None, :],
            pad_RQ=torch.from_numpy(tokens_RQ.reshape(-1)),
            unpad=torch.from_numpy(np.flatnonzero(real_RQ)),
        )


def score_sequences(
    weights: DeviceWeights, token_ids: Sequence[npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """Return per sequence [L] the log-prob of every token given those before it, the first 0.

    By the forward that samples, over a cache of its own; at least float32.
    """
    counts = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    if not counts.sum():
        return [np.zeros(0) for _ in token_ids]
    cache = KvCache(weights.config, len(counts), int(counts.max()), weights.dtype)
    forward = Qwen3Forward(weights, cache)
    order = np.flatnonzero(counts)  # a row has one token at least
    group = RowGroup(
        slots_R=order, starts_R=np.zeros(len(order), dtype=np.int64), counts_R=counts[order]
    )
    ids_T = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    logits_TV = forward(ids_T, [group], np.arange(len(ids_T)))
    logprobs_T = torch.zeros(len(ids_T), dtype=logits_TV.dtype)
    chosen = torch.from_numpy(ids_T[1:, None])
    logprobs_T[1:] = torch.log_softmax(logits_TV[:-1], -1).gather(-1, chosen).squeeze(-1)
    rows = np.split(logprobs_T.numpy(), np.cumsum(counts)[:-1])
    for row in rows:
        row[:1] = 0.0  # nothing predicts it; what stands there belongs to the row before
    return rows


def _positions(group: RowGroup) -> Ints:
    """Return the position of every new token of a group, packed."""
    firsts = np.cumsum(group.counts_R) - group.counts_R
    return np.arange(int(group.counts_R.sum())) + np.repeat(group.starts_R - firsts, group.counts_R)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(values: Ints, size: int, fill: int = 0) -> Ints:
    """Return `values` followed by `fill` up to `size`; np.pad takes ten times as long."""
    padded = np.full(size, fill, dtype=np.int64)
    padded[: len(values)] = values
    return padded
