"""Real text for the benchmarks, and what a teacher reads of it."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from pipeline.engines import Engine, open_engine
from pipeline.errors import UserError
from pipeline.prompts import TEMPLATE_VERSION, Prompt, PromptFormat, prompt_id
from pipeline.store.identity import Request, Sampling
from pipeline.teacher import items
from pipeline.teacher.items import read_as_models_do
from pipeline.teacher.orders import Order
from pipeline.teacher.teacher import Teacher


def arguments(description: str, prompts: int, tokens: int) -> ArgumentParser:
    """The arguments of every benchmark of a teacher on real text."""
    parser = ArgumentParser(description=description)
    parser.add_argument("model", help="folder of the teacher")
    parser.add_argument("texts", nargs="+", metavar="FILE:COLUMN", help="JSONL files, and which column is the prompt")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "hf"))
    parser.add_argument("--prompts", type=int, default=prompts, help="from each file, its first ones")
    parser.add_argument("--tokens", type=int, default=tokens, help="most tokens of a response")
    return parser


def read_texts(source: str, count: int) -> list[str]:
    """The first `count` texts of FILE:COLUMN; a list of sentences is joined."""
    file, _, column = source.rpartition(":")
    if not file:
        raise UserError(f"'{source}' names no column: write FILE:COLUMN, as in test.jsonl:question")
    texts = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if column not in row:
                raise UserError(f"{file} has no column '{column}'; found {', '.join(row)}")
            texts.append(row[column] if isinstance(row[column], str) else " ".join(row[column]))
            if len(texts) == count:
                break
    return texts


def to_draw(options: Namespace, teacher: Teacher) -> Order:
    """One sample at temperature 1 of every prompt, inside the tokenizer's chat template where it has one."""
    form = PromptFormat("{prompt}", chat=bool(teacher.tokenizer.chat_template))
    sampling = Sampling(1.0, 1.0, options.tokens, teacher.stops)
    request = Request("sample", form.template, TEMPLATE_VERSION, 0, sampling, form.chat_identity(teacher.tokenizer))
    texts = dict.fromkeys(text for source in options.texts for text in read_texts(source, options.prompts))
    prompts = [Prompt(prompt_id(text), text, (), "train") for text in texts]
    read, _ = read_as_models_do(prompts, form, teacher.tokenizer)
    return Order(request, list(items.to_draw("train", read, request, 1)), teacher.k, teacher.support)


def start(teacher: Teacher, order: Order) -> Engine:
    """The teacher's engine, with room for the longest prompt and its response."""
    longest = max(order.length(item) for item in order.items)
    return open_engine(teacher.engine, teacher.source, replace(teacher.loading, context=longest))
