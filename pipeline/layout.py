"""Where an experiment keeps its files: from a root every path under data/ and runs/, each spelled here alone.

`data/README.md` says what each folder holds. Two experiments whose roots differ share nothing but the store.
"""

from pathlib import Path

RESULTS = "results.json"  # what a stage measured, what it cost and what it was made from


class Layout:
    """The paths of one experiment."""

    def __init__(self, root: str | Path = ".", data: str | Path | None = None):
        """data: the folder that the stages fill, if it is not the `data` of `root`."""
        self.root = Path(root)
        self.params = self.root / "params.yaml"
        self.runs = self.root / "runs"  # checkpoints of unfinished training
        data = self.data = self.root / "data" if data is None else Path(data)
        self.prompts = data / "prompts" / "prompts.parquet"
        self.tokenizer = data / "tokenizer"
        self.teacher, self.start = self.model("teacher"), self.model("student")
        self.selection = data / "teacher"  # what the teacher said
        self.answers = data / "answers"  # the teacher's answers to the test prompts
        self.scored = data / "scored"  # the teacher's scores of other responses
        self.samples = data / "samples"  # the student's samples
        self.reward, self.audit = data / "reward", data / "audit"
        self.student, self.plain = data / "student", data / "plain"
        self.rounds, self.plain_rounds = data / "rounds", sibling(self.plain, "rounds")  # on-policy, as scored
        self.distillation = data / "distill"  # curves
        self.evaluation = data / "evaluation"
        self.predictions = self.evaluation / "predictions.parquet"
        self.report = data / "report.html"

    def model(self, role: str) -> Path:
        """The teacher's folder, or that of the student's starting point."""
        return self.data / "models" / role

    def results(self, stage: str, role: str = "") -> Path:
        """The results.json of a stage; role: for `teach`, which has one per model."""
        folder = {"reward": self.audit, "evaluate": self.evaluation}.get(stage, self.data / stage)
        return folder / role / RESULTS

    @property
    def selections(self) -> tuple[Path, ...]:
        """The folders of selections."""
        return self.selection, self.answers, self.scored, self.samples, self.rounds, self.plain_rounds


def sibling(out: Path, what: str) -> Path:
    """Where a student or a reward that is not the pipeline's own has its curves (`metrics`) or its `audit`."""
    return out.with_name(f"{out.name}-{what}")


def counts_of(prompts: Path) -> Path:
    """Where the counts of a prompt file are: beside it, apart from those of the pipeline's own `prompts.parquet`."""
    return prompts.with_name("counts.json" if prompts.name == Layout().prompts.name else f"{prompts.stem}-counts.json")
