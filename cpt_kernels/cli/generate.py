"""``cpt generate``: responses of one model to a set of prompts.

Responses are appended to the JSONL file of --output as they come, as rows of prompt, model and response, which
``cpt pairs`` reads. A run that was stopped or killed goes on where it was: what is answered is never asked again.

  cpt generate --model_name_or_path runs/sft --dataset_name prompts.jsonl --output responses.jsonl
  cpt generate --backend openai --base_url http://localhost:8000/v1 --model_name_or_path NAME ...
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from xxhash import xxh3_64

from ..data.preparation import Drop
from ..data.sources import load_data
from ..errors import UserError
from ..generation.endpoint import ENDPOINT_DEFAULTS, Endpoint, EndpointOptions
from ..generation.exports import ALPACA_FILE, check_exports, write_exports
from ..generation.prompts import Answer, Failure, Prompt, Request, Sampling, read_prompts
from ..generation.response_file import ResponseFile
from .models import from_pretrained, load_named_tokenizer
from .parsers import Help, Parser, add_endpoint_options, json_object

_BATCH_SIZE = {"transformers": 16, "vllm": 1024}
# What a model's responses depend on, of the files in its folder.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja")


def main(argv: Sequence[str], prog: str = "cpt generate") -> None:
    """Ask a model for what is missing of the responses, and say what came of it.

    Raises:
        UserError: options, data or a model that cannot be used, or responses that are missing in the end; the message
            says why.
    """
    args = _parse(argv, prog)
    dataset = load_data(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    prompts, dropped = read_prompts(dataset, args.prompt_column)
    unique = {prompt.key: prompt for prompt in prompts if prompt is not None}
    requests = [Request(prompt, sample) for prompt in unique.values() for sample in range(args.n)]
    _report_prompts(prompts, unique, dropped)
    model = args.model_label or args.model_name_or_path
    check_exports(args, model, dataset, unique.values())
    run = _Run(args, requests)
    with ResponseFile(args.output, model, run.sampling, run.origin) as file:
        run.answer(file)
        written = write_exports(args, file, dataset, prompts)
    print(f"written to {', '.join(map(str, [args.output, *written]))}")
    if run.failures:
        reason, detail = run.example
        raise UserError(
            f"{sum(run.failures.values())} of {len(requests)} responses are missing, one by {reason}: {detail};"
            " the same command asks for them again"
        )


class _Run:
    """The requests of a run, the backend that answers them, and a count of what happened."""

    def __init__(self, args: argparse.Namespace, requests: Sequence[Request]) -> None:
        self.args, self.requests = args, requests
        self.sampling = _sampling(args)
        self.origin: dict[str, Any] = {}
        if args.backend == "openai":
            options = {name: getattr(args, name) for name in ENDPOINT_DEFAULTS}
            self.endpoint = Endpoint(EndpointOptions(args.model_name_or_path, **options), self.sampling)
            self.origin["extra_body"] = json.dumps(args.extra_body, sort_keys=True)
        else:
            name, revision = ("model_name_or_path", args.model_revision)
            if args.tokenizer_name is not None:
                name, revision = "tokenizer_name", None
            self.tokenizer = load_named_tokenizer(
                getattr(args, name), name, revision=revision, trust_remote_code=args.trust_remote_code
            )
            if args.prompt_format == "auto" and self.tokenizer.chat_template is None:
                self.sampling = replace(self.sampling, chat=False)
            self.origin |= {"revision": args.model_revision, "weights": _digest(args.model_name_or_path)}
        texts = sum(isinstance(request.prompt.content, str) for request in requests)
        if self.sampling.system_prompt is not None and texts and not self.sampling.chat:
            raise UserError("system_prompt needs a conversation, but the prompts are text: give --prompt_format chat")
        if self.sampling.template_kwargs and texts == len(requests) and not self.sampling.chat:
            raise UserError(
                "chat_template_kwargs has no effect where prompts are continued as text: give --prompt_format chat"
            )
        if texts:
            print(
                "text prompts are", "a user's turn of the chat template" if self.sampling.chat else "continued as text"
            )
        self.answers = self.tokens = self.skipped = 0
        self.failures: Counter[str] = Counter()
        self.example: Failure | None = None
        self.seconds = 0.0

    def answer(self, file: ResponseFile) -> None:
        """Ask for what the file lacks. No model is loaded where it lacks nothing."""
        answered = {i for i, (prompt, sample) in enumerate(self.requests) if (prompt.key, sample) in file.answered}
        self.skipped = len(answered)
        if self.skipped < len(self.requests):
            backend = self._load_backend()
            started = time.perf_counter()
            try:
                # disable=None: no bar where there is no terminal.
                with tqdm(total=len(self.requests), initial=self.skipped, unit=" responses", disable=None) as bar:
                    backend.answer(self.requests, lambda results: self._record(results, file, bar), answered)
            finally:
                self.seconds = time.perf_counter() - started
                print(self.summary())
        else:
            print(self.summary())

    def _record(self, results: Sequence[tuple[int, Answer | Failure]], file: ResponseFile, bar: tqdm) -> None:
        new = [(self.requests[i], result) for i, result in results if isinstance(result, Answer)]
        file.add(new)
        self.answers += len(new)
        self.tokens += sum(answer.response_tokens or 0 for _, answer in new)
        for _, result in results:
            if isinstance(result, Failure):
                self.failures[result.reason] += 1
                self.example = self.example or result
        if self.failures:
            bar.set_postfix_str(f"{sum(self.failures.values())} failed", refresh=False)
        bar.update(len(results))

    def _load_backend(self) -> Any:
        args = self.args
        if args.backend == "openai":
            return self.endpoint
        from ..generation.local import LocalModel, VllmModel

        options = {"dtype": args.dtype, "revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        options |= args.model_kwargs
        batch_size = args.batch_size or _BATCH_SIZE[args.backend]
        if args.backend == "vllm":
            return VllmModel(args.model_name_or_path, self.tokenizer, self.sampling, batch_size, **options)
        return LocalModel(_load_local_model(args, options), self.tokenizer, self.sampling, batch_size)

    def summary(self) -> str:
        """How many were answered, skipped and failed, and how fast."""
        parts = [f"{self.answers} answered", f"{self.skipped} skipped (answered before)"]
        reasons = ", ".join(f"{count} by {reason}" for reason, count in self.failures.most_common())
        parts.append(f"{sum(self.failures.values())} failed{f' ({reasons})' if reasons else ''}")
        if self.answers:
            # An endpoint need not tell its tokens.
            count, unit = (self.tokens, "tokens") if self.tokens else (self.answers, "responses")
            parts.append(f"{count:,} {unit} in {self.seconds:.1f} s, {count / max(self.seconds, 1e-9):,.1f} a second")
        return "; ".join(parts)


def _report_prompts(
    prompts: Sequence[Prompt | None], unique: Mapping[str, Prompt], dropped: Mapping[str, Drop]
) -> None:
    drops = [f"dropped, {reason}: {drop}" for reason, drop in dropped.items()]
    if not unique:
        raise UserError("; ".join([f"no row of {len(prompts)} has a prompt", *drops]))
    print(f"{len(prompts)} rows, {len(unique)} different prompts", *drops, sep="\n")


# --- Models ---


def _sampling(args: argparse.Namespace) -> Sampling:
    # What is to stand beside completions is drawn as they are read in training, where text is text.
    chat = args.prompt_format == "chat" or (args.prompt_format == "auto" and not args.add_column)
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop=tuple(args.stop),
        seed=args.seed,
        chat=chat,
        system_prompt=args.system_prompt,
        template_kwargs=args.chat_template_kwargs,
    )


def _load_local_model(args: argparse.Namespace, options: Mapping[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = from_pretrained(AutoModelForCausalLM, args.model_name_or_path, "model_name_or_path", **options)
    if "device_map" in options:
        return model
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(args.device or accelerator or "cpu")


def _digest(name: str) -> str | None:
    """16 hex digits for the content of a model's folder, None for a name on the hub, which a revision identifies."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    digest = xxh3_64()
    for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# --- Options ---


def _seed(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


# Options that only some backends look at.
_OF_BACKENDS = {
    ("transformers",): ("device",),
    ("transformers", "vllm"): (
        *("model_revision", "tokenizer_name", "dtype", "batch_size", "model_kwargs", "trust_remote_code"),
        "chat_template_kwargs",
    ),
    ("openai",): tuple(ENDPOINT_DEFAULTS),
}


def _parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = _parser(prog)
    args = parser.parse_args(argv)
    for backends, names in _OF_BACKENDS.items():
        given = [name for name in names if getattr(args, name) != parser.get_default(name)]
        if given and args.backend not in backends:
            raise UserError(
                f"--{given[0]} has no effect with --backend {args.backend}, only with {' or '.join(backends)}"
            )
    if args.n > 1 and args.temperature == 0:
        raise UserError(f"--n {args.n} with --temperature 0 would give the same response {args.n} times")
    if args.device is not None and "device_map" in args.model_kwargs:
        raise UserError("--device and the device_map of --model_kwargs are two ways to say the same: leave one out")
    return args


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} --model_name_or_path MODEL --dataset_name DATA --output FILE [--option value ...]",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,
    )
    _add_prompt_options(parser.add_argument_group("What is asked"))
    _add_model_options(parser.add_argument_group("Which model"))
    _add_sampling_options(parser.add_argument_group("How it is sampled"))
    add_endpoint_options(parser.add_argument_group("The endpoint (--backend openai)"))
    _add_output_options(parser.add_argument_group("What is written"))
    return parser


def _add_prompt_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset_name", required=True, metavar="DATA", help="file, folder or hub name")
    add("--dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset_split", metavar="NAME", help="split, such as test or train[:100] [train]")
    add(
        "--prompt_column",
        metavar="NAME",
        help="column of the prompts [what comes before chosen and rejected, else prompt, instruction or messages]",
    )
    add(
        "--prompt_format",
        choices=("auto", "chat", "text"),
        default="auto",
        help="a text prompt is a user's turn of the chat template, or is continued as text; auto: chat if there is a"
        " template, text with --add_column, as in training [auto]",
    )
    add("--system_prompt", metavar="TEXT", help="for conversations without one")
    add("--chat_template_kwargs", type=json_object, default={}, metavar="JSON", help="for the chat template")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="folder or hub name; the endpoint's name for it")
    add("--model_label", metavar="NAME", help="what the column model says [the same]")
    add("--backend", choices=("transformers", "vllm", "openai"), default="transformers", help="[transformers]")
    add("--model_revision", default="main", metavar="NAME", help="branch, tag or commit of a hub model [main]")
    add("--tokenizer_name", metavar="NAME", help="folder or hub name of the tokenizer [the model's]")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the weights [auto]")
    add("--device", metavar="NAME", help="such as cpu or cuda:1 [the accelerator, if there is one]")
    add(
        "--batch_size",
        type=_positive,
        metavar="N",
        help="responses generated together [16]; with vllm, responses between two writes [1024]",
    )
    add(
        "--model_kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help='more for from_pretrained or vllm.LLM, such as {"tensor_parallel_size": 2}',
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with a hub model")


def _add_sampling_options(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, Sampling()
    add("--n", type=_positive, default=1, help="responses to each prompt [1]")
    add("--max_new_tokens", type=int, default=default.max_new_tokens, metavar="N", help="[%(default)s]")
    add("--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy [%(default)s]")
    add("--top_p", type=float, default=default.top_p, metavar="P", help="[%(default)s]")
    add("--top_k", type=int, default=default.top_k, metavar="K", help="0: all tokens [%(default)s]")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a response and are no part of it")
    add("--seed", type=_seed, default=default.seed, metavar="N", help="none: nothing is repeatable [%(default)s]")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="the .jsonl file to append to")
    add(
        "--format",
        choices=("responses", "alpaca_eval"),
        default="responses",
        help=f"alpaca_eval: also write {ALPACA_FILE} beside it [responses]",
    )
    add(
        "--add_column",
        metavar="NAME",
        help="also write the dataset with the responses in a column of this name, such as y_ref",
    )
    add("--dataset_output", type=Path, metavar="FILE", help="where to, .jsonl or .parquet")
