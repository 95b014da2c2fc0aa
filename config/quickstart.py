"""A small byte-pair model that learns to write Python from the standard library. Three minutes on two CPU cores."""

data = "python_stdlib"
tokenizer = "bpe"
vocab_size = 2048

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256
positions = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
bias = False

budget_minutes = 3
tokens_per_step = 2048
optimizer = "muon"
muon_steps = 3
schedule = "wsd"
learning_rate = 3e-3
warmup_steps = 50
weight_decay = 0.1

eval_interval = 250
eval_tokens = 2**16
log_interval = 50
