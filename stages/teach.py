"""Make a model: new, from a base, cut to fewer layers; and fine-tune it on references."""

import json
import shutil
from functools import partial
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.learning.dropout import set_dropout
from pipeline.learning.forward import require_plain_head
from pipeline.learning.job import Job, Training
from pipeline.learning.launch import launch
from pipeline.learning.learner import StudentLearner
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import seed_everything
from pipeline.models import (
    build_causal_lm,
    build_from_config,
    has_weights,
    keep_layers,
    licence_of,
    link_model,
    load_config,
    load_lm,
    load_tokenizer,
    local_folder,
    require_context,
    require_own_model,
    save_model,
    stop_token_ids,
    tokenizer_identity,
    weights_digest,
)
from pipeline.outputs import is_results, require_apart, require_can_write, require_own_file
from pipeline.params import Params, Role, Teach
from pipeline.prompts import PromptFormat, encode_response, read_prompts
from pipeline.provenance import code_fingerprint, fingerprint
from pipeline.results import write_results
from pipeline.store.schema import Row

CONTEXT = 256  # longest sequence of new models
_SEED_OFFSET = {"teacher": 0, "student": 1}  # the two must not start from the same weights


def teach(
    params: Params,
    role: Role,
    prompts_path: Path,
    tokenizer_path: Path,
    out: Path,
    runs: Path,
    results: Path | None = None,
) -> None:
    """Make the model for `role` and save it to `out`: new or from a base, cut, trained on the references of its split.

    A base that is neither cut nor trained is not copied: `out` becomes a link to it. results: file for what it took.
    """
    settings: Teach = getattr(params.teach, role)
    require_apart({"--out": out}, {"--runs": runs / "teach"})
    require_own_model(out)
    if results is not None:
        require_own_file(results, partial(is_results, stage="teach"))
    require_can_write(runs)
    if settings.base and not settings.layers and not settings.optimisation.steps and has_weights(settings.base):
        link_model(out, settings.base, weights_digest(local_folder(settings.base)))
        if results is not None:
            write_results(results, "teach", {"role": role})
        console.facts(f"{role} taken as it is", [("model", settings.base), ("link", out)])
        return
    seed = params.seed + _SEED_OFFSET[role]
    seed_everything(seed)
    model, tokenizer, stops = _starting_point(settings, tokenizer_path, seed)
    facts = [("parameters", f"{model.num_parameters():,}")]
    job = None
    if settings.optimisation.steps:
        job = _job(params, role, seed, prompts_path, tokenizer_path, tokenizer, runs)
        made = _training(params, role, model, tokenizer, prompts_path)
        trained = launch(job, made)
        loss = next((entry["loss"] for entry in reversed(trained.history) if "loss" in entry), float("nan"))
        facts.append(("pairs", f"{len(made.rows):,} of split {settings.split}"))
        facts.append(("last loss", f"{loss:.4f} nats per token"))
    save_model(out, model, tokenizer, _card(role, settings), stops)
    if job is not None:
        shutil.rmtree(job.run, ignore_errors=True)
    if results is not None:
        write_results(results, "teach", {"role": role})
    console.facts(f"{role} made", [*facts, ("model", out)])


def _starting_point(settings: Teach, tokenizer_path: Path, seed: int):
    """Model, tokenizer and stop tokens before any training."""
    if not settings.base:
        tokenizer = load_tokenizer(tokenizer_path)
        return build_causal_lm(settings.model, tokenizer, CONTEXT, seed), tokenizer, None
    if not has_weights(settings.base):
        tokenizer, config = load_tokenizer(tokenizer_path), load_config(settings.base)
        if settings.layers:
            config.num_hidden_layers = settings.layers
        return build_from_config(config, tokenizer, seed), tokenizer, None
    model, tokenizer = load_lm(settings.base), load_tokenizer(settings.base)
    if settings.layers:
        keep_layers(model, settings.layers)
    return model, tokenizer, stop_token_ids(settings.base, tokenizer)


def _job(params: Params, role: Role, seed: int, prompts_path: Path, tokenizer_path: Path, tokenizer, runs: Path) -> Job:
    """The training; its checkpoints are resumed by a run of the same inputs and the same code alone."""
    settings: Teach = getattr(params.teach, role)
    of = [role, params.template, params.chat, params.system, seed, settings.model_dump(), fingerprint(prompts_path)]
    of += [tokenizer_identity(tokenizer), code_fingerprint("stages.teach")]
    inputs = {"params": params.model_dump(include={"template", "chat", "system", "teach"}), "role": role, "seed": seed}
    return Job(
        what=f"teaching the {role}",
        make="stages.teach:training",
        inputs=inputs | {"prompts": str(prompts_path), "tokenizer": str(tokenizer_path)},
        optimisation=settings.optimisation,
        seed=seed,
        run=runs / "teach" / digest(of)[:16],
        log_every=20,
        save_every=settings.save_every,
        train=params.train,
    )


def training(params: dict, role: Role, seed: int, prompts: str, tokenizer: str) -> Training:
    """What a job of `teach` trains."""
    loaded = Params.model_validate(params)
    seed_everything(seed)
    model, read, _ = _starting_point(getattr(loaded.teach, role), Path(tokenizer), seed)
    return _training(loaded, role, model, read, Path(prompts))


def _training(params: Params, role: Role, model, tokenizer, prompts_path: Path) -> Training:
    settings: Teach = getattr(params.teach, role)
    prompts = [p for p in read_prompts(prompts_path, (settings.split,)) if p.references][: settings.pairs]
    if not prompts:
        raise UserError(f"{prompts_path} has no prompts with references in split '{settings.split}' to teach from")
    require_plain_head(model, f"the {role}")
    set_dropout(model, settings.dropout)
    rows = [
        Row.bare(ids, encode_response(tokenizer, prompt.references[0]))
        for prompt, ids in zip(prompts, PromptFormat.of(params).encode(tokenizer, prompts), strict=True)
    ]
    require_context(model.config, ((len(row.prompt_ids), len(row.response_ids)) for row in rows), f"the {role}")
    return Training(StudentLearner(model.train(), [Likelihood()]), rows)


def _card(role: Role, settings: Teach) -> str:
    origin = f"Started from `{settings.base}`" if settings.base else "A new small Llama-like model"
    if settings.layers:
        origin += f", {settings.layers} of its blocks"
    steps = settings.optimisation.steps
    trained = f"{steps} steps on up to {settings.pairs} references of split `{settings.split}`" if steps else "none"
    licence = licence_of(local_folder(settings.base)) if settings.base else "apache-2.0"
    front = ["---", *([f"license: {json.dumps(licence)}"] if licence else []), "library_name: transformers", "---"]
    text = [f"# {role.capitalize()}", "", f"{origin}, made by xkd-pipeline. Training: {trained}."]
    return "\n".join([*front, *text]) + "\n"
