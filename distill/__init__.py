"""Knowledge distillation: training what is left of a compressed model to agree with the original.

One file a method (the file name is the method's key in recipes); ``losses.py`` holds the divergences, pure functions of
logits, ``features.py`` what compares hidden states. The training loop is the engine's: ``compress/train.py``.
"""
