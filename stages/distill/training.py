"""What a distillation is made of: the cached rows that it learns, the student, and the terms of its loss."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.learning.batches import collate
from pipeline.learning.consistency import Consistency
from pipeline.learning.divergence import Divergence
from pipeline.learning.dropout import set_dropout
from pipeline.learning.forward import require_plain_head
from pipeline.learning.job import Training
from pipeline.learning.learner import StudentLearner
from pipeline.learning.terms import Likelihood, Term
from pipeline.learning.trainer import seed_everything
from pipeline.models import load_lm, load_tokenizer, require_context, require_same_tokenizer
from pipeline.objectives.divergences import MIXTURES, label
from pipeline.params import TOKEN_OBJECTIVES, Distill, Lora, Params, Reward
from pipeline.store.selection import Selection
from pipeline.store.training_rows import RowLoader, TeacherRows
from stages.distill.inputs import RewardInputs, reward_inputs


@dataclass
class Distillation:
    """What a student is distilled from."""

    settings: Distill
    form: Reward  # of a posterior that is new
    seed: int
    selection: Selection
    scored: Selection | None  # with the references, for sft
    student_path: Path
    reward_path: Path | None
    rows: dict[str, TeacherRows]  # train, and validation where there are held-out responses
    inputs: RewardInputs
    adapted: object = field(default=None, init=False)  # the PEFT model around the student, where it gets adapters

    @classmethod
    def open(
        cls,
        settings: Distill,
        form: Reward,
        seed: int,
        selection: Path,
        student: Path,
        reward: Path | None = None,
        scored: Path | None = None,
        store: str | None = None,
    ) -> "Distillation":
        """Paths as of `distill`. Raises UserError where tokenizers, vocabularies, residuals or tokens do not match."""
        opened = Selection(selection, store)
        name, on_tokens = name_of(settings, opened.support == "sampled"), settings.objective in TOKEN_OBJECTIVES
        if not on_tokens or settings.reward != "none":
            opened.require_teacher(name)
        if not on_tokens:
            require_tokens(settings, opened, opened.support == "sampled")
        require_same_tokenizer(opened.teacher["tokenizer"], load_tokenizer(student), student)
        references = _opened_scored(opened, scored, store) if settings.objective == "sft" else None
        rows = _rows(settings, opened, references)
        if settings.best and "validation" not in rows:
            raise UserError(f"distill.best needs held-out responses, and {selection} has no part validation")
        inputs = reward_inputs(settings, opened, rows, reward, seed)
        return cls(settings, form, seed, opened, references, student, reward, rows, inputs)

    @property
    def sampled(self) -> bool:
        return self.selection.support == "sampled"

    @property
    def name(self) -> str:
        return name_of(self.settings, self.sampled)

    def training(self) -> Training:
        """The student, with the adapters if it gets any, and its rows. Raises UserError where it cannot say them."""
        settings = self.settings
        seed_everything(self.seed)
        student = load_lm(self.student_path).train()
        require_plain_head(student, f"the student {self.student_path}")
        set_dropout(student, settings.dropout)
        self.adapted = _with_adapters(student, settings.lora) if settings.lora.rank else None
        _require_vocabulary(student.config.get_text_config().vocab_size, self.rows, self.student_path)
        terms = list(self._terms())
        parts = self.rows.values()
        lengths = (pair for part in parts for pair in zip(part.prompt_tokens, part.response_tokens, strict=True))
        require_context(student.config, lengths, f"the student {self.student_path}")
        topk = settings.objective not in TOKEN_OBJECTIVES
        return Training(
            StudentLearner(student, terms, self.inputs.residuals, settings.chunk),
            self.rows["train"],
            self.rows.get("validation", ()),
            partial(collate, topk=topk, extras=self.inputs.extras),
            partial(RowLoader, window=settings.window),
        )

    def _terms(self) -> Iterable[Term]:
        settings, on_tokens = self.settings, self.settings.objective in TOKEN_OBJECTIVES
        yield Likelihood(settings.nll_weight + (1 if on_tokens else 0))
        if not on_tokens:
            tail = _usual_tail(self.sampled) if settings.tail == "auto" else settings.tail
            yield Divergence(settings.objective, mixture_of(settings), tail)
        if settings.reward != "none":
            reward = self.inputs.reward(settings, self.form, self.student_path, self.reward_path)
            yield Consistency(reward, settings.lam)


def training(params: dict, seed: int, **paths: str | None) -> Training:
    """`Distillation.training` of what a job holds."""
    loaded = Params.model_validate(params)
    return Distillation.open(
        loaded.distill, loaded.reward, seed, **{name: path and Path(path) for name, path in paths.items()}
    ).training()


def _with_adapters(student, lora: Lora):
    """The PEFT model around `student`, whose linear layers get adapters in place; nothing else is trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="SEQ_2_SEQ_LM" if student.config.is_encoder_decoder else "CAUSAL_LM",
    )
    return get_peft_model(student, config)


def name_of(settings: Distill, sampled: bool) -> str:
    """The objective as the tables call it: `fkl`, `x-fkl (frozen)`, `jsd(0.5) + 0.5 nll`; a tail that is not auto's."""
    name = label(settings.objective, mixture_of(settings))
    usual = settings.tail in ("auto", _usual_tail(sampled))
    name += "" if usual or settings.objective in TOKEN_OBJECTIVES else f" {settings.tail}"
    name += f" + {settings.nll_weight:g} nll" if settings.nll_weight else ""
    return name if settings.reward == "none" else f"x-{name} ({settings.reward})"


def _usual_tail(sampled: bool) -> str:
    """What tail: auto stands for."""
    return "sampled" if sampled else "bucket"


def require_tokens(settings: Distill, selection: Selection, sampled: bool) -> None:
    """Raises UserError where the cache does not keep the tokens of the teacher that a loss needs."""
    if selection.k == 0:
        raise UserError(
            f"distill.objective: {settings.objective} compares tokens of the teacher's distribution, and "
            f"{selection.folder} keeps none of them (generate.k: 0): generate with a larger generate.k, or use "
            "distill.objective=seqkd"
        )
    if settings.tail == "sampled" and not sampled:
        raise UserError(
            f"distill.tail: sampled needs sampled tokens, and {selection.folder} keeps a plain top k "
            "(generate.support: topk): use distill.tail=auto, or generate with generate.support=sampled"
        )


def mixture_of(settings: Distill) -> float:
    """The weight of the objective's mixture; 0 where it has none."""
    name = MIXTURES.get(settings.objective)
    return getattr(settings, name) if name else 0.0


def _opened_scored(selection: Selection, path: Path | None, store: str | Path | None) -> Selection:
    """The scored references that `sft` learns."""
    if path is None:
        raise UserError("distill.objective: sft learns the scored references: pass --scored (out of the stage score)")
    scored = Selection(path, store)
    scored.require_same_teacher(selection)
    if "references" not in scored.parts:
        raise UserError(f"{path} holds no references: do the training prompts have any?")
    return scored


def _rows(settings: Distill, selection: Selection, scored: Selection | None) -> dict[str, TeacherRows]:
    """The responses to learn and to validate on: the teacher's samples, or the references that were scored."""
    topk = settings.objective not in TOKEN_OBJECTIVES
    if scored is None:
        parts = [name for name in ("train", "validation") if name in selection.parts]
        rows = {name: TeacherRows(selection, name, topk, text=False) for name in parts}
        if not len(rows.get("train", ())):
            raise UserError(f"{selection.folder} holds no training responses")
        return rows
    rows = {"train": TeacherRows(scored, "references", topk, text=False)}
    held_out = TeacherRows(selection, "scored", topk, "reference", text=False) if "scored" in selection.parts else ()
    return rows | ({"validation": held_out} if len(held_out) else {})


def _require_vocabulary(size: int, rows: dict[str, TeacherRows], student: Path) -> None:
    """Raises UserError where a response has a token that the student cannot say.

    The teacher's top k may have such tokens: the padding of a larger embedding counts to the tail.
    """
    for part in rows.values():
        if unknown := part.beyond(size):
            row, highest = unknown
            raise UserError(
                f"row {row.key} (prompt '{row.prompt_id}') has token {highest}, and the student {student} has {size} "
                "embeddings: use a student whose vocabulary is as large as the teacher's"
            )
