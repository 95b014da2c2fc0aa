"""Names of options in other programs (nanoGPT, nanochat, llm.c, litgpt, Hugging Face), and what to write here.

A hint that ends in = is another name for the same thing in the same unit: the value that was given is appended.
"""

from errors import quote

# Script → what to write → the names that people bring.
_HINTS = {
    "train.py": {
        # ---- the run
        "--run=": (
            "out_dir output_dir run_dir save_dir log_dir logdir logging_dir run_name exp_name experiment name "
            "wandb_run_name"
        ),
        "--init_from=": "model_name_or_path pretrained pretrained_path finetune finetune_from weights",
        "--resume=": (
            "resume_from resume_from_checkpoint restore load load_from ckpt ckpt_path checkpoint checkpoint_path "
            "checkpoint_dir resume_dir"
        ),
        "the name of a preset alone, as in `python train.py modern_124m`, or --init_from=RUN for a run's weights": (
            "model model_type model_name"
        ),
        "--seed=": "random_seed manual_seed rng_seed data_seed",
        "--wandb=online or --wandb=offline": "wandb_log use_wandb log_to_wandb",
        "--tensorboard, --trackio or --wandb=offline": "report_to logger loggers tracker tracking log_with",
        "--tensorboard": "use_tensorboard tensorboard_log log_to_tensorboard tb",
        "--wandb_project=": "project project_name",
        "leave it out: checkpoints are always saved; --save_interval=STEPS says how often": (
            "always_save_checkpoint save_checkpoint save_strategy save_model do_save"
        ),
        "leave it out: the newest two checkpoints and the best one are kept; --keep_interval=STEPS keeps more": (
            "save_total_limit keep_checkpoints max_checkpoints load_best_model_at_end keep_last_n"
        ),
        "--keep_interval=": "milestone_interval milestones keep_every keep_every_n_steps permanent_interval",
        "--save_minutes=": "save_time checkpoint_minutes save_every_minutes train_time_interval",
        "--async_save=": "async_checkpoint async_mode async_checkpointing use_async_save",
        "--from=best or --from=step-N": "from_step resume_step resume_from_step resume_checkpoint load_step ckpt_step",
        "--save_interval=": "save_steps save_every save_freq checkpoint_interval checkpoint_every ckpt_interval",
        "--log_interval=": "logging_steps log_every log_every_n_steps log_freq logging_interval print_every",
        # ---- data
        "--data=": (
            "dataset dataset_name dataset_path dataset_dir data_path data_file data_root train_file train_data "
            "train_path text text_file corpus input input_file input_bin train_bin input_dir file filename path source"
        ),
        "--val_fraction=": (
            "val_split validation_split valid_fraction val_ratio val_size test_size test_split eval_split"
        ),
        "leave it out: the val split is a part of the same text; --val_fraction says how much": (
            "validation_file val_file val_data valid_file val_path eval_file test_file"
        ),
        "--lora_rank=": "lora_r lora_dim adapter_rank",
        "--lora_rank=N, a number such as 16": "lora use_lora peft use_peft adapter adapters",
        "leave it out: adapters are scaled by 32 / lora_rank": "lora_alpha lora_scale lora_scaling",
        "--keep_share=": "replay_share replay_ratio replay_fraction replay_rate rehearsal_ratio old_data_ratio",
        "--tokenizer=": "tokenizer_name tokenizer_path tokenizer_dir tokenizer_type tokenizer_model encoding_name",
        "leave it out: batches are read without worker processes": (
            "num_workers n_workers workers dataloader_num_workers pin_memory"
        ),
        # ---- length and batches
        "--max_steps=": (
            "max_iters max_iter iters iterations num_iterations n_iters num_iters steps num_steps n_steps train_steps "
            "training_steps num_train_steps total_steps train_iters num_optimizer_steps"
        ),
        "--max_steps=N, with N = epochs × tokens of the train split / tokens_per_step": (
            "epoch epochs num_epochs n_epochs max_epochs num_train_epochs train_epochs"
        ),
        "--max_steps=N, with N = max_tokens / tokens_per_step": "max_tokens total_tokens train_tokens",
        "--tokens_per_step=N, with N = batch_size × block_size × gradient_accumulation_steps": (
            "batch_size batch bs batchsize train_batch_size global_batch_size gradient_accumulation_steps grad_accum "
            "grad_accumulation_steps grad_accum_steps accumulate_grad_batches gradient_accumulation accum_steps "
            "accumulation_steps gradient_accumulation_iters"
        ),
        "--tokens_per_step=": "total_batch_size tokens_per_batch batch_tokens",
        "--micro_batch_size=N; a step is --tokens_per_step=N × block_size × gradient_accumulation_steps": (
            "device_batch_size per_device_train_batch_size per_gpu_train_batch_size per_device_batch_size "
            "mini_batch_size microbatch_size micro_batch"
        ),
        "--try=": "tries n_trials num_trials trials max_trials sweep tune",
        "--patience=": "early_stopping_patience early_stop_patience es_patience stopping_patience patience_epochs",
        "--patience=N: evaluations without a better val loss that end the run": (
            "early_stopping early_stop earlystopping early_stopping_rounds early_stopping_threshold stop_early"
        ),
        # ---- evaluation
        "--eval_tokens=N, with N = eval_iters × batch_size × block_size; none: the whole val split": (
            "eval_iters eval_max_iters val_max_steps val_batches eval_batches val_max_batches max_eval_samples "
            "eval_batch_size per_device_eval_batch_size"
        ),
        "--eval_interval=": (
            "eval_steps eval_every eval_freq evaluation_interval val_interval val_every val_loss_every sample_every "
            "val_check_interval sample_interval"
        ),
        "--eval_interval=STEPS": "eval_strategy evaluation_strategy do_eval",
        "--eval_only=": "evaluate eval evaluate_only",
        # ---- optimizer and schedule
        "--learning_rate=": "lr max_lr base_lr peak_lr alpha step_size matrix_lr embedding_lr",
        "--min_learning_rate=": "min_lr lr_min eta_min final_lr end_lr learning_rate_min",
        "--min_learning_rate=RATE, a rate and not a fraction of the learning rate": (
            "min_lr_ratio final_lr_frac lr_final_frac"
        ),
        "--max_steps=N, where cosine and linear end; for wsd --decay_steps=N": (
            "lr_decay_iters lr_decay_steps decay_iters warmdown_iters warmdown_ratio cooldown_steps t_max"
        ),
        "--schedule=cosine, linear, wsd, inverse_sqrt or constant": (
            "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type lr_decay_style decay_lr"
        ),
        "--warmup_steps=": "warmup_iters lr_warmup_steps warmup lr_warmup_iters num_warmup_steps warmup_iterations",
        "--warmup_steps=N, with N = warmup_ratio × max_steps": "warmup_ratio warmup_fraction",
        "--optimizer=": "optim optimizer_name optim_type opt",
        "--weight_decay=": "wd",
        "--grad_clip=": (
            "max_grad_norm clip clip_grad clip_grad_norm gradient_clip gradient_clip_val grad_norm_clip max_norm"
        ),
        "--beta1=": "adam_beta1",
        "--beta2=": "adam_beta2",
        "--adam_eps=": "adam_epsilon eps epsilon",
        "--label_smoothing=": "label_smoothing_factor",
        "--ema_half_life=0.1, a share of the steps done": "ema ema_decay use_ema swa weight_averaging model_ema",
        # ---- the model
        "--n_layer=": "n_layers num_layers num_layer num_hidden_layers layers depth n_blocks num_blocks",
        "--n_head=": "n_heads num_heads num_head num_attention_heads heads nhead",
        "--n_kv_head=": "num_key_value_heads n_kv_heads num_kv_heads kv_heads n_query_groups num_query_groups",
        "--n_embd=": (
            "hidden_size hidden_dim d_model dim model_dim emb_dim embed_dim embedding_dim embedding_size emb_size "
            "n_dim n_embedding n_embed width"
        ),
        "--n_hidden=": "intermediate_size d_ff ffn_dim ff_dim mlp_dim n_inner dim_feedforward ffn_hidden_size",
        "--block_size=": (
            "max_seq_len max_seq_length seq_len seq_length sequence_length sequence_len context_length context_len "
            "context_size context ctx ctx_len n_ctx n_positions max_position_embeddings max_length window_size"
        ),
        "--positions=learned, sinusoidal or rotary": (
            "position_embedding_type position_embeddings positional_encoding pos_encoding rotary rope use_rope"
        ),
        "--mlp=gelu, relu, relu2 or swiglu": "hidden_act activation activation_function act_fn mlp_type",
        "--norm=layernorm or --norm=rmsnorm": "norm_type norm_class rmsnorm layernorm use_rmsnorm",
        "--norm_eps=": "rms_norm_eps layer_norm_epsilon layer_norm_eps",
        "--tie_embeddings=": "tie_word_embeddings tie_weights weight_tying",
        "--dropout=": (
            "resid_pdrop embd_pdrop hidden_dropout hidden_dropout_prob dropout_rate dropout_prob p_dropout drop_rate"
        ),
        "--dropout=P, which leaves attention weights alone": "attn_pdrop attention_dropout attn_dropout",
        # ---- hardware
        "--dtype=bfloat16, float16 or float32": (
            "fp16 bf16 amp mixed_precision precision half use_amp torch_dtype float16 bfloat16 fp32"
        ),
        "--device=cpu, cuda or mps": (
            "use_cpu no_cuda cpu cuda use_gpu n_gpu accelerator device_type num_gpus n_gpu_layers ngl"
        ),
        "--compile=": "torch_compile use_compile",
        "leave it out: torchrun starts the processes (README, Many GPUs, many machines)": (
            "devices num_nodes num_processes nproc_per_node nnodes local_rank world_size"
        ),
        "--parallel=auto, ddp, fsdp or hsdp": "backend ddp fsdp deepspeed strategy distributed zero_stage",
        "--activation_checkpointing=true": (
            "gradient_checkpointing activation_checkpoint grad_checkpointing recompute checkpoint_activations"
        ),
        "--attention=auto, triton or sdpa": (
            "flash flash_attention use_flash_attention use_flash_attn attn_implementation"
        ),
        # ---- samples during training
        "--sample_prompt=": "prompt start",
        "--sample_tokens=": "max_new_tokens sample_length",
        "--sample_temperature=": "temperature",
    },
    "sample.py": {
        "--run=": (
            "model model_path model_dir model_name model_name_or_path out_dir output_dir ckpt ckpt_path ckpt_dir "
            "checkpoint_path checkpoint_dir weights load resume resume_from init_from run_dir"
        ),
        "--prompt=": "start start_text text input input_text seed_text context query prefix starting_text",
        "--prompt_file=": "input_file prompt_path start_file file",
        "--max_new_tokens=": (
            "max_tokens max_length length num_tokens n_tokens gen_length max_gen_len n_predict num_predict"
        ),
        "--min_new_tokens=": "min_length min_tokens",
        "--num_samples=": "num_return_sequences n samples num_sequences batch_size nsamples n_samples",
        "--temperature=": "temp sample_temperature",
        "--temperature=0 for the likeliest tokens, more to sample": "do_sample greedy sample num_beams beam_size",
        "--top_p=": "nucleus nucleus_p topp",
        "--top_k=": "topk",
        "--stop=": "stop_strings stop_sequences stop_words stop_sequence",
        "--repetition_penalty=": "repeat_penalty rep_penalty",
        "--seed=": "random_seed manual_seed sample_seed",
        "--interactive": "chat repl cli",
        "--novelty": "memorization memorisation copied plagiarism overlap",
        "--score=": "perplexity ppl eval eval_file eval_data evaluate score_file bits_per_byte bpb",
        "--device=cpu, cuda or mps": "gpu gpus",
        "--eval_stride=": "stride ppl_stride window_stride",
        "--output=jsonl or csv": "format output_format json csv",
        "--serve": "server web ui gradio api",
    },
    "prepare_data": {
        "--input=": (
            "data data_path data_file data_root dataset text text_file corpus input_file input_dir file files filename "
            "path source train_file"
        ),
        "--name=": "output output_dir out_dir dataset_name",
    },
}
HINTS = {
    script: {name: text for text, names in table.items() for name in names.split()} for script, table in _HINTS.items()
}

_PUBLISHED = "import it first: python -m interop import {} --download; then --init_from=models/{}"
INIT_FROM = {
    "scratch": "leave the flag out: a new run starts from random weights",
    "resume": "write --resume=RUN",
    **{name: _PUBLISHED.format(name, name) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}
"""What to do in place of nanoGPT's values of --init_from, which names a run here."""


def hint(script: str, name: str, value: str = "") -> str | None:
    """What to write in place of another program's option; None if the name is not known. value: as given."""
    name = name.replace("-", "_").lower().rpartition(".")[2]  # litgpt: --train.max_steps
    for owner in (script, *HINTS):
        if text := HINTS[owner].get(name):
            text = text + quote(value) if value and text.endswith("=") else text.removesuffix("=")
            text = text if text.startswith("leave") else f"write {text}"
            shared = script != "prepare_data" and text.startswith(("write --device", "write --dtype"))
            return text if owner == script or shared else f"in {owner}, {text}"
    return None
