"""``cpt merge``: merges adapters into their base model, and writes the whole model with its tokenizer.

    cpt merge runs/dpo --output runs/dpo-merged

Weights are merged in fp32 on the CPU (4 bytes of memory per parameter), rounded once to --dtype, and written to a
temporary folder. This becomes --output only if the merged model gives the logits of the model with adapters, within
rounding, on a few tokens, and if the files, loaded again, hold the merged weights. A head that shared its weight with
the embedding gets one of its own where the adapters change the two differently.

A base model that was quantized in training (QLoRA) is quantized in the same way and dequantized: the values that the
adapter was trained on are merged, not those before quantization.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.stores import local_folder
from ..errors import UserError
from ..files import check_writable
from .checkpoints import read_configs
from .console import print_results
from .models import find_tokenizer, is_path, load_named_tokenizer, quantization_config
from .parsing import DTYPES, Parser

# Options of cpt-train that decide how the base model was quantized. They are read from the configuration of the run.
_QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")


def main(argv: Sequence[str], prog: str = "cpt merge") -> None:
    """Merges adapters, and prints how far the merged model differs from the model with adapters."""
    args = _parser(prog).parse_args(argv)
    name, output = str(Path(local_folder(args.adapter)).expanduser()), args.output.expanduser()
    if not Path(name).is_dir():
        name = args.adapter
        if is_path(name):
            raise UserError(f"{name}: there is no such folder")
    check_output(output)
    # Imported after the options are checked, so that --help and mistakes are quick.
    from ..model.merging import choose_adapters, merge_and_save
    from ..model.pretrained import BaseModel, find_base

    hub = {"revision": args.model_revision} if args.model_revision else {}
    trust = {"trust_remote_code": args.trust_remote_code}
    kwargs = {**trust, **_quantization(args, name), **hub}
    adapters = choose_adapters(name, args.adapters, **hub)
    base = BaseModel(args.base) if args.base else find_base(name, adapters, **hub)
    found = find_tokenizer(name, base.name)
    tokenizer = None if found is None else load_named_tokenizer(found, "adapter", **trust)
    merged = merge_and_save(
        name,
        output,
        adapters=adapters,
        tokenizer=tokenizer,
        base=base,
        saved_dtype=args.dtype,
        report=lambda line: print_results([], [line]),
        **kwargs,
    )

    dtype = str(merged.dtype).removeprefix("torch.")
    lines = [
        f"proven: logits differ from those of the model with adapters by at most {merged.difference:.1e} in fp32"
        f" (rounding explains {merged.bound:.1e}), and by {merged.rounding:.1e} when saved in {dtype}"
    ]
    if merged.untied:
        lines.append("the head has a weight of its own now: the adapters changed it differently from the embedding")
    if tokenizer is None:
        lines.append(f"no tokenizer is written: neither {name} nor {merged.base.name} has one")
    lines.append(f"written to {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    print_results([], lines)


def check_output(output: Path) -> None:
    """Raises UserError if the folder holds something, or cannot be written to."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already: choose another folder, or delete it")
    check_writable(next(folder for folder in output.absolute().parents if folder.exists()), f"--output {output}")


def _quantization(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained`` that quantize the base model as in training, if it was quantized."""
    configs = read_configs([name], None)
    run = next(iter(configs.values()), {})
    given = {option: value for option in _QUANTIZATION if (value := getattr(args, option)) not in (None, False)}
    values = {option: run[option] for option in _QUANTIZATION if option in run} | given
    if args.load_in_4bit and args.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other: leave one of them out")
    if args.load_in_4bit or args.load_in_8bit:
        values["load_in_4bit"], values["load_in_8bit"] = args.load_in_4bit, args.load_in_8bit
    if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        if given:
            raise UserError(f"--{next(iter(given))} has no effect without --load_in_4bit: leave it out")
        return {}
    from .options import ModelArguments  # imports transformers

    known = {field.name for field in fields(ModelArguments)} & {*_QUANTIZATION}
    dtype = run.get("dtype", ModelArguments.dtype)
    quantized = quantization_config(ModelArguments(**{n: v for n, v in values.items() if n in known}, dtype=dtype))
    bits = 4 if values.get("load_in_4bit") else 8
    source = "as given" if given else f"as {next(iter(configs))} says"
    print_results([], [f"the base model is quantized in {bits} bits, {source}, and dequantized"])
    return {"quantization_config": quantized, "dtype": dtype}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, usage=f"{prog} ADAPTER --output FOLDER [--option value ...]", description=__doc__)
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder or hub name of an adapter, such as the output_dir of cpt-train")
    add("--output", type=Path, required=True, metavar="FOLDER", help="new folder for the merged model")
    add("--adapters", nargs="+", metavar="NAME", help="those of several adapters to merge, together [the active ones]")
    add("--base", metavar="MODEL", help="folder or hub name of the base model [the one that the adapter names]")
    saved = "type of the saved weights; auto: that of the base model's config [auto]"
    add("--dtype", choices=DTYPES, default="auto", help=saved)
    add("--model_revision", metavar="NAME", help="branch, tag or commit of an adapter on the hub")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    group = parser.add_argument_group("Quantized base model [as training_config.yaml of the adapter says]")
    group.add_argument("--load_in_4bit", action="store_true", help="the adapter was trained on 4-bit weights")
    group.add_argument("--load_in_8bit", action="store_true", help="the adapter was trained on 8-bit weights")
    group.add_argument("--bnb_4bit_quant_type", choices=("nf4", "fp4"), help="4-bit data type [nf4]")
    group.add_argument("--use_bnb_nested_quant", action="store_true", help="the scales were quantized, too")
    return parser
