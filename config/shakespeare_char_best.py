"""Characters of Shakespeare as well as a small plain model learns them on a CPU: several epochs, regularized."""

data = "shakespeare"
tokenizer = "char"
split = "tail"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 256
positions = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
bias = False
dropout = 0.2

tokens_per_step = 4096
max_steps = 2200
optimizer = "muon"
muon_steps = 3
learning_rate = 3e-3
schedule = "wsd"
warmup_steps = 50
weight_decay = 0.3
ema_half_life = 0.1

eval_interval = 200
eval_tokens = 2**15  # the whole val split at the end
log_interval = 50
sample_tokens = 200
