"""What train.py and sample.py share: option checks, hardware, weights, run directories, tokenizers, downloads."""
