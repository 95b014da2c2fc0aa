"""What both train.py and sample.py stand on: the check of one option, hardware, run directories, tokenizers."""
