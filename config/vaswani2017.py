"""The decoder of "Attention Is All You Need" without cross-attention: base size and schedule, on Python's library."""

data = "python_stdlib"
tokenizer = "bpe"
vocab_size = 8192

n_layer = 6
n_head = 8
n_embd = 512
n_hidden = 2048
block_size = 256
positions = "sinusoidal"
scale_embeddings = True
norm_position = "post"
mlp = "relu"
dropout = 0.1

label_smoothing = 0.1
tokens_per_step = 96 * 256
max_steps = 100_000
schedule = "inverse_sqrt"
warmup_steps = 4000
learning_rate = 1 / (512 * 4000) ** 0.5  # the paper's formula at its peak: 0.0007
weight_decay = 0.0
beta2 = 0.98
adam_eps = 1e-9
grad_clip = None

eval_interval = 1000
eval_tokens = 2**17
