"""What a distillation is made of: the cached rows that it learns, the student, and the terms of its loss."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.learning.batches import collate
from pipeline.learning.closeness import load_teacher
from pipeline.learning.consistency import Consistency
from pipeline.learning.dense import DenseDivergence
from pipeline.learning.divergence import Divergence
from pipeline.learning.dropout import set_dropout
from pipeline.learning.forward import require_plain_head
from pipeline.learning.job import Training
from pipeline.learning.learner import StudentLearner
from pipeline.learning.minillm import MiniLLM
from pipeline.learning.policy_gradient import PolicyGradient
from pipeline.learning.rounds import RoundLoader, RoundRows, schedule
from pipeline.learning.terms import Likelihood, Term
from pipeline.learning.trainer import seed_everything
from pipeline.models import load_lm, load_tokenizer, require_context, require_same_tokenizer, stop_token_ids
from pipeline.objectives.divergences import MIXTURES, label
from pipeline.params import TOKEN_OBJECTIVES, Distill, Lora, Params
from pipeline.store.requests import open_store
from pipeline.store.selection import Selection
from pipeline.store.training_rows import RowLoader, TeacherRows
from stages.distill.answering import Answering
from stages.distill.extras import SampleExtras
from stages.distill.inputs import RewardInputs, reward_inputs
from stages.distill.live import LiveRounds
from stages.distill.rounds import StoredRounds
from stages.distill.student import TrainedStudent


@dataclass(frozen=True)
class Paths:
    """What a distillation reads and, for on-policy rounds, writes."""

    selection: Path
    student: Path  # its starting point
    reward: Path | None = None
    scored: Path | None = None  # with the references, for sft
    store: str | None = None
    prompts: Path | None = None  # of which the student answers some in on-policy rounds
    rounds: Path | None = None  # selection of these rounds

    def as_texts(self) -> dict[str, str | None]:
        """As a job holds them."""
        return {name: None if value is None else str(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, **paths: str | Path | None) -> "Paths":
        """From texts, as a job holds them."""
        store = paths.pop("store", None)
        return cls(**{name: path and Path(path) for name, path in paths.items()}, store=store and str(store))


@dataclass
class Distillation:
    """What a student is distilled from."""

    params: Params
    seed: int
    paths: Paths
    selection: Selection
    scored: Selection | None  # with the references, for sft
    rows: dict[str, TeacherRows]  # train, and validation where there are held-out responses
    inputs: RewardInputs
    answering: Answering | None  # None without on-policy rounds
    student: TrainedStudent = field(default=None, init=False)
    rounds: StoredRounds | LiveRounds | None = field(default=None, init=False)

    @classmethod
    def open(cls, params: Params, seed: int, paths: Paths) -> "Distillation":
        """Raises UserError where tokenizers, vocabularies, residuals, tokens or teachers do not match."""
        settings, opened = params.distill, Selection(paths.selection, paths.store)
        name = name_of(settings, opened.support == "sampled")
        if settings.objective not in TOKEN_OBJECTIVES or settings.reward != "none":
            opened.require_teacher(name)
        if settings.reads_tokens:
            require_tokens(settings, opened, opened.support == "sampled")
        require_same_tokenizer(opened.teacher["tokenizer"], load_tokenizer(paths.student), paths.student)
        references = _opened_scored(settings, opened, paths) if settings.learns_references else None
        rows = _rows(settings, opened, references)
        if settings.best and "validation" not in rows:
            raise UserError(f"distill.best needs held-out responses, and {paths.selection} has no part validation")
        inputs = reward_inputs(settings, opened, rows, paths.reward, seed)
        answering = None
        if chosen := settings.rounds:
            if params.train.processes > 1:
                raise UserError("distill.on_policy: rounds are made in one process: set train.processes=1")
            if paths.prompts is None:
                raise UserError("distill.on_policy: the student answers prompts anew: pass --prompts")
            rounds = schedule(settings.optimisation.steps, chosen.refreshes, chosen.every)
            answering = Answering.of(params, paths.prompts, opened.teacher, rounds)
        return cls(params, seed, paths, opened, references, rows, inputs, answering)

    @property
    def settings(self) -> Distill:
        return self.params.distill

    @property
    def sampled(self) -> bool:
        return self.selection.support == "sampled"

    @property
    def name(self) -> str:
        return name_of(self.settings, self.sampled)

    def training(self, run: Path) -> Training:
        """The student, with the adapters if it gets any, and its rows. Raises UserError where it cannot say them.

        run: the run folder, where rounds are kept for a killed run.
        """
        settings, start = self.settings, self.paths.student
        seed_everything(self.seed)
        student = load_lm(start).train()
        require_plain_head(student, f"the student {start}")
        set_dropout(student, settings.dropout)
        adapted = _with_adapters(student, settings.lora) if settings.lora.rank else None
        self.student = TrainedStudent(student, adapted, load_tokenizer(start), self.stops)
        _require_vocabulary(student.config.get_text_config().vocab_size, self.rows, start)
        if self.answering:
            self.rounds = self._rounds(run / "on_policy")
        terms = list(self._terms())
        parts = self.rows.values()
        lengths = (pair for part in parts for pair in zip(part.prompt_tokens, part.response_tokens, strict=True))
        require_context(student.config, lengths, f"the student {start}")
        rows, loader = self.rows["train"], partial(RowLoader, window=settings.window)
        if self.rounds:
            rows, loader = self._round_rows(), RoundLoader
        return Training(
            StudentLearner(student, terms, self.inputs.residuals, settings.chunk),
            rows,
            self.rows.get("validation", ()),
            partial(collate, topk=settings.reads_tokens, extras=self.inputs.extras),
            loader,
        )

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids of the tokens that end the student's responses, as they end those that it learns from."""
        drawn = self.selection.parts.get("train", {}).get("request", {}).get("sampling")  # absent of given responses
        if drawn:
            return tuple(drawn["stop_token_ids"])
        return stop_token_ids(self.paths.student, load_tokenizer(self.paths.student))

    def _rounds(self, folder: Path) -> StoredRounds | LiveRounds:
        settings, chosen = self.settings, self.answering.settings
        fitted = self.paths.reward / settings.td if settings.reward in ("frozen", "shuffled") else None
        extras = SampleExtras(settings, fitted, self.paths.student, self.seed)
        held_out = TeacherRows(self.selection, "validation", text=False) if "validation" in self.selection.parts else ()
        teachers = [held_out[number] for number in range(min(chosen.validation, len(held_out)))]
        if chosen.scores == "store":
            storage, topk = open_store(self.paths.store), settings.reads_tokens
            places = storage, folder, self.paths.rounds
            return StoredRounds(self.answering, *places, self.student, teachers, topk, extras)
        teacher = load_teacher(self.params.generate, self.selection.teacher)
        return LiveRounds(self.answering, folder, self.paths.rounds, self.student, teacher, teachers, extras)

    def _round_rows(self) -> RoundRows:
        chosen, size = self.answering.settings, self.settings.optimisation.batch_size
        return RoundRows(
            self.answering.schedule, self.rounds.own, self.rows["train"], size, chosen.share, chosen.replay, self.seed,
            self.inputs.extras or {},
        )  # fmt: skip

    def _terms(self) -> Iterable[Term]:
        settings, objective = self.settings, self.settings.objective
        tail = _usual_tail(self.sampled) if settings.tail == "auto" else settings.tail
        teacher = self.rounds.teacher if self.answering and self.answering.settings.scores == "dense" else None
        if objective != "minillm":
            yield Likelihood(settings.nll_weight + (objective in TOKEN_OBJECTIVES))
        if objective == "minillm":
            yield MiniLLM(settings.clip, settings.minillm.single_step, settings.minillm.text, tail, teacher)
        elif objective == "opd":
            yield PolicyGradient("opd", settings.clip)
        elif teacher:
            yield DenseDivergence(teacher, settings.divergence, mixture_of(settings))
        elif objective not in TOKEN_OBJECTIVES:
            yield Divergence(settings.divergence, mixture_of(settings), tail)
        if settings.reward != "none":
            reward = self.inputs.reward(settings, self.params.reward, self.paths.student, self.paths.reward)
            yield Consistency(reward, settings.lam)


def training(params: dict, seed: int, run: str, **paths: str | None) -> Training:
    """`Distillation.training` of what a job holds."""
    return Distillation.open(Params.model_validate(params), seed, Paths.of(**paths)).training(Path(run))


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
    name = label(settings.divergence, mixture_of(settings)).replace(settings.divergence, settings.objective)
    usual = settings.tail in ("auto", _usual_tail(sampled))
    name += f" {settings.tail}" if settings.reads_tokens and not usual else ""
    name += f" + {settings.nll_weight:g} nll" if settings.nll_weight else ""
    name = name if settings.reward == "none" else f"x-{name} ({settings.reward})"
    chosen = settings.on_policy
    if chosen.refreshes:
        return f"{name}, {chosen.refreshes} refresh{'es' * (chosen.refreshes > 1)}"
    steps = "step" if chosen.every == 1 else f"{chosen.every} steps"
    return f"{name}, a refresh every {steps}" if chosen.every else name


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
    name = MIXTURES.get(settings.divergence)
    return getattr(settings, name) if name else 0.0


def _opened_scored(settings: Distill, selection: Selection, paths: Paths) -> Selection:
    """The scored references that `sft` learns."""
    if paths.scored is None:
        raise UserError(
            f"distill.objective: {settings.objective} learns the scored references: pass --scored (out of the stage "
            "score)"
        )
    scored = Selection(paths.scored, paths.store)
    scored.require_same_teacher(selection)
    if "references" not in scored.parts:
        raise UserError(f"{paths.scored} holds no references: do the training prompts have any?")
    return scored


def _rows(settings: Distill, selection: Selection, scored: Selection | None) -> dict[str, TeacherRows]:
    """The responses to learn and to validate on: the teacher's samples, or the references that were scored."""
    topk = settings.reads_tokens
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
