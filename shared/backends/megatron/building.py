"""megatron-core's groups and model for a layout, from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shared.backends.megatron import core, cpu
from shared.backends.megatron.layers import RMSNorm, hidden_states_only, local_layer
from shared.backends.megatron.layout import Layout, Shape
from shared.backends.megatron.replay import replay_routing

SEED = 1
"""Of generators that megatron-core insists on; nothing draws from them, there is no dropout."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    layout: Layout
    tp: int
    pp: int
    ep: int
    data: int
    data_ranks: int

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return self.pp == 0

    @property
    def last(self) -> bool:
        """Whether it holds the head."""
        return self.pp == self.layout.pp - 1


def open_ranks(layout: Layout) -> Ranks:
    """Make megatron-core's groups, once per process.

    Raises:
        ValueError: the world does not divide, or another layout was opened before.
    """
    state = core.parallel_state
    data_ranks = layout.data_ranks(dist.get_world_size())
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        core.random.model_parallel_cuda_manual_seed(SEED)
    sizes = (
        state.get_tensor_model_parallel_world_size(),
        state.get_pipeline_model_parallel_world_size(),
        state.get_expert_model_parallel_world_size(),
    )
    if sizes != (layout.tp, layout.pp, layout.ep):
        raise ValueError(f"layout: this process already has tp, pp, ep of {sizes}")
    return Ranks(
        layout,
        tp=state.get_tensor_model_parallel_rank(),
        pp=state.get_pipeline_model_parallel_rank(),
        ep=state.get_expert_model_parallel_rank(),
        data=state.get_data_parallel_rank(),
        data_ranks=data_ranks,
    )


def transformer_config(shape: Shape, layout: Layout, dtype: torch.dtype, *, recompute: bool) -> Any:
    """Return megatron-core's configuration of the model."""
    moe: dict[str, Any] = {}
    if shape.num_experts:
        moe = {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_ffn_size,
            "moe_router_topk": shape.experts_per_token,
            # softmax over the chosen logits is softmax over all, renormalised
            "moe_router_pre_softmax": not shape.renormalise,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": core.HAVE_ENGINE,
        }
    if recompute:
        moe |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return core.config.TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=layout.sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the one for lengths that vary, experts or not
        # gradients are summed: the loss is already divided by the count of the whole step
        calculate_per_token_loss=True,
        use_cpu_initialization=not cpu.HAVE_CUDA,
        perform_initialization=False,
        bias_activation_fusion=cpu.HAVE_CUDA,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=cpu.HAVE_CUDA,
        **moe,
    )


def build_module(shape: Shape, ranks: Ranks, config: Any) -> Any:
    """Return this rank's stage, with weights undefined."""
    if core.HAVE_ENGINE:
        layer = core.specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=shape.num_experts or None,
            moe_grouped_gemm=bool(shape.num_experts),
            qk_layernorm=shape.qk_norm,
        )
        spec = layer
    else:
        layer = local_layer(core.specs, num_experts=shape.num_experts, qk_norm=shape.qk_norm)
        count = shape.num_layers // ranks.layout.pp
        spec = core.block.TransformerBlockSubmodules(
            layer_specs=[layer] * count, layer_norm=RMSNorm
        )
    with cpu.building():
        model = core.gpt.GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=shape.padded_vocab(ranks.layout.tp),
            max_sequence_length=shape.max_positions,
            pre_process=ranks.first,
            post_process=ranks.last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
        )
    hidden_states_only(model)
    _mark_shared_out(model)
    if shape.num_experts:
        _mark_experts(model)
        replay_routing(model)
    if cpu.HAVE_CUDA:
        model.cuda()
    cpu.name_types(list(model.parameters()))
    cpu.adapt()
    return model.train()


def with_gradients(module: Any, config: Any) -> Any:
    """Wrap a stage with the buffers in which gradients are summed over data-parallel ranks."""
    settings = core.distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        average_in_collective=False,
    )
    cpu.adapt()
    wrapped = core.distributed.DistributedDataParallel(
        config=config, ddp_config=settings, module=module
    )
    return wrapped.train()


def _mark_experts(model: Any) -> None:
    """Mark experts' parameters as the expert ranks', whatever the size of their groups.

    megatron-core marks them so where ep is above 1. With ep 1 it would sum their gradients over the
    data-parallel ranks alone, while the tensor-parallel ranks, of which each has whole experts and
    its own run of tokens, went apart. The second mark is that of `_mark_shared_out`: each of these
    ranks steps a part of its own.
    """
    for layer in model.decoder.layers:
        for parameter in layer.mlp.experts.parameters():
            for name in ("allreduce", "tensor_model_parallel"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
            setattr(parameter, "allreduce", False)  # noqa: B010
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010


def _mark_shared_out(model: Any) -> None:
    """Mark the parameters that tensor-parallel ranks share out, as initialising them would have.

    Without the mark the gradient's norm counts those of the first rank only, and clips by it.
    """
    dims = {"ColumnParallelLinear": 0, "RowParallelLinear": 1, "VocabParallelEmbedding": 0}
    for module in model.modules():
        kind = next((k for k in dims if k in type(module).__name__), None)
        weight = getattr(module, "weight", None)
        if kind is None or weight is None or getattr(weight, "tensor_model_parallel", False):
            continue
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(weight, name):
                delattr(weight, name)
        core.tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dims[kind], 1)
