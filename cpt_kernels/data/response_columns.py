"""Column names of the response files that ``cpt generate`` writes and ``cpt pairs`` and ``cpt eval`` read."""

RESPONSE_COLUMNS = ("prompt", "model", "response")
ALPACA_COLUMNS = ("instruction", "generator", "output")  # AlpacaEval's names, in the same order

# All names that each column may have, the preferred one first.
MODEL_NAMES = ("model", "generator", "model_name")
RESPONSE_NAMES = ("response", "output", "completion")
