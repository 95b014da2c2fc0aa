"""Characters of Shakespeare on a CPU, as fast as possible: Muon, hashed n-grams, an untied head. About a minute."""

data = "shakespeare"
tokenizer = "char"
split = "tail"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128
positions = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
bias = False
tie_embeddings = False
max_ngram = 5
ngram_rows = 2**16

tokens_per_step = 6 * 128
max_steps = 1300
optimizer = "muon"
muon_steps = 3
learning_rate = 3e-3
schedule = "linear"
warmup_steps = 20

eval_interval = 250
eval_tokens = 20 * 768  # the whole val split at the end
log_interval = 50
sample_tokens = 200
