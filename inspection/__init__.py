"""sample.py --inspect: an HTML page with the attention maps, scores and predictions of a prompt."""
