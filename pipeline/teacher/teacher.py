"""Who is asked: a teacher, or a student whose own samples are wanted, before any weights are loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import models
from pipeline.engines import Loading, choose_engine, replica_engine, require_supported
from pipeline.files import digest
from pipeline.models import Context
from pipeline.params import Generate, Params
from pipeline.prompts import TEMPLATE_VERSION, PromptFormat
from pipeline.store.identity import Request, Sampling


@dataclass(frozen=True)
class Teacher:
    """A model that is asked, its identity in the store, and how it is to be loaded."""

    source: Path
    engine: str
    tokenizer: object
    description: dict
    k: int  # tokens per position; 0 where no teacher is run
    stops: tuple[int, ...]
    context: Context
    support: str | None  # which tokens: sampled or topk; None where no teacher is run
    loading: Loading  # its context is not known before orders are
    role: str = "teacher"  # or student, in messages

    @classmethod
    def of(cls, settings: Generate) -> "Teacher":
        """The one that the parameters name. Raises UserError where it or its tokenizer cannot be found."""
        source, text_only = models.local_folder(settings.teacher), settings.engine == "text"
        seq2seq = not text_only and models.load_config(source).is_encoder_decoder
        engine = model_engine = choose_engine(settings.engine, seq2seq)
        if engine == "ray":
            model_engine = replica_engine(settings, seq2seq)
        require_supported(model_engine, settings)
        tokenizer = models.load_tokenizer(source)
        description = _describe(settings, model_engine, tokenizer)
        known, ids = vocabulary(tokenizer), description["vocab_size"]  # ids are what a position can keep
        if settings.support == "sampled":
            ids = min(ids, known)
        loading = Loading(
            description["dtype"], 0, settings.tensor_parallel, settings.pipeline_parallel, settings.quantization,
            settings.replicas, model_engine, dict(settings.engine_options), settings.rows_per_shard,
            None if text_only else known,
        )  # fmt: skip
        k, support = (0, None) if text_only else (min(settings.k, ids), settings.support)
        context = Context(None) if text_only else Context.of(models.load_config(source))
        stops = models.stop_token_ids(source, tokenizer)
        return cls(source, engine, tokenizer, description, k, stops, context, support, loading)

    def student(self, source: Path, batch_size: int, engine: str = "hf", name: str = "student") -> "Teacher":
        """A student of this teacher, whose samples are wanted with no more than their own log-probabilities.

        It reads the prompts as the teacher does, and ends where the teacher would. engine: hf, vllm, or ray, which runs
        copies of hf. name: what the store's listings call it, where it is no model of the hub. Raises UserError where
        it has another tokenizer, or the engine cannot serve.
        """
        models.require_same_tokenizer(self.description["tokenizer"], models.load_tokenizer(source), source)
        description = models.describe_model(source, "float32")
        description["name"] = description["name"] or name
        config = models.load_config(source)
        loading = Loading(
            description["dtype"], 0, replicas=self.loading.replicas, replica_engine="hf", rows=self.loading.rows,
            batch_size=batch_size,
        )  # fmt: skip
        engine, context = choose_engine(engine, config.is_encoder_decoder), Context.of(config)
        return replace(
            self, source=Path(source), engine=engine, description=description, k=0, context=context, support="topk",
            loading=loading, role="student",
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """Its name in the store."""
        return self.description["identity"]


def vocabulary(tokenizer) -> int:
    """How many ids a tokenizer has, one more than its highest: a model's embedding may be padded to more."""
    return max(tokenizer.get_vocab().values()) + 1


def _describe(settings: Generate, engine: str, tokenizer) -> dict:
    if engine == "text":  # no weights are needed: what counts is how text becomes tokens
        tokens = models.tokenizer_identity(tokenizer)[:16]
        return {
            "identity": digest({"text": tokens})[:16], "tokenizer": tokens, "vocab_size": len(tokenizer), "dtype": None,
            "licence": None, "name": "text only", "commit": None,
        }  # fmt: skip
    teacher = models.describe_model(settings.teacher, settings.dtype, settings.quantization)
    if engine == "stub":  # fake answers must never be found under a real teacher's identity
        teacher |= {"identity": digest({"stub": teacher["identity"]})[:16], "name": "stub"}
    return teacher


def sampling_request(params: Params, teacher: Teacher, temperature: float, top_p: float = 1.0) -> Request:
    """The request that responses are drawn with."""
    chat = PromptFormat.of(params).chat_identity(teacher.tokenizer)
    sampling = Sampling(temperature, top_p, params.max_tokens, teacher.stops)
    return Request("sample", params.template, TEMPLATE_VERSION, params.seed, sampling, chat)


def scoring_request(params: Params, teacher: Teacher) -> Request:
    """The request that given responses are scored with."""
    chat = PromptFormat.of(params).chat_identity(teacher.tokenizer)
    return Request("score", params.template, TEMPLATE_VERSION, chat=chat)
