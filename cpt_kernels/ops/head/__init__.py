"""The parts of ``linear_preference``, the head: hidden rows -> log-probs and loss.

``tiles``      options, pairs, and how rows are cut into tiles of logits
``passes``     the work over the tiles, without autograd
``units``      powers of two that keep the sums of gradients in range in fp16
``compiled``   the passes as ``torch.library`` operators, for ``torch.compile``
"""
