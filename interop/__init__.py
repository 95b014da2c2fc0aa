"""Models of other programs in, our models out: python -m interop import|export.

layouts.py (names and shapes of tensors) and classes.py (configs) say how each class of model maps to ours, both ways.
Importing: sources.py, gguf_source.py and nanogpt_source.py open what is given, importing.py makes a model folder of it.
Exporting: exporting.py writes a folder, with tokenizer_files.py, gguf_file.py and model_card.py, once proof.py has
compared logits and ids with the other program's.
"""
