"""``cpt generate``: generates responses of one model to a set of prompts.

Each response is appended to the JSONL file of --output as soon as it is there, as a row of prompt, model and response,
which ``cpt pairs`` reads. A run that was stopped or killed continues where it stopped: a prompt with a response in the
file is not asked again. A column images (or image) of the data holds the images of prompts, which the responses keep.

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
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64

from ..data.stores import local_folder
from ..errors import UserError, user_error
from ..files import update_digest
from ..generation.endpoint import ENDPOINT_DEFAULTS, Endpoint, EndpointOptions
from ..generation.exports import ALPACA_FILE, Exports, write_exports
from ..generation.prompts import Answer, Failure, Prompt, Request, Sampling, read_prompts
from ..generation.response_file import ResponseFile
from .checkpoints import trained_format
from .models import load_named_model, load_named_tokenizer
from .parsing import DTYPES, Parser, add_endpoint_options, json_object, number_type, or_none

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..data.preparation import Drop

# The files in a model's folder on which its responses depend.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja")


def main(argv: Sequence[str], prog: str = "cpt generate") -> None:
    """Generates the missing responses and prints a summary."""
    # Options and prompts; mistakes in them end the command before a model is loaded.
    args = _parse_args(argv, prog)
    from ..data.sources import load_data  # imports datasets, which --help does without

    exports = Exports(args.add_column, args.dataset_output, args.format == "alpaca_eval")
    exports.check_paths(args.output, args.dataset_name, args.n)
    dataset = load_data(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    prompts, dropped = read_prompts(dataset, args.prompt_column, args.dataset_name)
    unique = {prompt.key: prompt for prompt in prompts if prompt is not None}
    requests = [Request(prompt, sample) for prompt in unique.values() for sample in range(args.n)]
    _report_prompts(prompts, unique, dropped)
    model = args.model_label or args.model_name_or_path
    exports.check_data(args.output, model, dataset.column_names, unique.values())

    # Responses, then the files that are made of them.
    run = _Generation(args, requests)
    with ResponseFile(args.output, model, run.sampling, run.origin) as file:
        run.answer(file)
        written = write_exports(exports, file, dataset, prompts)
    if written.filled is not None:
        print(f"{written.filled} of {len(prompts)} rows have `{exports.column}`")
    print(f"written to {', '.join(map(str, [args.output, *written.files]))}")
    if run.failures:
        reason, detail = run.example
        raise UserError(
            f"{sum(run.failures.values())} of {len(requests)} responses are missing, one by {reason}: {detail};"
            " run the same command again to request them"
        )


class _Generation:
    """Answers the requests of a run by its backend, and counts answers, tokens and failures."""

    def __init__(self, args: argparse.Namespace, requests: Sequence[Request]) -> None:
        self.args, self.requests = args, requests
        self.sampling, trained, file = _sampling(args), None, None
        self.origin: dict[str, Any] = {}
        if args.backend == "openai":
            options = {name: getattr(args, name) for name in ENDPOINT_DEFAULTS}
            self.endpoint = Endpoint(EndpointOptions(args.model_name_or_path, **options), self.sampling)
            self.origin["extra_body"] = json.dumps(args.extra_body, sort_keys=True)
        else:
            name, revision = ("model_name_or_path", args.model_revision)
            if args.tokenizer_name is not None:
                name, revision = "tokenizer_name", None
            images = any(request.prompt.images for request in requests)
            self.tokenizer = load_named_tokenizer(
                getattr(args, name), name, revision=revision, trust_remote_code=args.trust_remote_code, images=images
            )
            trained, file = trained_format(args.model_name_or_path)
            if args.prompt_format == "auto":
                has_template = self.tokenizer.chat_template is not None
                chat = self.sampling.chat and has_template if trained is None else trained == "chat"
                self.sampling = replace(self.sampling, chat=chat)
            self.origin |= {"revision": args.model_revision, "weights": _digest(args.model_name_or_path)}
        # Options that have an effect only on conversations.
        texts = sum(isinstance(request.prompt.content, str) for request in requests)
        if self.sampling.system_prompt is not None and texts and not self.sampling.chat:
            raise UserError("system_prompt needs a conversation, but the prompts are text: give --prompt_format chat")
        if self.sampling.template_kwargs and texts == len(requests) and not self.sampling.chat:
            raise UserError(
                "chat_template_kwargs has no effect on prompts that are continued as text: give --prompt_format chat"
            )
        if texts:
            print(self._say_format(trained, file))
        if trained == "text" and texts < len(requests):
            print(f"prompts are conversations, but the model was trained on text ({file}): give the prompts as text")
        self.answers = self.tokens = self.skipped = self.empty = 0
        self.failures: Counter[str] = Counter()
        self.example: Failure | None = None
        self.seconds = 0.0

    def _say_format(self, trained: str | None, file: Path | None) -> str:
        """Returns a line that says what becomes of text prompts, why, and how to change it."""
        forms = {True: "become a user turn of the chat template", False: "are continued as text"}
        chat, other = self.sampling.chat, "text" if self.sampling.chat else "chat"
        if trained is not None and (trained == "chat") == chat:
            return f"text prompts {forms[chat]}, as in training ({file}); --prompt_format {other} changes that"
        if trained is not None:
            return f"text prompts {forms[chat]}, but training was on {trained} ({file}): leave --prompt_format out"
        is_local = self.args.backend != "openai"
        if is_local and not chat and self.tokenizer.chat_template is not None:
            return f"text prompts {forms[chat]}, without the model's chat template: --prompt_format chat would use it"
        return f"text prompts {forms[chat]}" + f"; --prompt_format {other} changes that" * (is_local and chat)

    def answer(self, file: ResponseFile) -> None:
        """Requests the responses that the file lacks. If it lacks none, no model is loaded."""
        from tqdm.auto import tqdm

        answered = {i for i, (prompt, sample) in enumerate(self.requests) if (prompt.key, sample) in file.answered}
        self.skipped = len(answered)
        backend = self._load_backend() if self.skipped < len(self.requests) else None
        started = time.perf_counter()
        try:
            # disable=None shows the bar only in a terminal.
            with tqdm(total=len(self.requests), initial=self.skipped, unit=" responses", disable=None) as bar:
                if backend is not None:
                    backend.answer(self.requests, lambda results: self._record(results, file, bar), answered)
        finally:
            self.seconds = time.perf_counter() - started
            print(self.summary())

    def _record(self, results: Sequence[tuple[int, Answer | Failure]], file: ResponseFile, bar: tqdm) -> None:
        new = [(self.requests[i], result) for i, result in results if isinstance(result, Answer)]
        file.add(new)
        self.answers += len(new)
        self.empty += sum(not answer.text.strip() for _, answer in new)
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
        from ..generation.local import LocalModel

        options = {"dtype": args.dtype, "revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        options |= args.model_kwargs  # the user's arguments override the options
        return LocalModel(_load_local_model(args, options), self.tokenizer, self.sampling, args.batch_size)

    def summary(self) -> str:
        """Returns the numbers of answered, skipped and failed requests, and the speed."""
        empty = f" ({self.empty} with an empty text)" if self.empty else ""
        parts = [f"{self.answers} answered{empty}", f"{self.skipped} skipped (answered before)"]
        reasons = ", ".join(f"{count} by {reason}" for reason, count in self.failures.most_common())
        parts.append(f"{sum(self.failures.values())} failed{f' ({reasons})' if reasons else ''}")
        if self.answers:
            # An endpoint may not report numbers of tokens.
            count, unit = (self.tokens, "tokens") if self.tokens else (self.answers, "responses")
            parts.append(f"{count:,} {unit} in {self.seconds:.1f} s, {count / max(self.seconds, 1e-9):,.1f} per second")
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
    # A new column is read in training beside the completions, where text prompts are continued as text.
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

    with user_error(f"--model_kwargs {json.dumps(args.model_kwargs)}", (TypeError,) if args.model_kwargs else ()):
        model = load_named_model(args.model_name_or_path, "model_name_or_path", **options)
    if "device_map" in options:
        return model
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(args.device or accelerator or "cpu")


def _digest(name: str) -> str | None:
    """Returns 16 hex digits that identify the files of a model's folder, or None for a hub model (see its revision).

    For adapters these are their files and those of their base model.
    """
    from ..model.pretrained import model_folders

    folders = model_folders(str(Path(local_folder(name)).expanduser()))
    if not folders:
        return None
    digest = xxh3_64()
    for folder in folders:
        for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)}):
            digest.update(path.name.encode())
            update_digest(digest, path)
    return digest.hexdigest()


# --- Options ---


def _backend(text: str) -> str:
    if text == "vllm":
        raise argparse.ArgumentTypeError(
            "vllm was removed: run `vllm serve MODEL`, and use --backend openai --base_url http://localhost:8000/v1"
        )
    return text


# Options that only one backend uses.
_OF_BACKENDS = {
    "transformers": (
        *("model_revision", "tokenizer_name", "dtype", "device", "batch_size", "model_kwargs", "trust_remote_code"),
        "chat_template_kwargs",
    ),
    "openai": tuple(ENDPOINT_DEFAULTS),
}


def _parse_args(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = _generate_parser(prog)
    args = parser.parse_args(argv)
    for backend, names in _OF_BACKENDS.items():
        given = [name for name in names if getattr(args, name) != parser.get_default(name)]
        if given and args.backend != backend:
            raise UserError(f"--{given[0]} has no effect with --backend {args.backend}, only with {backend}")
    if args.backend == "transformers" and None in (args.temperature, args.top_p):
        name = "temperature" if args.temperature is None else "top_p"
        raise UserError(f"--{name} none leaves the value to an endpoint: give a number with --backend transformers")
    if args.n > 1 and args.temperature == 0:
        raise UserError(
            f"--n {args.n} needs --temperature above 0: greedy decoding would give the same response {args.n} times"
        )
    if args.device is not None:
        _check_device(args.device)
    if args.device is not None and "device_map" in args.model_kwargs:
        raise UserError("--device and the device_map of --model_kwargs contradict each other: give only one of them")
    return args


def _check_device(name: str) -> None:
    """Raises UserError for a device that is not on this machine."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    here = ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
    with user_error(f"--device {name}", (RuntimeError,)):
        device = torch.device(name)
    if str(device) not in here and name not in (part.split(":")[0] for part in here):
        raise UserError(f"--device {name}: this machine has {', '.join(here)}; choose one of them")


def _generate_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} --model_name_or_path MODEL --dataset_name DATA --output FILE [--option value ...]",
        description=__doc__,
    )
    _add_prompt_options(parser.add_argument_group("Prompts"))
    _add_model_options(parser.add_argument_group("Model"))
    _add_sampling_options(parser.add_argument_group("Sampling"))
    add_endpoint_options(parser.add_argument_group("Endpoint (--backend openai)"))
    _add_output_options(parser.add_argument_group("Output"))
    return parser


def _add_prompt_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset_name", required=True, metavar="DATA", help="file, folder or hub name")
    add("--dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset_split", metavar="NAME", help="split, such as test or train[:100] [train]")
    start = "column of the prompts [the common start of chosen and rejected, else prompt, instruction or messages]"
    add("--prompt_column", metavar="NAME", help=start)
    add(
        "--prompt_format",
        choices=("auto", "chat", "text"),
        default="auto",
        help="chat: a text prompt becomes a user turn of the chat template; text: it is continued as text; auto: as the"
        " training_config.yaml of the model says, else chat if there is a template, but text with --add_column [auto]",
    )
    add("--system_prompt", metavar="TEXT", help="system prompt of conversations without one")
    add("--chat_template_kwargs", type=json_object, default={}, metavar="JSON", help="arguments of the chat template")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="folder or hub name, or name at the endpoint")
    add("--model_label", metavar="NAME", help="name in the column model [the value of --model_name_or_path]")
    add("--backend", type=_backend, choices=tuple(_OF_BACKENDS), default="transformers", help="[transformers]")
    add("--model_revision", default="main", metavar="NAME", help="branch, tag or commit of a hub model [main]")
    add("--tokenizer_name", metavar="NAME", help="folder or hub name of the tokenizer [the model's]")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights [auto]")
    add("--device", metavar="NAME", help="such as cpu or cuda:1 [the accelerator, if there is one]")
    batch = number_type("a batch size", 1)
    add("--batch_size", type=batch, default=16, metavar="N", help="responses generated together [%(default)s]")
    more = 'more arguments of from_pretrained, such as {"device_map": "auto"}'
    add("--model_kwargs", type=json_object, default={}, metavar="JSON", help=more)
    add("--trust_remote_code", action="store_true", help="run the code of a hub model")


def _add_sampling_options(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, Sampling()
    add("--n", type=number_type("a number of responses", 1), default=1, help="responses per prompt [1]")
    add("--max_new_tokens", type=int, default=default.max_new_tokens, metavar="N", help="[%(default)s]")
    left = "none: leave it to the endpoint [%(default)s]"
    add("--temperature", type=or_none(float), default=default.temperature, metavar="T", help=f"0 is greedy; {left}")
    add("--top_p", type=or_none(float), default=default.top_p, metavar="P", help=left)
    add("--top_k", type=int, default=default.top_k, metavar="K", help="0: all tokens [%(default)s]")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a response, which leaves them out")
    add("--seed", type=or_none(int), default=default.seed, metavar="N", help="none: not reproducible [%(default)s]")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="the .jsonl file to append to")
    form = f"alpaca_eval: also write {ALPACA_FILE} to the same folder [responses]"
    add("--format", choices=("responses", "alpaca_eval"), default="responses", help=form)
    column = "also write the dataset with the responses in a column of this name, such as y_ref"
    add("--add_column", metavar="NAME", help=column)
    add("--dataset_output", type=Path, metavar="FILE", help="the .jsonl or .parquet file for that dataset")
