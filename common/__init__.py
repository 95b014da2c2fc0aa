"""What train.py and sample.py share: the check of one option, hardware, run directories, tokenizers, downloads."""
