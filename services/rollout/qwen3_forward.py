"""The Qwen3 forward over a slotted KV cache, in plain torch.

One call forwards the new tokens of many rows, packed without padding; only attention sees rows,
padded inside groups of rows with a similar number of new tokens.

Shapes: T new tokens of all rows, R rows of a group, Q most new tokens of a row in the group,
L longest live length in the group, S slots, C context, H hidden, N heads, K key-value heads,
G = N / K, D head size, F intermediate, V vocabulary, X rows whose next token is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from services.rollout.qwen3_config import Qwen3Config
from services.rollout.qwen3_weights import DeviceWeights, LayerWeights

Ints = npt.NDArray[np.int64]


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
    first: int
    """Packed index of the group's first token."""
    num_tokens: int
    num_queries: int
    length: int
    mask: torch.Tensor
    """[R, 1, Q, 1, L]: 0 where the key is at or before the query, -inf elsewhere."""
    pad_RQ: torch.Tensor | None
    """Packed index, within the group, per padded query; None when nothing is padded."""
    unpad_T: torch.Tensor | None


class KvCache:
    """Keys and values of all slots; a row owns one slot."""

    def __init__(self, config: Qwen3Config, slots: int, context: int, dtype: torch.dtype) -> None:
        shape = (slots, config.num_kv_heads, context, config.head_dim)
        self.context = context
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]


class Qwen3Forward:
    """Computes next-token logits and extends the cache."""

    def __init__(self, weights: DeviceWeights, cache: KvCache) -> None:
        config = weights.config
        self._config = config
        self._weights = weights
        self._cache = cache
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
        slots_T = np.concatenate([np.repeat(g.slots_R, g.counts_R) for g in groups])
        positions_T = np.concatenate([_positions(g) for g in groups])
        attentions = _attentions(groups, weights.dtype)
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
            gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
            x_TH = x_TH + F.linear(F.silu(gate).mul_(up), layer.down)
        x_XH = x_TH.index_select(0, torch.from_numpy(wanted_X))
        normed = F.rms_norm(x_XH, (config.hidden_size,), weights.final_norm_H, config.rms_norm_eps)
        logits_XV = F.linear(normed, weights.head_VH)
        return logits_XV if weights.dtype == torch.float64 else logits_XV.float()

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
        mixed = [
            self._attend_group(group, q_TND[group.first : group.first + group.num_tokens], index)
            for group in attentions
        ]
        return F.linear(torch.cat(mixed) if len(mixed) > 1 else mixed[0], layer.out)

    def _attend_group(self, group: _Attention, q_TND: torch.Tensor, index: int) -> torch.Tensor:
        """Return the attention's output of one group [T, N D]."""
        config = self._config
        num_kv, per_kv, size = config.num_kv_heads, config.queries_per_kv, config.head_dim
        rows, queries, length = len(group.slots_R), group.num_queries, group.length
        if group.pad_RQ is not None:
            q_TND = q_TND.index_select(0, group.pad_RQ)
        q = q_TND.view(rows, queries, num_kv, per_kv, size).transpose(1, 2)
        q = q.reshape(rows * num_kv, queries * per_kv, size)
        keys = self._cache.keys[index][:, :, :length].index_select(0, group.slots_R)
        values = self._cache.values[index][:, :, :length].index_select(0, group.slots_R)
        scores = torch.bmm(q, keys.view(-1, length, size).transpose(1, 2))
        scores.view(rows, num_kv, queries, per_kv, length).add_(group.mask)
        # Softmax in float32 at least, as in every training forward.
        high = torch.float64 if scores.dtype == torch.float64 else torch.float32
        shares = torch.softmax(scores, -1, dtype=high).to(scores.dtype)
        mixed = torch.bmm(shares, values.view(-1, length, size))
        mixed = mixed.view(rows, num_kv, queries, per_kv * size).transpose(1, 2)
        mixed = mixed.reshape(rows * queries, -1)
        return mixed if group.unpad_T is None else mixed.index_select(0, group.unpad_T)


def _positions(group: RowGroup) -> Ints:
    """Return the position of every new token of a group, packed."""
    firsts = np.cumsum(group.counts_R) - group.counts_R
    return np.arange(int(group.counts_R.sum())) + np.repeat(group.starts_R - firsts, group.counts_R)


def _attentions(groups: Sequence[RowGroup], dtype: torch.dtype) -> list[_Attention]:
    attentions: list[_Attention] = []
    first = 0
    for group in groups:
        attention = _attention(group, first, dtype)
        attentions.append(attention)
        first += attention.num_tokens
    return attentions


def _attention(group: RowGroup, first: int, dtype: torch.dtype) -> _Attention:
    counts, num_tokens = group.counts_R, int(group.counts_R.sum())
    queries = int(counts.max())
    length = int((group.starts_R + counts).max())
    ordinal_Q = np.arange(queries)
    # A padded query repeats the row's last one: its mask is valid, its output is dropped.
    ordinal_RQ = np.minimum(ordinal_Q, counts[:, None] - 1)
    position_RQ = group.starts_R[:, None] + ordinal_RQ
    hidden = np.arange(length) > position_RQ[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
    pad_RQ = unpad_T = None
    if num_tokens != len(counts) * queries:
        starts = np.cumsum(counts) - counts
        pad_RQ = torch.from_numpy((starts[:, None] + ordinal_RQ).reshape(-1))
        unpad_T = torch.from_numpy(np.flatnonzero(ordinal_Q < counts[:, None]))
    return _Attention(
        slots_R=torch.from_numpy(group.slots_R),
        first=first,
        num_tokens=num_tokens,
        num_queries=queries,
        length=length,
        mask=mask[:, None, :, None, :],
        pad_RQ=pad_RQ,
        unpad_T=unpad_T,
    )
