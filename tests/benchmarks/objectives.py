"""What the objectives cost: one training step of the head, in time and memory, against cross-entropy and dense logits.

`python -m tests.benchmarks.objectives OUT.json [topk|sampled|dense]`: all cases, or those of a top k or of sampled
tokens against cross-entropy, or those against dense logits. Every case runs in a process of its own; times are the
median of interleaved repetitions, memory is the peak of the process above what its inputs take. About 15 minutes on two
cores.
Bars (exit code 1 where one is missed): at most 1.15 times the time and 1.2 times the memory of cross-entropy through
the same chunked head; at V = 50k at least 2 times faster and 3 times smaller than dense logits.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.objectives.avril import gaussian_nll, td_residual
from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.head import Head, Scores, chunked_loss
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.outcomes import TAILS
from pipeline.objectives.sparse import sparse_divergence
from pipeline.objectives.supports import systematic
from tests.references import dense

HIDDEN, POSITIONS, REPETITIONS = 512, 1024, 5
TIME_BAR, MEMORY_BAR, DENSE_TIME_BAR, DENSE_MEMORY_BAR = 1.15, 1.2, 2.0, 3.0
COSTLIEST = ("fkl", "jsd", "skew_rkl", "x-fkl")  # of a top k: whose memory is measured, and all that is above V = 10k
SIZES = {
    "topk": [
        (1_000, 8), (1_000, 128), (10_000, 32), (50_000, 8), (50_000, 64), (50_000, 128), (150_000, 8), (150_000, 128),
    ],
    "sampled": [(1_000, 16), (1_000, 32), (10_000, 16), (10_000, 32), (50_000, 16), (50_000, 32), (150_000, 16)],
}  # fmt: skip
Step = Callable[[], None]


class Inputs:
    """States, a head, labels, a teacher of k tokens per position (its likeliest, or sampled), and frozen rewards."""

    def __init__(self, vocabulary: int, k: int, sampled: bool):
        torch.manual_seed(0)
        self.states = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
        self.weight = (torch.randn(vocabulary, HIDDEN) * 2 * HIDDEN**-0.5).requires_grad_()
        self.labels = torch.randint(vocabulary, (POSITIONS,))
        logprobs, times = torch.log_softmax(self.teacher_logits(vocabulary, 1), -1), POSITIONS // 64
        values, ids = logprobs.topk(k, -1)
        self.teacher = TopK(ids.repeat(times, 1), values.repeat(times, 1))
        if sampled:
            ids, tau = systematic(logprobs.exp(), k, torch.rand(64, dtype=torch.float64))
            own = logprobs[torch.arange(POSITIONS) % 64, self.labels]
            values = logprobs.gather(-1, ids)
            self.teacher = TopK(ids.repeat(times, 1), values.repeat(times, 1), tau.repeat(times), own=own)
        self.mu, self.log_sigma = torch.randn(2, POSITIONS)
        self.followed = torch.arange(POSITIONS) % 32 != 31  # responses of 32 tokens

    @staticmethod
    def teacher_logits(vocabulary: int, times: int = POSITIONS // 64) -> torch.Tensor:
        """[64 * times, V]: 64 different positions, over and over."""
        return (3 * torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(1))).repeat(times, 1)

    def clear(self) -> None:
        self.states.grad = self.weight.grad = None


def consistency(inputs: Inputs, logprob, lse, rows=slice(None)) -> torch.Tensor:
    """The X term with frozen rewards, [n]."""
    followed = inputs.followed[rows]
    delta = td_residual(logprob + lse, lse, followed, followed, 1.0, "sarsa")
    return torch.where(followed, gaussian_nll(delta, inputs.mu[rows], inputs.log_sigma[rows]), 0)


def ours(inputs: Inputs, name: str | None, x: bool, tail: str = "bucket") -> Step:
    """A plain or X- objective, or cross-entropy (None), through the chunked head."""
    weights = {"kd" if name else "nll": 1.0} | ({"td": 0.01} if x else {})

    def terms(scores: Scores, rows: slice) -> dict[str, torch.Tensor]:
        values = {"nll": -scores.logprob} | ({"kd": scores.divergence} if name else {})
        return values | ({"td": consistency(inputs, scores.logprob, scores.lse, rows)} if x else {})

    def step() -> None:
        inputs.clear()
        head, divergence = Head(inputs.weight), sparse_divergence(name, 0.3, tail) if name else None
        teacher = inputs.teacher if name else None
        loss, _ = chunked_loss(head, inputs.states, inputs.labels, terms, weights, teacher, divergence, neighbours=x)
        loss.backward()

    return step


def whole(inputs: Inputs, name: str, x: bool, teacher_logits: torch.Tensor) -> Step:
    """The same objective from [N, V] logits of both models, the teacher's given."""

    def step() -> None:
        inputs.clear()
        logits = inputs.states @ inputs.weight.T
        teacher, student = dense(teacher_logits, logits)
        if name == "fkl":  # torch's own kernels where there are some
            kd = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        elif name == "rkl":
            kd = torch.nn.functional.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
        else:
            kd = DIVERGENCES[name](teacher, student, 0.3)
        loss = kd.sum()
        if x:
            logprob = student.gather(-1, inputs.labels[:, None])[:, 0]
            lse = logits.gather(-1, inputs.labels[:, None])[:, 0] - logprob
            loss = loss + 0.01 * consistency(inputs, logprob, lse).sum()
        loss.backward()

    return step


def median_times(steps: dict[str, Step]) -> dict[str, float]:
    """Seconds per step: the median of repetitions that take turns, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(REPETITIONS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(taken)[REPETITIONS // 2] for name, taken in times.items()}


def peak_above(step: Step) -> int:
    """Bytes of resident memory that the process takes at most during a step, above what it holds before (Linux)."""

    def status(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def variants(table: str) -> list[tuple[str, str, bool, str]]:
    """(label, objective, X-, tail) of one of the tables `topk`, `sampled` and `dense`."""
    tail = "sampled" if table == "sampled" else "bucket"
    cases = [(name, name, False, tail) for name in DIVERGENCES] + [("x-fkl", "fkl", True, tail)]
    if table == "dense":
        cases.append(("x-jsd", "jsd", True, tail))
    if table == "topk":
        cases += [(f"fkl {other}", "fkl", False, other) for other in TAILS if other != tail]
    return cases


def measure(table: str, kind: str, vocabulary: int, k: int, label: str) -> dict:
    """One case in this process: `time` of all variants, or `memory` of the one named."""
    inputs = Inputs(vocabulary, k, table == "sampled")
    logits = Inputs.teacher_logits(vocabulary) if table == "dense" else None
    steps: dict[str, Step] = {"cross-entropy": ours(inputs, None, False)}
    for name, objective, x, tail in variants(table):
        if table == "topk" and vocabulary > 10_000 and name not in COSTLIEST:
            continue
        steps[name] = ours(inputs, objective, x, tail)
        if table == "dense":
            steps[f"dense {name}"] = whole(inputs, objective, x, logits)
    if kind == "time":
        return median_times(steps)
    steps[label]()  # what the libraries allocate once for these shapes
    inputs.clear()
    return {label: peak_above(steps[label])}


def in_process(table: str, kind: str, vocabulary: int, k: int, label: str = "") -> dict:
    case = [table, kind, str(vocabulary), str(k), label]
    # Blocks of 64 KiB and more go back to the system at once, so that resident memory is what is in use.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "memory" else {}
    command = [sys.executable, "-m", "tests.benchmarks.objectives", "--case", *case]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | allocator)
    return json.loads(done.stdout)


def memory(table: str, vocabulary: int, k: int, labels: list[str]) -> dict[str, int]:
    return {name: in_process(table, "memory", vocabulary, k, name)[name] for name in labels}


def by_cross_entropy(table: str) -> list[dict]:
    """Time and memory of every objective by cross-entropy's."""
    rows = []
    labels = COSTLIEST if table == "topk" else [label for label, *_ in variants(table)]
    for vocabulary, k in SIZES[table]:
        taken = in_process(table, "time", vocabulary, k)
        peaks = memory(table, vocabulary, k, ["cross-entropy", *labels])
        shown = []
        for label in (label for label in taken if label != "cross-entropy"):
            ratios = {"time": taken[label] / taken["cross-entropy"]}
            if label in peaks:
                ratios["memory"] = peaks[label] / peaks["cross-entropy"]
            rows.append({"support": table, "vocabulary": vocabulary, "k": k, "objective": label, **ratios})
            shown.append(f"{label} " + "/".join(f"{ratio:.2f}" for ratio in ratios.values()))
        print(
            f"{table}, V {vocabulary:,}, k {k}: time/memory by cross-entropy's ({taken['cross-entropy']:.3f} s): "
            + ", ".join(shown),
            flush=True,
        )
    return rows


def by_dense() -> list[dict]:
    """How much faster and smaller every objective is than from dense logits."""
    rows, names = [], [label for label, *_ in variants("dense")]
    taken = in_process("dense", "time", 50_000, 64)
    peaks = memory("dense", 50_000, 64, [n for label in names for n in (label, f"dense {label}")])
    for label in names:
        row = {"objective": label, "faster": taken[f"dense {label}"] / taken[label]}
        row["smaller"] = peaks[f"dense {label}"] / peaks[label]
        rows.append(row)
        print(
            f"V 50,000, k 64: {label} {row['faster']:.2f} times faster, {row['smaller']:.1f} times smaller than dense"
        )
    return rows


def main(out: Path, tables: Sequence[str]) -> int:
    rows = [row for table in tables if table != "dense" for row in by_cross_entropy(table)]
    dense_rows = by_dense() if "dense" in tables else []
    worst = {name: max((row.get(name, 0.0) for row in rows), default=0.0) for name in ("time", "memory")}
    missed = [row for row in rows if row["time"] > TIME_BAR or row.get("memory", 0) > MEMORY_BAR]
    missed += [row for row in dense_rows if row["faster"] < DENSE_TIME_BAR or row["smaller"] < DENSE_MEMORY_BAR]
    setting = {"hidden": HIDDEN, "positions": POSITIONS, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"setting": setting, "by_cross_entropy": rows, "by_dense": dense_rows, "worst": worst, "missed": missed}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"worst by cross-entropy: time {worst['time']:.2f}, memory {worst['memory']:.2f}; {len(missed)} bars missed")
    for row in missed:
        print(f"MISSED {row}")
    return 1 if missed else 0


if __name__ == "__main__":
    if len(sys.argv) == 7 and sys.argv[1] == "--case":
        print(json.dumps(measure(*sys.argv[2:4], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])))
    elif len(sys.argv) == 2 or (len(sys.argv) == 3 and sys.argv[2] in (*SIZES, "dense")):
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or [*SIZES, "dense"]))
    else:
        sys.exit("usage: python -m tests.benchmarks.objectives OUT.json [topk|sampled|dense]")
