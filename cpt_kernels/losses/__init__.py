"""Preference losses: pure functions of the log-probs of pairs, which need torch alone.

``functions.py`` holds the built-in losses and their table, ``options.py`` the options as fields of the configuration,
``ranges.py`` the values that they may have, ``transforms.py`` the changes of log-probs that many losses share, and
``build.py`` binds all of them into a :class:`Loss`.
"""

from .build import Loss, build_loss, loss_names, user_loss
from .functions import LOSSES, Builtin, loss_options
from .logps import PairLogps
from .options import LossOptions
from .transforms import F_DIVERGENCES

__all__ = [
    "F_DIVERGENCES",
    "LOSSES",
    "Builtin",
    "Loss",
    "LossOptions",
    "PairLogps",
    "build_loss",
    "loss_names",
    "loss_options",
    "user_loss",
]
