"""What `tests.benchmarks.supports` distils: two teachers, responses to real text, and the whole distributions there.

`text`: a teacher that is trained here on abstracts (SciTLDR) and problems (GSM8K) answers prompts it has not seen, the
first tokens of other texts. `smollm2`: SmolLM2-135M-Instruct reads abstracts. Whatever OUT holds is not made again.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cli.fetch import fetch_smollm2
from pipeline.files import write_json_atomically
from pipeline.learning.batches import collate
from pipeline.learning.closeness import LogitSource
from pipeline.learning.learner import StudentLearner
from pipeline.learning.terms import Likelihood
from pipeline.models import build_causal_lm, keep_layers, load_lm, load_tokenizer, save_model
from pipeline.params import Model
from pipeline.store.schema import Row

OUTSIDE = (1, 8, 16, 32, 128)  # top k whose outside is reported
_CARD = "Made by `python -m tests.benchmarks.supports`.\n"


@dataclass(frozen=True)
class Part:
    """Sizes of one part of the experiment."""

    name: str  # text | smollm2
    train: int  # responses
    held_out: int
    prompt: int  # tokens of each prompt
    response: int  # tokens of a response, at most
    steps: int  # of distillation
    batch: int  # responses per step
    learning_rate: float
    seeds: int


@dataclass(frozen=True)
class Made:
    """Models of the part `text`, which are trained here: shapes, and steps of likelihood at batches of 32 texts."""

    vocabulary: int
    teacher: Model
    student: Model
    teacher_steps: int
    student_steps: int
    learning_rate: float


TEXT = Part("text", 2000, 240, 8, 28, 400, 32, 3e-3, 3)
SMOLLM2 = Part("smollm2", 256, 32, 8, 56, 80, 8, 5e-4, 2)
MADE = Made(
    4096,
    Model(width=256, layers=4, heads=4, intermediate=688),
    Model(width=128, layers=2, heads=4, intermediate=384),
    700,
    150,
    2e-3,
)


class Taught:
    """Responses with the teacher's whole distribution at each of their N tokens, which stays on disk."""

    def __init__(self, path: Path):
        """path: without its ending, as `record` has written it."""
        with np.load(path.with_suffix(".npz")) as stored:
            self.starts, self.lse, self.own = stored["starts"], stored["lse"], stored["own"]
            tokens = np.split(stored["tokens"], self.starts[1:-1])
            finish = ["stop" if stop else "length" for stop in stored["stop"]]
            self.responses = list(map(Row.bare, stored["prompts"], tokens, finish))
            self.tokens = torch.from_numpy(stored["tokens"]).long()
        self.logprobs = np.memmap(path.with_suffix(".f16"), np.float16, "r").reshape(len(self.tokens), -1)

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], np.ndarray]:
        """Responses as a batch, and the places [B, R] of their tokens among the N; 0 where padded."""
        batch = collate([self.responses[row] for row in rows], topk=False)
        starts, step = self.starts[:-1][rows], np.arange(batch["labels"].shape[1])
        return batch, np.where(batch["labels"] >= 0, starts[:, None] + step, 0)

    def distribution(self, places: np.ndarray | slice) -> Tensor:
        """Log-probabilities [n, V] in float32, which sum to 1 again after the rounding to float16."""
        return torch.log_softmax(torch.from_numpy(self.logprobs[places].astype(np.float32)), -1)

    def chunks(self, positions: int) -> Iterator[slice]:
        for first in range(0, len(self.tokens), positions):
            yield slice(first, min(first + positions, len(self.tokens)))


@torch.no_grad()
def record(path: Path, model, responses: Sequence[Row], batch_size: int = 16) -> None:
    """The distributions of `model` along responses: float16 log-probabilities, and float32 values of the tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source, lse, own = LogitSource(model.eval(), "the teacher"), [], []
    with open(path.with_suffix(".f16"), "wb") as file:
        for first in range(0, len(responses), batch_size):
            part = responses[first : first + batch_size]
            logits = source.at(collate(part, topk=False))(slice(None))
            labels = torch.from_numpy(np.concatenate([each.response_ids for each in part])).long()
            lse.append(logits.logsumexp(-1))
            logprobs = logits - lse[-1][:, None]
            own.append(logprobs.gather(-1, labels[:, None])[:, 0])
            file.write(logprobs.half().numpy().tobytes())
    np.savez(
        path.with_suffix(".npz"),
        prompts=np.stack([each.prompt_ids for each in responses]),
        tokens=np.concatenate([each.response_ids for each in responses]),
        starts=np.cumsum([0, *(len(each.response_ids) for each in responses)]),
        stop=np.array([each.finish == "stop" for each in responses]),
        lse=torch.cat(lse).numpy(),
        own=torch.cat(own).numpy(),
    )


def spread(taught: Taught) -> dict:
    """What the teacher is like: entropy in nats per token, and its mean mass outside its top k."""
    entropy, inside = 0.0, torch.zeros(len(OUTSIDE))
    for rows in taught.chunks(512):
        p = taught.distribution(rows).exp()
        entropy -= float(torch.xlogy(p, p).sum())
        top = p.topk(min(max(OUTSIDE), p.shape[-1]), -1).values.cumsum(-1)
        inside += torch.stack([top[:, min(k, top.shape[-1]) - 1].sum() for k in OUTSIDE])
    size = len(taught.tokens)
    outside = dict(zip(map(str, OUTSIDE), (1 - inside / size).tolist(), strict=True))
    return {"responses": len(taught.responses), "tokens": size, "entropy": entropy / size, "outside": outside}


def optimise(
    model, loss: Callable[[np.ndarray], Tensor], rows: int, steps: int, batch: int, learning_rate: float, seed: int
) -> None:
    """AdamW as the project's trainer (cosine to 0, gradients of norm 1 at most) on loss(indices of a batch's rows)."""
    rng, order = np.random.default_rng(seed), np.empty(0, int)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(rows)])
        chosen, order = order[:batch], order[batch:]
        optimiser.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad()
        loss(chosen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def learn_likelihood(model, responses: Sequence[Row], steps: int, learning_rate: float, seed: int) -> float:
    """Train a language model on tokens alone; returns the last batches' mean, in nats per token."""
    learner, losses = StudentLearner(model, [Likelihood()]), []

    def loss(rows: np.ndarray) -> Tensor:
        batch = collate([responses[row] for row in rows], topk=False)
        counts = torch.tensor([(batch["labels"] >= 0).sum(), 1])
        value, _ = learner(counts, **batch)
        losses.append(float(value.detach()))
        return value

    optimise(model, loss, len(responses), steps, 32, learning_rate, seed)
    return float(np.mean(losses[-20:]))


def read_texts(data: Path, splits: Sequence[str]) -> list[str]:
    """Distinct texts of both data sets in a fixed random order: sentences of abstracts, and problems."""
    texts: dict[str, None] = {}
    for split in splits:
        for name, field in (("scitldr", "source"), ("gsm8k", "question")):
            file = data / name / f"{split}.jsonl"
            for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
                content = json.loads(line)[field]
                texts |= dict.fromkeys([content] if isinstance(content, str) else content)
    distinct = list(texts)
    return [distinct[place] for place in np.random.default_rng(0).permutation(len(distinct))]


def train_tokenizer(texts: Sequence[str], vocabulary: int):
    """Byte-pair encoding; its one special token begins and ends every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<end>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, **options))
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@torch.no_grad()
def sample(model, prompts: np.ndarray, most: int, end: int, seed: int) -> list[Row]:
    """One response at temperature 1 to each prompt [N, P]."""
    torch.manual_seed(seed)
    rows = []
    for part in np.array_split(prompts, max(1, len(prompts) // 200)):
        ids = torch.from_numpy(part).long()
        responses = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=most, pad_token_id=end, eos_token_id=end,
        )[:, ids.shape[1] :].numpy()  # fmt: skip
        for prompt, tokens in zip(part, responses, strict=True):
            ends = np.flatnonzero(tokens == end)
            length = int(ends[0]) + 1 if len(ends) else len(tokens)
            finish = "stop" if len(ends) else "length"
            rows.append(Row.bare(prompt, tokens[:length].astype(np.int32), finish))
    return rows


def prepare_text(out: Path, data: Path, part: Part, made: Made) -> None:
    """Tokenizer, teacher, student, and the teacher's samples with its distributions, into OUT/text."""
    folder = out / part.name
    if (folder / "setting.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    began, context = time.monotonic(), 1 + part.prompt + part.response
    texts, others = read_texts(data, ("train", "dev")), read_texts(data, ("test",))
    tokenizer = train_tokenizer(texts, made.vocabulary)
    end, cut = tokenizer.eos_token_id, part.prompt + part.response
    start = np.array([end], np.int32)
    encoded = [[*ids, end] for ids in tokenizer(texts).input_ids]
    known = [Row.bare(start, np.array(ids[:cut], np.int32), "stop" if len(ids) <= cut else "length") for ids in encoded]
    losses = {}
    for role, seed in (("teacher", 0), ("student", 1)):
        model = build_causal_lm(getattr(made, role), tokenizer, context, seed)
        losses[role] = learn_likelihood(model, known, getattr(made, f"{role}_steps"), made.learning_rate, seed)
        save_model(folder / role, model, tokenizer, _CARD)
    taught = time.monotonic() - began
    teacher, count = load_lm(folder / "teacher"), part.train + part.held_out
    openings = [ids[: part.prompt] for ids in tokenizer(others).input_ids if len(ids) > part.prompt + 2][:count]
    prompts = np.array([[end, *ids] for ids in openings], np.int32)
    responses = sample(teacher, prompts, part.response, end, 0)
    parameters = {role: load_lm(folder / role).num_parameters() for role in losses}
    more = {"parameters": parameters, "nll": losses, "texts": len(texts), "seconds_teaching": taught}
    _record(folder, teacher, responses, part, more)


def prepare_smollm2(out: Path, data: Path, part: Part, layers: int = 6) -> None:
    """SmolLM2 reads abstracts: its distributions along them, and the student cut out of it, into OUT/smollm2."""
    folder, source = out / part.name, out / "models" / "smollm2"
    if (folder / "setting.json").is_file():
        return
    if not source.is_dir():
        fetch_smollm2(source)
    tokenizer, teacher = load_tokenizer(source), load_lm(source)
    size, texts = part.prompt + part.response, []
    for split, count in (("train", part.train), ("test", part.held_out)):
        lines = (data / "scitldr" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        encoded = (tokenizer(" ".join(json.loads(line)["source"])).input_ids for line in lines)
        whole = (np.array(ids[:size], np.int32) for ids in encoded if len(ids) >= size)
        texts += [Row.bare(ids[: part.prompt], ids[part.prompt :], "length") for ids, _ in zip(whole, range(count))]  # noqa: B905
    student = keep_layers(load_lm(source), layers)
    save_model(folder / "student", student, tokenizer, _CARD)
    parameters = {"teacher": teacher.num_parameters(), "student": student.num_parameters()}
    _record(folder, teacher, texts, part, {"parameters": parameters})


def _record(folder: Path, teacher, responses: list[Row], part: Part, more: dict) -> None:
    splits = {"train": responses[: part.train], "held_out": responses[part.train :]}
    if [len(each) for each in splits.values()] != [part.train, part.held_out]:
        raise ValueError(f"{len(responses)} texts are long enough, {part.train + part.held_out} are needed")
    for name, some in splits.items():
        record(folder / name, teacher, some)
    about = {name: spread(Taught(folder / name)) for name in splits}
    write_json_atomically(folder / "setting.json", about | more)
