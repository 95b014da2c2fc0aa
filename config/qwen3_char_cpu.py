"""Characters on a CPU: nanoGPT's loss in a tenth of its time, by a model of Qwen3's class. About 40 seconds."""

data = "shakespeare"
tokenizer = "char"
split = "tail"

n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 128
n_hidden = 512
block_size = 64
positions = "rotary"
rope_theta = 100.0
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
bias = False
tie_embeddings = False
first_attention = "recent"

tokens_per_step = 12 * 64
max_steps = 1000
optimizer = "muon"
learning_rate = 0.012
muon_learning_rate = 0.008
muon_momentum = 0.9
muon_steps = 3
beta1 = 0.8
schedule = "linear"
warmup_steps = 20
weight_decay = 0.0
compile = False  # takes longer than what it saves

eval_interval = 250
eval_tokens = 20 * 768  # the whole val split at the end
log_interval = 50
sample_tokens = 200
