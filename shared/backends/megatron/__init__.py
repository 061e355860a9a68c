"""The training-side model on megatron-core: tensor, pipeline, expert and data parallel."""
