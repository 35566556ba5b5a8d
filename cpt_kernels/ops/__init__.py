"""Operators of contrastive post-training, and the kernels behind them. They need torch alone.

``linear_preference``   hidden rows -> log-probs, loss and gradients, tile by tile; made of the passes in ``head``
``vocab_score``         one tile of logits -> log-probs of its targets, statistics and, in place, the vocab score
``pair_loss``           token log-probs -> completion log-probs -> one loss per pair -> one weight per completion
``attention``           causal attention over a packed row whose completions share their prompt
``gather``              gathers and segment sums with deterministic gradients
``backends``            how an operator chooses among its implementations: eager PyTorch, Triton, CUDA
"""
