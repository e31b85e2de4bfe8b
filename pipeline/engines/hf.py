"""The transformers engine: the oracle, and the teacher on machines without vLLM.

transformers' own `generate` runs the model; a logits processor looks at the raw logits of each step, draws the next
token with each sample's own random numbers and keeps k. How a sequence is padded follows from its own length,
and no batch has very few rows, so that a sample does not depend on its batch: in float32 on one thread, not in one bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline import interrupts
from pipeline.engines.base import Answer, Answers, Ask, EngineDead, Failure, Loading, too_long, unknown_token
from pipeline.engines.kept import Kept, kept, kept_of_each
from pipeline.errors import reason_of
from pipeline.models import Context, best_device, load_lm
from pipeline.store.identity import Sampling
from pipeline.store.schema import finish_of

_WINDOW = 16  # batches that are sorted by length together; further apart, prompts keep their order
_FEWEST = 8  # least rows of a forward pass: with very few, libraries round differently


class HfEngine:
    """Batched generation over a stream of asks; left-padded for causal models, right-padded for encoders."""

    def __init__(self, model, batch_size: int = 64, vocabulary: int | None = None):
        """vocabulary: ids that the tokenizer has, where the model's embedding may have more."""
        import transformers

        self.model, self.batch_size, self.seq2seq = model, batch_size, model.config.is_encoder_decoder
        self.vocabulary = vocabulary
        self.context = Context.of(model.config)
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self._fitting: dict[tuple[int, ...], int] = {}  # rows of such lengths, after more did not fit into memory
        self.description = {"engine": "hf", "transformers": transformers.__version__, "torch": torch.__version__}

    @classmethod
    def load(cls, folder: Path, loading: Loading) -> "HfEngine":
        return cls(load_lm(folder, loading.dtype).to(best_device()), loading.batch_size, loading.vocabulary)

    def close(self) -> None:
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        return self._run(
            asks, lambda ask: sampling.max_tokens, lambda batch: self._sampled(batch, sampling, k, support)
        )

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        return self._run(
            asks, lambda ask: len(ask.response_ids), lambda batch: self._scored(batch, k, stop_token_ids, support)
        )

    def unreadable(self, ask: Ask, response: int) -> str | None:
        """Why an ask with a response of up to so many tokens cannot be read; None where it can."""
        return too_long(len(ask.prompt_ids), response, self.context) or unknown_token(ask, self.vocab_size)

    def _run(
        self, asks: Iterable[Ask], response: Callable[[Ask], int], answer: Callable[[list[Ask]], list[Answer]]
    ) -> Answers:
        """Answer in batches of similar length. `response(ask)`: the most tokens that its response can have."""
        waiting = iter(asks)
        while window := list(islice(waiting, _WINDOW * self.batch_size)):
            fitting = []
            for ask in window:
                if reason := self.unreadable(ask, response(ask)):
                    yield Failure(ask.key, reason)
                else:
                    fitting.append(ask)
            fitting.sort(key=self._sizes, reverse=True)
            for sizes, alike in groupby(fitting, key=self._sizes):
                while batch := list(islice(alike, self._fitting.get(sizes, self.batch_size))):
                    yield from self._halving(batch, answer)

    def _sizes(self, ask: Ask) -> tuple[int, ...]:
        """Lengths that the ask's sequences are padded to, which follow from it alone; only equal ones share a batch."""
        prompt, response = len(ask.prompt_ids), 0 if ask.response_ids is None else len(ask.response_ids)
        return (_size(prompt), _size(response)) if self.seq2seq else (_size(prompt + response),)

    def _halving(self, batch: list[Ask], answer: Callable[[list[Ask]], list[Answer]]) -> Answers:
        """Answer a batch, in halves where it does not fit into memory, down to a single row."""
        try:
            with interrupts.allowed():
                answers = answer(batch)
        except torch.OutOfMemoryError as error:
            answers, reason = None, reason_of(error)  # the error itself would keep the batch's tensors alive
        except getattr(torch, "AcceleratorError", ()) as error:
            raise EngineDead(f"the device failed: {reason_of(error)}") from error
        if answers is not None:
            yield from answers
        elif len(batch) == 1:
            yield Failure(batch[0].key, f"one row alone does not fit into memory: {reason}")
        else:
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            middle = (len(batch) + 1) // 2
            self._fitting[self._sizes(batch[0])] = middle
            for half in (batch[:middle], batch[middle:]):
                yield from self._halving(half, answer)

    @torch.inference_mode()
    def _sampled(self, batch: Sequence[Ask], sampling: Sampling, k: int, support: str) -> list[Answer]:
        filled = _filled(batch)
        keep = partial(kept, k=k, support=support, vocabulary=self.vocabulary)
        capture = _Capture([ask.seed for ask in filled], sampling, keep)
        input_ids, mask = self._padded([ask.prompt_ids for ask in filled])
        stops, first = list(sampling.stop_token_ids), self.model.generation_config.decoder_start_token_id
        settings = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0],
            decoder_start_token_id=first,
        )  # fmt: skip
        captures = LogitsProcessorList([capture])
        output = self.model.generate(
            input_ids, attention_mask=mask, generation_config=settings, logits_processor=captures
        )
        start = 1 if self.seq2seq else input_ids.shape[1]  # a decoder begins with its start token
        tokens = output[:, start:].cpu().numpy().astype(np.int32)
        return list(capture.answers(batch, tokens, support))

    @torch.inference_mode()
    def _scored(self, batch: Sequence[Ask], k: int, stop_token_ids: Sequence[int], support: str) -> list[Answer]:
        filled = _filled(batch)
        logits = self._decoder_logits(filled) if self.seq2seq else self._causal_logits(filled)
        steps = [len(ask.response_ids) for ask in batch]
        views = [row[:n] if self.seq2seq else row[-n - 1 : -1] for row, n in zip(logits, steps, strict=False)]
        responses = [torch.tensor(ask.response_ids, device=logits.device) for ask in batch]
        return [
            captured.answer(ask.key, ask.response_ids, finish_of(ask.response_ids, stop_token_ids), support)
            for ask, captured in zip(batch, kept_of_each(views, responses, k, support, self.vocabulary), strict=True)
        ]

    def _causal_logits(self, batch: Sequence[Ask]) -> torch.Tensor:
        """[B, 1 + R, V]; left padding puts all responses at the end, and only those positions go through the head."""
        input_ids, mask = self._padded([np.concatenate([ask.prompt_ids, ask.response_ids]) for ask in batch])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        tail = max(len(ask.response_ids) for ask in batch) + 1
        return self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=tail).logits

    def _decoder_logits(self, batch: Sequence[Ask]) -> torch.Tensor:
        """[B, R, V] of a decoder that reads its start token and the responses."""
        input_ids, mask = self._padded([ask.prompt_ids for ask in batch])
        start = np.asarray([self.model.config.decoder_start_token_id], np.int32)
        decoder_ids, _ = self._padded([np.concatenate([start, ask.response_ids[:-1]]) for ask in batch])
        return self.model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits

    def _padded(self, sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, [B, L] each."""
        longest = _size(max(map(len, sequences)))
        if self.seq2seq:  # padding on the right has positions too
            longest = min(longest, self.context.tokens or longest)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)  # padding is masked, so its id means nothing
        for i, sequence in enumerate(sequences):
            start = 0 if self.seq2seq else longest - len(sequence)
            ids[i, start : start + len(sequence)] = torch.tensor(sequence)
            mask[i, start : start + len(sequence)] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


def _filled(batch: Sequence[Ask]) -> Sequence[Ask]:
    """The batch, with its last row repeated where there are very few."""
    return [*batch, *[batch[-1]] * (_FEWEST - len(batch))]


def _size(length: int) -> int:
    """The length that a sequence is padded to: at most an eighth more than its own, in steps of 8 or more."""
    step = max(8, 1 << length.bit_length() >> 4)
    return -(-length // step) * step


class _Capture(LogitsProcessor):
    """Chooses each row's next token from the raw logits and remembers what `keep(logits, tokens)` keeps of them."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, keep: Callable[[torch.Tensor, torch.Tensor], Kept]):
        self.sampling, self.keep = sampling, keep
        # One uniform number per step, drawn ahead from the sample's own generator.
        drawn = np.stack([np.random.default_rng(seed).random(sampling.max_tokens) for seed in seeds])
        self.uniform = np.minimum(drawn, 1 - 2**-24)  # float32 would round the largest ones to 1
        self.steps: list[Kept] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._choose(scores.float())
        self.steps.append(Kept(*(column.cpu() for column in self.keep(scores, chosen))))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        ordered, ids = (logits / self.sampling.temperature).sort(-1, descending=True)
        below = ordered.softmax(-1).cumsum(-1)
        total = below[:, -1:]
        last = torch.full_like(ids[:, :1], logits.shape[-1] - 1)
        if self.sampling.top_p < 1:  # the smallest set of likeliest tokens whose mass reaches top_p
            last = (below < self.sampling.top_p).sum(-1, keepdim=True).minimum(last)
            total = below.gather(-1, last)
        uniform = torch.as_tensor(self.uniform[:, len(self.steps), None], device=logits.device, dtype=below.dtype)
        rank = torch.searchsorted(below, uniform * total, right=True).minimum(last)
        return ids.gather(-1, rank).squeeze(-1)

    def answers(self, batch: Sequence[Ask], tokens: np.ndarray, support: str) -> Iterator[Answer]:
        columns = [torch.stack(column, 1) for column in zip(*self.steps, strict=True)]
        for i, ask in enumerate(batch):
            stops = np.isin(tokens[i], self.sampling.stop_token_ids)
            steps = int(stops.argmax()) + 1 if stops.any() else len(tokens[i])
            finish = "stop" if stops.any() else "length"
            yield Kept(*(column[i, :steps] for column in columns)).answer(ask.key, tokens[i, :steps], finish, support)
