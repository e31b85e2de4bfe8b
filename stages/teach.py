"""Supervised fine-tuning on references: makes the teacher of a built-in task, and the student's starting point."""

import shutil
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.models import ModelSize, build_causal_lm, load_tokenizer, require_replaceable, save_model
from pipeline.params import Params, Role, Teach
from pipeline.prompts import encode_prompts, encode_response, read_prompts
from pipeline.provenance import code_fingerprint, fingerprint
from pipeline.shards.files import digest
from stages.batches import from_references
from stages.students import StudentLearner
from stages.training import seed_everything, train

CONTEXT = 256  # longest sequence of the built-in models
_SEED_OFFSET = {"teacher": 0, "student": 1}  # the two must not start from the same weights


def teach(params: Params, role: Role, prompts_path: Path, tokenizer_path: Path, out: Path, runs: Path) -> None:
    """Build a small model for `role`, train it on the references of its split, and save it to `out`."""
    settings: Teach = getattr(params.teach, role)
    require_replaceable(out)
    seed = params.seed + _SEED_OFFSET[role]
    tokenizer = load_tokenizer(tokenizer_path)
    prompts = [p for p in read_prompts(prompts_path, (settings.split,)) if p.references][: settings.pairs]
    if not prompts:
        raise UserError(f"{prompts_path} has no prompts with references in split '{settings.split}' to teach from")
    responses = from_references(
        encode_prompts(tokenizer, params.template, prompts),
        [encode_response(tokenizer, prompt.references[0]) for prompt in prompts],
    )
    longest = max(len(r.prompt_ids) + len(r.response_ids) for r in responses)
    if longest > CONTEXT:
        raise UserError(
            f"{prompts_path}: a prompt with its reference has {longest} tokens; the models built here read {CONTEXT}"
        )
    seed_everything(seed)
    model = build_causal_lm(ModelSize(**settings.model.model_dump()), tokenizer, CONTEXT, seed)
    inputs = [params.template, seed, settings.model_dump(), fingerprint(prompts_path), fingerprint(tokenizer_path)]
    inputs += [code_fingerprint()]
    run = runs / "teach" / digest([role, *inputs])[:16]
    history = train(
        f"teaching the {role}", StudentLearner(model), responses, None, settings.optimisation, run, seed,
        log_every=20, save_every=200,
    )  # fmt: skip
    save_model(out, model, tokenizer, _card(role, settings))
    shutil.rmtree(run, ignore_errors=True)
    loss = next((entry["loss"] for entry in reversed(history) if "loss" in entry), float("nan"))
    console.facts(
        f"{role} taught",
        [
            ("parameters", f"{model.num_parameters():,}"),
            ("pairs", f"{len(responses):,} of split {settings.split}"),
            ("last loss", f"{loss:.4f} nats a token"),
            ("model", out),
        ],
    )


def _card(role: Role, settings: Teach) -> str:
    return (
        "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n"
        f"# {role} of a built-in task\n\nA small Llama-like model, trained by xkd-pipeline on {settings.pairs} "
        f"generated pairs of split `{settings.split}` for {settings.optimisation.steps} steps.\n"
    )
