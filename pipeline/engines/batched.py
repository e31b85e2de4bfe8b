"""What engines that run transformers models have in common: batches of padded sequences, and drawing tokens.

How a sequence is padded follows from its own length, and no batch has very few rows, so that a sample does not depend
on its batch: in float32 on one thread, not in one bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline import interrupts
from pipeline.engines.base import Ask, EngineDead, Failure, too_long, unknown_token
from pipeline.errors import reason_of
from pipeline.models import Context
from pipeline.store.identity import Sampling

_WINDOW = 16  # batches that are sorted by length together; further apart, prompts keep their order
_FEWEST = 8  # least rows of a forward pass: with very few, libraries round differently


class Drawing(LogitsProcessor):
    """Chooses each row's next token in place of `generate`, with the sample's own random numbers.

    `step` is what an engine draws from, and what it remembers of each step.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling):
        self.sampling = sampling
        # One uniform number per step, drawn ahead from the sample's own generator.
        drawn = np.stack([np.random.default_rng(seed).random(sampling.max_tokens) for seed in seeds])
        self.uniform = np.minimum(drawn, 1 - 2**-24)  # float32 would round the largest ones to 1
        self.steps: list[tuple[Tensor, ...]] = []

    def step(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next tokens [B] after input_ids [B, L], from raw logits [B, V], and columns [B, ...] to remember."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen, columns = self.step(input_ids, scores)
        self.steps.append(tuple(column.cpu() for column in columns))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def choose(self, logits: Tensor) -> Tensor:
        """A token of each row [B], from logits [B, V] that need not be normalised."""
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

    def responses(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, str, list[Tensor]]]:
        """Of each row its response [T], how it ended, and its share [T, ...] of the columns. tokens: [B, steps]."""
        columns = [torch.stack(column, 1) for column in zip(*self.steps, strict=True)]
        for i, row in enumerate(tokens):
            stops = np.isin(row, self.sampling.stop_token_ids)
            steps = int(stops.argmax()) + 1 if stops.any() else len(row)
            finish = "stop" if stops.any() else "length"
            yield row[:steps], finish, [column[i, :steps] for column in columns]


class BatchedEngine:
    """Batches over a stream of asks; left-padded for causal models, right-padded for encoders."""

    def __init__(self, model, context: Context, vocab_size: int, batch_size: int):
        """context, vocab_size: what may be asked, of tokens and of ids."""
        self.model, self.batch_size, self.seq2seq = model, batch_size, model.config.is_encoder_decoder
        self.context, self.vocab_size = context, vocab_size
        self._fitting: dict[tuple[int, ...], int] = {}  # rows of such lengths, after more did not fit into memory

    def close(self) -> None:
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def unreadable(self, ask: Ask, response: int) -> str | None:
        """Why an ask with a response of up to so many tokens cannot be read; None where it can."""
        return too_long(len(ask.prompt_ids), response, self.context) or unknown_token(ask, self.vocab_size)

    def _run(
        self, asks: Iterable[Ask], response: Callable[[Ask], int], answer: Callable[[list[Ask]], list]
    ) -> Iterator[Any]:
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

    def _halving(self, batch: list[Ask], answer: Callable[[list[Ask]], list]) -> Iterator[Any]:
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

    def _generate(self, input_ids: Tensor, mask: Tensor, drawing: Drawing) -> np.ndarray:
        """Tokens [B, steps] that `drawing` draws after prompts [B, P]; behind a row's stop token they mean nothing."""
        sampling, first = drawing.sampling, self.model.generation_config.decoder_start_token_id
        stops = list(sampling.stop_token_ids)
        settings = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0],
            decoder_start_token_id=first,
        )  # fmt: skip
        output = self.model.generate(
            input_ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([drawing])
        )
        start = 1 if self.seq2seq else input_ids.shape[1]  # a decoder begins with its start token
        return output[:, start:].cpu().numpy().astype(np.int32)

    def _padded(self, sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
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


def filled(batch: Sequence[Ask]) -> Sequence[Ask]:
    """The batch, with its last row repeated where there are very few."""
    return [*batch, *[batch[-1]] * (_FEWEST - len(batch))]


def _size(length: int) -> int:
    """The length that a sequence is padded to: at most an eighth more than its own, in steps of 8 or more."""
    step = max(8, 1 << length.bit_length() >> 4)
    return -(-length // step) * step
