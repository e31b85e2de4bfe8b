"""Parameters of the reward and of distillation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.base import (
    Count,
    Dropout,
    Float,
    NonNegativeFloat,
    Optimisation,
    Positive,
    PositiveFloat,
    Section,
    Share,
)
from pipeline.params.on_policy import OnPolicy

TOKEN_OBJECTIVES = ("sft", "seqkd")  # losses on tokens alone, without a teacher's distribution
# Parameters of `distill` that do not change its result (apart from the rounding of sums): how a run is logged, how fast
# it goes and what is trained beside it. DVC does not track them, and a killed run can go on with other values.
OBSERVING = frozenset({"chunk", "log_every", "plain", "report_to", "workers"})
X_TERM = frozenset({"reward", "lam", "kl_weight", "td", "residual"})  # of `distill`: no effect on the plain loss


class Residual(Section):
    q_source: Literal["logits", "logprobs"]
    """Q-values: the raw logits (need the cache's lse) or their log-softmax."""
    gamma: Annotated[Float, Field(gt=0, le=1)]
    """Discount."""
    terminal: Literal["drop", "zero"]
    """The last step: left out, or with a next value of zero."""


class Reward(Section):
    sarsa: Residual = Residual(q_source="logits", gamma=1.0, terminal="drop")
    """Residuals of the posterior that distillation reads (TD form `sarsa`)."""
    soft: Residual = Residual(q_source="logprobs", gamma=1.0, terminal="zero")
    """Residuals of the posterior that is audited and ranked with (TD form `soft`); by default it includes EOS."""
    head: Literal["action", "state"] = "action"
    """mu from an output per action at s_t, or from the state after the action."""
    encoder: Literal["separate", "own"] = "separate"
    """States of a copy of the student that is trained with the reward, or of the student, which is not changed."""
    fit: Literal["teacher", "policy"] = "teacher"
    """Explain the teacher's own cached Q-values, or those of a policy that is trained with it on its samples (AVA)."""
    lam: NonNegativeFloat = 0.03
    """Weight of the TD term in that policy's loss; only used with fit: policy."""
    negatives: Literal["choose", "never", "always"] = "choose"
    """Scored negatives in the soft fit: choose fits with and without, and keeps what ranks held-out prompts better."""
    sigma_min: PositiveFloat = 0.3
    """Floor of the posterior's deviation, in units of the residuals' own deviation c."""
    phi_kl: Annotated[list[NonNegativeFloat], Field(min_length=1)] = [0.03, 0.1, 0.3]
    """Candidate weights of KL(q || prior); the one with the best held-out likelihood is kept."""
    patience: Positive = 3
    """Held-out evaluations without improvement before a fit stops."""
    evaluate_every: Positive = 25
    """Steps between held-out evaluations."""
    optimisation: Optimisation = Optimisation(steps=300, batch_size=32, learning_rate=2e-3)
    bootstrap: Positive = 1000
    """Resamples for the audit's intervals."""

    @model_validator(mode="after")
    def _policies_see_no_negatives(self):
        if self.fit == "policy" and self.negatives == "always":
            raise ValueError(
                "fit: policy learns to imitate the teacher, so it takes no negatives: set negatives: never"
            )
        return self


class Lora(Section):
    rank: Count = 0
    """Rank of the adapters on all linear layers of the blocks; 0: all weights are trained."""
    alpha: PositiveFloat = 16
    """Scale of the adapters, divided by the rank."""
    dropout: Dropout = 0.0
    """Dropout before the adapters."""


class MiniLLM(Section):
    """Of the objective minillm alone; its rounds are of 256 prompts and four epochs where on_policy says nothing."""

    scale: PositiveFloat = 0.5
    """What log T - log S of a token is divided by to be its reward."""
    reward_clip: PositiveFloat = 100.0
    """Largest absolute reward."""
    length: Literal["discounted", "plain"] = "discounted"
    """What a token's return is divided by: the discounted number of tokens that remain, or their number."""
    single_step: NonNegativeFloat = 1.0
    """Weight of KL(S || T) at the states of the samples."""
    text: NonNegativeFloat = 1.0
    """Weight of the references: half their likelihood, half KL(T || S) on them."""


class Distill(Section):
    objective: Literal[
        "sft", "seqkd", "fkl", "rkl", "jsd", "skew_fkl", "skew_rkl", "tvd", "gkd", "opd", "minillm"
    ] = "fkl"  # fmt: skip
    """Distillation loss; gkd (jsd, each step anew), opd and minillm learn from the student's own samples."""
    beta: Share = 0.5
    """Mixture weight of jsd and gkd (0 is fkl, 1 is rkl)."""
    alpha: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    """Mixture weight of skew_fkl and skew_rkl: that of the first-named distribution (DistiLLM)."""
    tail: Literal["auto", "sampled", "bucket", "renorm", "teacher_renorm", "truncate"] = "auto"
    """Mass outside the kept tokens; auto: an unbiased estimate (sampled) of sampled rows, else one outcome (bucket)."""
    clip: PositiveFloat = 0.2
    """How far the student's probability of a token over its earlier one may be from 1 (PPO's epsilon; opd, minillm)."""
    discount: Share | Literal["auto"] = "auto"
    """Weight of the next token's reward in a token's return, of the one after squared, ...; auto: 0, minillm 0.95."""
    minillm: MiniLLM = MiniLLM()
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the teacher's tokens, added to the loss."""
    reward: Literal["none", "frozen", "joint", "scratch", "zero", "shuffled"] = "frozen"
    """none: the plain loss; else X-: the fitted posterior, one trained further, a new one, or a useless control."""
    plain: bool = True
    """Also train with the plain loss, from the same start on the same cache, to compare the X term with."""
    lam: NonNegativeFloat = 0.01
    """Weight of the TD consistency term."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of KL(q || prior); only used with reward: scratch."""
    td: Literal["sarsa", "soft"] = "sarsa"
    """Form of the TD residual."""
    residual: Residual = Residual(q_source="logits", gamma=1.0, terminal="drop")
    """Must be the residual that the reward was fitted with."""
    optimisation: Optimisation = Optimisation(steps=1600, batch_size=32, learning_rate=3e-3)
    chunk: Count = 0
    """Response positions that go through the language-model head at once; 0: as many as fill 64 MiB of logits."""
    workers: Count = 0
    """Extra processes that decode the cached rows; 0: the training process itself."""
    window: Positive = 1
    """Batches that are sorted by length together, which saves padding; 1: batches mix lengths, which teaches more."""
    log_every: Positive = 20
    """Steps between logged points of the training curve."""
    evaluate_every: Positive = 100
    """Steps between held-out evaluations."""
    save_every: Positive = 100
    """Steps between checkpoints that a killed run resumes from; the last step has one too."""
    seed: Count = 0
    """Added to the seed in this stage: for another run on the same cached teacher and reward."""
    best: Literal["", "loss", "kd", "nll"] = ""
    """Keep the student with the lowest held-out value of this term (save_every = evaluate_every); empty: the last."""
    patience: Count = 0
    """Held-out evaluations without improvement of `best` before training stops; 0: train to the end."""
    dropout: Dropout = 0.0
    """Dropout of the student during training, instead of the rates in its configuration, which is saved unchanged."""
    lora: Lora = Lora()
    """Train low-rank adapters (LoRA, arXiv 2106.09685) and merge them into the student at the end."""
    on_policy: OnPolicy = OnPolicy()
    """Rounds of the student's own samples."""
    report_to: list[str] = []
    """Trackers to log the run to (tensorboard, wandb, mlflow, dvclive, ...); each must be installed."""

    @model_validator(mode="after")
    def _fits_together(self):
        if self.patience and not self.best:
            raise ValueError(
                "patience counts evaluations without a better held-out value: set best to loss, kd or nll as well"
            )
        if self.best and self.save_every != self.evaluate_every:
            raise ValueError(
                "best keeps one of the checkpoints, so every evaluation needs one: set save_every "
                f"({self.save_every}) to evaluate_every ({self.evaluate_every})"
            )
        if self.best == "kd" and self.objective in (*TOKEN_OBJECTIVES, "opd"):
            raise ValueError(f"objective {self.objective} has no term kd: set best to loss or nll")
        if self.reward == "scratch" and self.lam > self.kl_weight:
            raise ValueError(
                f"lam ({self.lam}) above kl_weight ({self.kl_weight}) with reward: scratch rewards a vanishing sigma "
                "without bound (a token's loss goes as (lam - kl_weight) * log sigma): lower lam or raise kl_weight"
            )
        return self

    @property
    def divergence(self) -> str:
        """The name of the divergence that the objective is made of; its own where it is none."""
        return {"gkd": "jsd", "minillm": "rkl"}.get(self.objective, self.objective)

    @property
    def reads_tokens(self) -> bool:
        """Whether the loss reads the teacher's kept tokens."""
        dense = self.rounds is not None and self.rounds.scores == "dense"
        return not dense and self.objective not in (*TOKEN_OBJECTIVES, "opd")

    @property
    def rounds(self) -> OnPolicy | None:
        """How the student's own samples are learned from, with nothing left to choose; None where they are not."""
        settings, name = self.on_policy, self.objective
        usual = {
            "scores": "live" if name == "gkd" else "store",
            "share": 0.5 if name == "gkd" or (name == "minillm" and self.minillm.text) else 1.0,
            "mixture": 0.2 if name == "minillm" else 0.0,
        }
        chosen = {key: value for key, value in usual.items() if getattr(settings, key) == "auto"}
        settings = settings.model_copy(update=chosen)
        if name == "gkd" and not settings.on:
            settings = settings.model_copy(update={"every": 1})
        if name == "minillm" and not settings.on:
            prompts, rows = settings.prompts or 256, max(self.optimisation.batch_size * settings.share, 1)
            every = max(round(4 * prompts * settings.samples / rows), 1)
            settings = settings.model_copy(update={"prompts": prompts, "every": every})
        return settings if settings.on else None

    @property
    def gamma(self) -> float:
        """The discount of a policy gradient's rewards."""
        return self.discount if self.discount != "auto" else 0.95 if self.objective == "minillm" else 0.0

    @property
    def learns_references(self) -> bool:
        """Whether the data are references, which `score` has scored, and not the teacher's samples."""
        return self.objective in ("sft", "minillm")

    @model_validator(mode="after")
    def _student_samples_fit(self):
        rounds, name = self.rounds, self.objective
        if name == "opd" and (rounds is None or (rounds.share, rounds.temperature) != (1, 1)):
            raise ValueError(
                "objective opd is a policy gradient on the student's own samples, drawn at temperature 1: set "
                "on_policy.refreshes or on_policy.every, on_policy.share: 1 and on_policy.temperature: 1"
            )
        if name == "minillm" and rounds.temperature != 1:
            raise ValueError(
                "objective minillm weights samples by their probabilities at temperature 1: set "
                "on_policy.temperature: 1"
            )
        if name == "minillm" and rounds.share == 1 and self.minillm.text:
            raise ValueError(
                "objective minillm learns from references too, and with on_policy.share: 1 it gets none: set it below "
                "1, or minillm.text: 0"
            )
        if rounds is not None and rounds.mixture and name != "minillm":
            raise ValueError(
                f"on_policy.mixture ({rounds.mixture:g}) is for objective minillm, which weights such samples: for "
                f"objective {name} set it to 0"
            )
        if rounds is None:
            return self
        if name in TOKEN_OBJECTIVES or self.nll_weight:
            what = "nll_weight" if self.nll_weight else f"objective {name}"
            raise ValueError(
                f"{what} is the likelihood of given tokens, and with on_policy they would be the student's own, which "
                "teaches it nothing: choose a divergence without nll_weight, or turn on_policy off"
            )
        if self.reward in ("joint", "scratch"):
            raise ValueError(
                f"reward: {self.reward} fits the reward while the student trains, and on the student's own samples it "
                "would explain the student and not the teacher: use reward: frozen (or none) with on_policy"
            )
        if self.window > 1:
            raise ValueError("window sorts batches of the cache by length, and on_policy mixes its own: set window: 1")
        if rounds.refreshes > self.optimisation.steps:
            raise ValueError(
                f"on_policy.refreshes ({rounds.refreshes}) are more than the training has steps "
                f"({self.optimisation.steps})"
            )
        if rounds.scores == "dense" and name == "opd":
            raise ValueError("objective opd needs no more than the teacher's word on the sample: use scores: live")
        return self

    @model_validator(mode="after")
    def _draws_the_student_to_the_teacher(self):
        mixed = self.divergence == "jsd" and self.beta == 1
        name = f"{self.objective} with beta: 1" if mixed else self.objective
        reverse = mixed or self.divergence == "rkl"
        if self.tail == "teacher_renorm" and reverse:
            raise ValueError(
                f"objective {name} is infinite with tail: teacher_renorm, where the teacher has no mass outside its "
                "top k and the student always has some; its sum over the k alone pushes 63 % of the mass out of them: "
                "use tail: bucket (or renorm)"
            )
        if self.tail == "truncate" and (reverse or self.objective == "skew_rkl"):
            raise ValueError(
                f"objective {name} with tail: truncate is not smallest where the student is the teacher: over the top "
                "k alone the sum of S log(S / T) is smallest at S = T / e, so it pushes 63 % of the mass or more out "
                "of them: use tail: bucket (or renorm)"
            )
        return self
