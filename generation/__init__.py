"""What sample.py is made of: options, the engine (ids → ids, batched and cached), sampling filters and stop rules."""
