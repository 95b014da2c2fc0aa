"""Characters of Shakespeare: nanoGPT's GPU setting (10.6M parameters). Minutes on a GPU, a day on a CPU."""

data = "shakespeare"
tokenizer = "char"
split = "tail"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
bias = False
dropout = 0.2

tokens_per_step = 64 * 256
max_steps = 5000
learning_rate = 1e-3
min_learning_rate = 1e-4
warmup_steps = 100
beta2 = 0.99

eval_interval = 250
sample_tokens = 300
