"""Characters of Shakespeare on a CPU: nanoGPT's documented laptop setting, for comparison. Minutes."""

data = "shakespeare"
tokenizer = "char"
split = "tail"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
dropout = 0.0

tokens_per_step = 12 * 64
max_steps = 2000
learning_rate = 1e-3
min_learning_rate = 1e-4
warmup_steps = 100
beta2 = 0.99

eval_interval = 250
eval_tokens = 20 * 768  # as many as nanoGPT samples; the whole val split at the end
log_interval = 50
sample_tokens = 200
