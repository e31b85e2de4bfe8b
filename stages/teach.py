"""Make a model: new, from a base, cut to fewer layers; and fine-tune it on references."""

import json
import shutil
from functools import partial
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.learning.batches import from_references
from pipeline.learning.dropout import set_dropout
from pipeline.learning.learner import StudentLearner, require_plain_head
from pipeline.learning.trainer import seed_everything, train
from pipeline.models import (
    ModelSize,
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
from pipeline.provenance import code_fingerprint, fingerprint, write_results

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
    facts, run = [("parameters", f"{model.num_parameters():,}")], None
    if settings.optimisation.steps:
        told, run = _train(params, role, settings, model, tokenizer, prompts_path, runs, seed)
        facts += told
    save_model(out, model, tokenizer, _card(role, settings), stops)
    if run is not None:
        shutil.rmtree(run, ignore_errors=True)
    if results is not None:
        write_results(results, "teach", {"role": role})
    console.facts(f"{role} made", [*facts, ("model", out)])


def _starting_point(settings: Teach, tokenizer_path: Path, seed: int):
    """Model, tokenizer and stop tokens before any training."""
    if not settings.base:
        tokenizer = load_tokenizer(tokenizer_path)
        size = ModelSize(**settings.model.model_dump())
        return build_causal_lm(size, tokenizer, CONTEXT, seed), tokenizer, None
    if not has_weights(settings.base):
        tokenizer, config = load_tokenizer(tokenizer_path), load_config(settings.base)
        if settings.layers:
            config.num_hidden_layers = settings.layers
        return build_from_config(config, tokenizer, seed), tokenizer, None
    model, tokenizer = load_lm(settings.base), load_tokenizer(settings.base)
    if settings.layers:
        keep_layers(model, settings.layers)
    return model, tokenizer, stop_token_ids(settings.base, tokenizer)


def _train(
    params: Params, role: Role, settings: Teach, model, tokenizer, prompts_path: Path, runs: Path, seed: int
) -> tuple[list[tuple[str, str]], Path]:
    """Train `model` on references, in place; returns what to say of it, and the folder of its checkpoints."""
    prompts = [p for p in read_prompts(prompts_path, (settings.split,)) if p.references][: settings.pairs]
    if not prompts:
        raise UserError(f"{prompts_path} has no prompts with references in split '{settings.split}' to teach from")
    require_plain_head(model, f"the {role}")
    set_dropout(model, settings.dropout)
    responses = from_references(
        PromptFormat.of(params).encode(tokenizer, prompts),
        [encode_response(tokenizer, prompt.references[0]) for prompt in prompts],
    )
    lengths = ((len(response.prompt_ids), len(response.response_ids)) for response in responses)
    require_context(model.config, lengths, f"the {role}")
    inputs = [params.template, params.chat, params.system, seed, settings.model_dump(), fingerprint(prompts_path)]
    inputs += [tokenizer_identity(tokenizer), code_fingerprint()]
    run = runs / "teach" / digest([role, *inputs])[:16]
    history = train(
        f"teaching the {role}", StudentLearner(model.train()), responses, None, settings.optimisation, run, seed,
        log_every=20, save_every=settings.save_every,
    )  # fmt: skip
    loss = next((entry["loss"] for entry in reversed(history) if "loss" in entry), float("nan"))
    return [("pairs", f"{len(responses):,} of split {settings.split}"), ("last loss", f"{loss:.4f} nats a token")], run


def _card(role: Role, settings: Teach) -> str:
    origin = f"Started from `{settings.base}`" if settings.base else "A new small Llama-like model"
    if settings.layers:
        origin += f", {settings.layers} of its blocks"
    steps = settings.optimisation.steps
    trained = f"{steps} steps on up to {settings.pairs} references of split `{settings.split}`" if steps else "none"
    licence = licence_of(local_folder(settings.base)) if settings.base else "apache-2.0"
    front = ["---", *([f"license: {json.dumps(licence)}"] if licence else []), "library_name: transformers", "---"]
    return (
        "\n".join([*front, f"# {role.capitalize()}", "", f"{origin}, made by xkd-pipeline. Training: {trained}."])
        + "\n"
    )
