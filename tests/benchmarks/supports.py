"""Do 16 tokens per position teach like the whole vocabulary? Students distilled from several supports of one teacher.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.supports OUT [--part text smollm2] [--data FOLDER] [--only WORD ...]
    python -m tests.benchmarks.supports OUT --report [--plot docs/supports.svg]

A cell is one student: the same start, rows and steps, and its own loss. `dense` sees the teacher's whole distribution,
`topk` its top k with a bucket for the rest, `drawn` k draws with replacement (RS-KD, arXiv 2503.16870), `sampled` the
project's own rows (pipeline.objectives). Supports are drawn once and kept for all epochs; a seed orders the batches and
draws the supports. Each finished cell is a line of OUT/cells.jsonl and is not run again; several processes may share
the work. Measured over the whole vocabulary, on held-out responses. On one core: `text` 75 minutes, `smollm2` 60.
"""

import argparse
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from pipeline.learning.consistency import Consistency, GivenReward
from pipeline.learning.divergence import Divergence
from pipeline.learning.forward import head_of, per_row, response_states
from pipeline.learning.learner import StudentLearner
from pipeline.learning.residuals import Scaled, teacher_residual
from pipeline.models import load_lm
from pipeline.objectives.divergences import DIVERGENCES, forward_kl, reverse_kl
from pipeline.objectives.supports import offsets, systematic, top_place
from pipeline.params import Residual, Reward, Train
from pipeline.store.schema import Row
from stages.distill.inputs import shuffled
from stages.reward.fit import Fitting, Sources
from tests.benchmarks.supports_data import MADE, SMOLLM2, TEXT, Part, Taught, optimise, prepare_smollm2, prepare_text

BETA = 0.5  # of jsd
BOUND = 32  # top k of the measure "top k and the rest"
LAM, SIGMA = 0.01, 0.3  # of the X term, and of rewards that are given
RESIDUAL = Residual(q_source="logits", gamma=1.0, terminal="drop")
GOLDEN = (math.sqrt(5) - 1) / 2
PARTS = {part.name: part for part in (TEXT, SMOLLM2)}
SUPPORTS = {
    "text": [
        ("dense", 0), ("sampled", 16), ("topk", 128), ("sampled", 32), ("topk", 32), ("drawn", 16), ("drawn", 32),
        ("sampled", 8), ("sampled", 64), ("topk", 16), ("topk", 64),
    ],
    "smollm2": [("dense", 0), ("sampled", 16), ("topk", 32), ("sampled", 32), ("topk", 128)],
}  # fmt: skip
MAIN = 5  # supports that every seed begins with
REWARDS = ("oracle", "zero", "frozen", "shuffled", "oracle-shuffled")


@dataclass(frozen=True)
class Cell:
    """One student."""

    part: str
    objective: str
    support: str  # start (not trained) | dense | topk | drawn | sampled
    k: int = 0
    seed: int = 0
    reward: str = "none"

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.part, self.objective, self.support, self.k, self.reward, f"seed{self.seed}")))


def cells(part: Part) -> list[Cell]:
    """All students of a part, the most informative ones first."""
    supports = SUPPORTS[part.name]
    main, others = supports[:MAIN], supports[MAIN:]
    x = [("fkl", ("sampled", 16), reward) for reward in REWARDS]
    plain = {objective: [(objective, support, "none") for support in main] for objective in ("fkl", "jsd")}
    rest = {objective: [(objective, support, "none") for support in others] for objective in ("fkl", "jsd")}
    first, later = (0,), range(1, part.seeds)
    order = [(first, plain["fkl"] + rest["fkl"]), (later, plain["fkl"])]
    if part.name == "text":
        order += [(first, x), (first, plain["jsd"]), (later, x), (later, rest["fkl"] + plain["jsd"])]
        order += [(range(part.seeds), rest["jsd"])]
    students = [Cell(part.name, objective, *support, seed, reward)
                for seeds, kinds in order for seed in seeds for objective, support, reward in kinds]  # fmt: skip
    return [Cell(part.name, "fkl", "start"), *students]


@dataclass(frozen=True)
class Drawn:
    """The kept tokens of all N positions: what a row stores of them."""

    ids: np.ndarray  # int32 [N, k]
    logprobs: np.ndarray  # float16 [N, k]
    tau: np.ndarray | None  # float32 [N] of sampled rows
    tail: np.ndarray | None  # float32 [N] of the plain top k


def draw(taught: Taught, support: str, k: int, seed: int) -> Drawn:
    """Seed 0 of `sampled` has the offsets that the product has, the others the same ones turned."""
    ids, thresholds = [], []
    generator = torch.Generator().manual_seed(seed)
    for rows in taught.chunks(max(1, 2**23 // taught.logprobs.shape[1])):
        p = taught.distribution(rows).exp()
        if support == "drawn":
            ids.append(torch.multinomial(p, k, True, generator=generator).sort(-1).values)
            continue
        top = p.topk(k, -1)
        if support == "topk":
            ids.append(top.indices)
            thresholds.append(p.scatter_(-1, top.indices, 0).sum(-1))
            continue
        offset = offsets(k, taught.tokens[rows], top_place(*top), torch.from_numpy(taught.lse[rows]))
        drawn = systematic(p, k, (offset + seed * GOLDEN) % 1, top)
        ids.append(drawn.places)
        thresholds.append(drawn.tau)
    ids = torch.cat(ids).int().numpy()
    logprobs = np.concatenate(
        [np.take_along_axis(taught.logprobs[rows], ids[rows].astype(int), -1) for rows in taught.chunks(2048)]
    )
    threshold = torch.cat(thresholds).numpy() if thresholds else None
    tau, tail = (threshold if support == kind else None for kind in ("sampled", "topk"))
    return Drawn(ids, logprobs, tau, tail)


def kept_by(support: str, k: int, seed: int, taught: Taught, folder: Path) -> Drawn:
    """What `draw` draws, which is kept in the folder for the other cells."""
    path = folder / "supports" / f"{support}-{k}-{seed}.npz"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        values = {name: value for name, value in vars(draw(taught, support, k, seed)).items() if value is not None}
        part = path.with_name(f"{os.getpid()}-{path.name}")
        np.savez(part, **values)
        part.rename(path)
    with np.load(path) as stored:
        return Drawn(*(stored.get(name) for name in Drawn.__dataclass_fields__))


def drawn_loss(objective: str, p: Tensor, s: Tensor) -> Tensor:
    """A divergence from n draws with replacement, [N]: weights 1 / n, so unbiased; log p and log s [N, n] there.

    What grows linearly with s / p is taken out of `jsd` as for sampled rows, through sum s = 1.
    """
    if objective == "fkl":
        return (p - s).mean(-1)
    mixture = torch.logaddexp(p + math.log(BETA), s + math.log1p(-BETA))
    of_student = -math.log1p(-BETA) - ((s - p).exp() * (mixture - math.log1p(-BETA) - s)).mean(-1)
    return BETA * (p - mixture).mean(-1) + (1 - BETA) * of_student


def whole(student, batch: dict[str, Tensor]) -> Tensor:
    """A student's log-probabilities [n, V] at the response steps of a batch."""
    head, states = head_of(student, response_states(student.base_model, batch))
    return torch.log_softmax(linear(states, head.weight, head.bias), -1)


def loss_of(cell: Cell, student, taught: Taught, folder: Path) -> Callable[[np.ndarray], Tensor]:
    """The mean loss over the tokens of responses, given by their numbers."""
    if cell.support == "dense":

        def dense(rows: np.ndarray) -> Tensor:
            batch, places = taught.batch(rows)
            teacher = taught.distribution(places[batch["labels"].numpy() >= 0])
            return DIVERGENCES[cell.objective](teacher, whole(student, batch), BETA).mean()

        return dense
    kept = kept_by(cell.support, cell.k, cell.seed, taught, folder)
    if cell.support == "drawn":

        def drawn(rows: np.ndarray) -> Tensor:
            batch, places = taught.batch(rows)
            at = places[batch["labels"].numpy() >= 0]
            s = whole(student, batch).gather(-1, torch.from_numpy(kept.ids[at]).long())
            return drawn_loss(cell.objective, torch.from_numpy(kept.logprobs[at]).float(), s).mean()

        return drawn
    columns = {
        "topk_ids": kept.ids,
        "topk_logprobs": kept.logprobs,
        "tau": kept.tau,
        "tail": kept.tail,
        "own": taught.own,
    }
    x, residuals, known = x_term(cell, taught, folder)
    columns = {name: values for name, values in (columns | known).items() if values is not None}
    divergence = Divergence(cell.objective, BETA, "sampled" if cell.support == "sampled" else "bucket")
    learner = StudentLearner(student, [divergence, *x], residuals)

    def sparse(rows: np.ndarray) -> Tensor:
        batch, places = taught.batch(rows)
        batch |= {name: torch.from_numpy(values[places]) for name, values in columns.items()}
        batch["topk_ids"] = batch["topk_ids"].long()
        batch["topk_logprobs"] = batch["topk_logprobs"].float()
        tokens = (batch["labels"] >= 0).sum()
        return learner(torch.stack([tokens, tokens - len(rows)]), **batch)[0]  # all but the last steps have a residual

    return sparse


def x_term(cell: Cell, taught: Taught, folder: Path) -> tuple[list[Consistency], Scaled | None, dict[str, np.ndarray]]:
    """The X term, sarsa residuals, and the reward's mu and log sigma [N] that come with the batch.

    `oracle`: the teacher's own residuals, the most that a reward can say; `zero` says nothing at the same sigma;
    `frozen`: fitted by the project on these rows. Shuffled ones say what is true of another response.
    """
    if cell.reward == "none":
        return [], None, {}
    rows = rows_of(taught)
    scaled = Scaled.of(rows, "sarsa", RESIDUAL)
    if cell.reward in ("frozen", "shuffled"):
        values = fitted(taught, folder)
    else:
        delta = np.concatenate([teacher_residual(row, "sarsa", RESIDUAL)[0] for row in rows]) / scaled.scale
        values = {"mu": delta * (cell.reward != "zero"), "log_sigma": np.full_like(delta, math.log(SIGMA))}
    if "shuffled" in cell.reward:
        keys, steps = [row.key for row in rows], np.diff(taught.starts)
        by_key = {name: dict(zip(keys, np.split(v, taught.starts[1:-1]), strict=True)) for name, v in values.items()}
        wrong = shuffled(by_key, {"train": SimpleNamespace(keys=keys, response_tokens=steps)}, cell.seed)
        values = {name: np.concatenate([permuted[key] for key in keys]) for name, permuted in wrong.items()}
    return [Consistency(GivenReward(), LAM)], scaled, values


def fitted(taught: Taught, folder: Path) -> dict[str, np.ndarray]:
    """mu and log sigma [N] of the reward that the project fits to these rows; a tenth of them ends the fit."""
    path = folder / "reward.npz"
    if not path.is_file():
        rows, settings = rows_of(taught), Reward(phi_kl=[0.1])
        held = len(rows) // 10
        sources = Sources(folder, folder / "student")
        fit = Fitting(settings, 0, sources, rows[held:], rows[:held], [], folder / "runs", Train()).fit("sarsa")
        values = list(per_row(rows, fit.posterior))
        mu, log_sigma = (np.concatenate(each) for each in zip(*values, strict=True))
        np.savez(path, mu=mu, log_sigma=log_sigma, metrics=json.dumps(fit.metrics))
    with np.load(path) as known:
        return {name: known[name].astype(np.float32) for name in ("mu", "log_sigma")}


def rows_of(taught: Taught, kept: Drawn | None = None, texts: Callable[[np.ndarray], str] = str) -> list[Row]:
    """The responses as rows of the store; `texts` decodes tokens."""
    rows = []
    for number, (response, first, end) in enumerate(
        zip(taught.responses, taught.starts[:-1], taught.starts[1:], strict=True)
    ):
        none = np.zeros((end - first, 0))
        rows.append(Row(
            key=f"{number:032x}", origin="teacher", prompt_id=f"{number:016x}", sample=0,
            prompt=texts(response.prompt_ids), response=texts(response.response_ids),
            prompt_ids=response.prompt_ids, response_ids=response.response_ids,
            finish=response.finish, logprobs=taught.own[first:end], lse=taught.lse[first:end],
            topk_ids=none if kept is None else kept.ids[first:end],
            topk_logprobs=none if kept is None else kept.logprobs[first:end],
            tau=None if kept is None or kept.tau is None else kept.tau[first:end],
            tail=None if kept is None or kept.tail is None else kept.tail[first:end],
        ))  # fmt: skip
    return rows


@torch.no_grad()
def measure(student, held_out: Taught, batch_size: int = 8) -> dict[str, float]:
    """Means over held-out tokens, in nats: KL both ways over the vocabulary, and over the top k and the rest."""
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(held_out.responses), batch_size):
        batch, places = held_out.batch(range(first, min(first + batch_size, len(held_out.responses))))
        t, s = held_out.distribution(places[batch["labels"].numpy() >= 0]), whole(student, batch)
        top = t.topk(min(BOUND, t.shape[-1] - 1), -1).indices
        grouped = (
            torch.cat([x.gather(-1, top), x.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (t, s)
        )
        sums += torch.stack([kl.double().sum() for kl in (forward_kl(t, s), reverse_kl(t, s), forward_kl(*grouped))])
    return dict(zip(("kl", "reverse_kl", "bound"), (sums / len(held_out.tokens)).tolist(), strict=True))


def run(cell: Cell, part: Part, folder: Path) -> dict:
    """Train the cell's student and measure it."""
    torch.manual_seed(cell.seed)
    taught, began = Taught(folder / "train"), time.monotonic()
    student = load_lm(folder / "student")
    if cell.support != "start":
        loss = loss_of(cell, student, taught, folder)
        optimise(student, loss, len(taught.responses), part.steps, part.batch, part.learning_rate, cell.seed)
    trained = time.monotonic() - began
    return asdict(cell) | measure(student, Taught(folder / "held_out")) | {"seconds": trained}


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the file's lock, which ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def read_cells(out: Path) -> dict[Cell, dict]:
    """What is known of each finished cell."""
    path = out / "cells.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    fields = Cell.__dataclass_fields__
    return {Cell(**{name: row[name] for name in fields}): row for row in rows}


def experiment(out: Path, data: Path, parts: Sequence[Part], only: Sequence[str] = (), made=MADE) -> None:
    """Run all cells whose names have the words of `only`, and that are neither finished nor claimed."""
    for part in parts:
        with claimed(out / "claims" / part.name) as free:
            if not free:
                sys.exit(f"another process prepares {part.name}: start this one when {out / part.name} is there")
            if part.name == "text":
                prepare_text(out, data, part, made)
            else:
                prepare_smollm2(out, data, part)
        for cell in cells(part):
            if not all(word in cell.name for word in only):
                continue
            with claimed(out / "claims" / cell.name) as free:
                if not free or cell in read_cells(out):
                    continue
                row = run(cell, part, out / part.name)
                with open(out / "cells.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{cell.name}: KL {row['kl']:.4f}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of scitldr and gsm8k")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", default=(), help="words that a cell's name must have, as in fkl- seed0")
    parser.add_argument("--report", action="store_true", help="print tables of the cells that are finished")
    parser.add_argument("--plot", type=Path, help="with --report: SVG of KL against bytes per token")
    options = parser.parse_args()
    if options.report:
        from tests.benchmarks.supports_report import report

        print(report(options.out, options.plot))
        return
    torch.set_num_threads(1)
    experiment(options.out, options.data, [PARTS[name] for name in options.part], options.only)


if __name__ == "__main__":
    main()
