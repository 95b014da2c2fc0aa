"""GPT-2 small (124M) on 10B tokens of web text, prepared as data/openwebtext with --tokenizer=gpt2. Needs a GPU."""

data = "openwebtext"
tokenizer = "gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

tokens_per_step = 2**19
max_steps = 19_073
learning_rate = 6e-4
min_learning_rate = 6e-5
warmup_steps = 700

eval_interval = 250
eval_tokens = 2**20
save_interval = 1000
