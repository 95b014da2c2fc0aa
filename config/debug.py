"""A tiny model for trying things out. Takes seconds."""

data = "python_stdlib"
tokenizer = "bytes"

n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
positions = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
bias = False

tokens_per_step = 16 * 32
max_steps = 50
learning_rate = 1e-2
warmup_steps = 5

eval_interval = 25
eval_tokens = 2**14
sample_tokens = 50
