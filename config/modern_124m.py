"""GPT-2's size with rotary positions, RMSNorm, QK-norm and SwiGLU on 10B tokens of data/fineweb_edu. Needs a GPU."""

data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 12
n_head = 12
n_embd = 768
n_hidden = 2048
block_size = 1024
positions = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
bias = False

tokens_per_step = 2**19
max_steps = 19_073
optimizer = "muon"
learning_rate = 1e-3  # by the rule in training/muon.py; not measured at this size
schedule = "wsd"
warmup_steps = 300

eval_interval = 250
eval_tokens = 2**20
save_interval = 1000
