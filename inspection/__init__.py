"""sample.py --inspect: one HTML page that shows how the model reads a prompt."""
