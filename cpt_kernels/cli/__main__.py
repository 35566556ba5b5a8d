"""``python -m cpt_kernels.cli`` is ``cpt``: for launchers such as torchrun."""

import sys

from . import main

sys.exit(main())
