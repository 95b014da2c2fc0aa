"""Text generation: sampling options, the batched engine with a KV cache (ids → ids), logits filters, stop strings."""
