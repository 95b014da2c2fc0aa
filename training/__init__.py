"""What train.py is made of: options, data order and loader, optimizers and schedules, evaluation, budget, metrics and
report."""
