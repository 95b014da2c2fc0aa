"""Characters of Shakespeare as well as a small plain model learns them on two CPU cores: 11 epochs in 19 minutes."""

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

tokens_per_step = 4096
max_steps = 2800
optimizer = "muon"
muon_steps = 3
learning_rate = 3e-3
schedule = "wsd"
warmup_steps = 50
weight_decay = 1.0  # the only regularizer
ema_half_life = 0.1

eval_interval = 200
eval_tokens = 2**15  # the whole val split at the end
log_interval = 50
sample_tokens = 200
