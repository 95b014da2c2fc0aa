"""Trains a model that exists on your text, with a plan: low learning rate, few epochs. Give --init_from and --data."""

optimizer = "adamw"
