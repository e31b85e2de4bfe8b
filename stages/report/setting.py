"""The page's account of an experiment: what was asked of whom, what it cost, the words it uses, where all came from."""

import json
from pathlib import Path

from pipeline.layout import counts_of
from pipeline.store.kept_mass import say_kept_mass
from stages.report.own_samples import WORDS, rounds_of
from stages.report.page import Section, Table
from stages.report.results import read_results

STAGES = {  # stage -> its key among the results that the report reads
    "prepare": "prepare", "teach teacher": "teach/teacher", "teach student": "teach/student", "generate": "generate",
    "score": "score", "reward": "audit", "distill": "distill", "plain": "plain-metrics", "evaluate": "evaluation",
}  # fmt: skip
GLOSSARY = {
    "T, S": "the teacher's and the model's distribution over the next token",
    "δ, TD residual": "a token's Q-value (its logit) minus that of what follows: what a reward would have to be",
    "sarsa, soft": "two forms of δ: minus the next token's own Q-value, or minus the log-sum-exp over all next tokens",
    "c": "deviation of the teacher's δ; rewards are in units of it",
    "q(R), μ, σ": "the reward posterior: what each token's reward is thought to be, and how sure that is",
    "phi_kl": "weight of KL(q‖prior) in the reward's fit: larger keeps μ nearer to 0 and σ nearer to 1",
    "lam, lam_eff": "weight of the X term in the loss, and what acts on the student: lam · mean(1/σ²) / c². "
    "Above 0.1 it works against the distillation loss, below 0.0001 it does nothing",
    "frozen, zero, shuffled": "the fitted reward; no reward at all; another sample's reward. A gain that shuffled has "
    "too is not the reward's",
    "kept mass": "probability that the teacher gives to the tokens that the cache keeps at a position",
    "cut": "an answer that reached max_tokens and did not end by itself",
}


def setting(results: dict[str, dict]) -> Section:
    """Data set, template, models, cache and date."""
    evaluation, generated, distilled = results["evaluation"], results["generate"], results["distill"]
    section, rows = Section("setting", "What was compared"), []
    if prepared := results["prepare"]:
        data, read = prepared["data"], prepared["prompt_format"]
        rows.append(["data set", " ".join(filter(None, (data["path"], data["config"])))])
        chat = "inside the tokenizer's chat template" if read["chat"] else ""
        rows.append(["template", ", ".join(filter(None, (json.dumps(read["template"], ensure_ascii=False), chat)))])
        if read["system"]:
            rows.append(["system message", read["system"]])
    rows.append(["task", evaluation["provenance"]["task"]["name"]])
    if counts := evaluation.get("counts"):
        rows.append(["prompts", ", ".join(f"{number:,} {name}" for name, number in counts.items())])
    sources = evaluation.get("sources", {})
    for model, parameters in evaluation.get("parameters", {}).items():
        size = f"{parameters:,} parameters" if parameters else "not loaded"
        rows.append([model, ", ".join(filter(None, (sources.get(model, ""), size)))])
    rows.append(["teacher's identity", evaluation["provenance"]["teacher"]])
    if distilled:
        rows.append(["distilled with", distilled["objective"]])
    if distilled.get("heldout_lam_eff") is not None:
        rows.append(["lam_eff", f"{distilled['heldout_lam_eff']:.2g}"])
    if kept := generated.get("kept_mass"):
        rows.append([f"mass of the {kept['k']} kept tokens", say_kept_mass(kept)])
    if "cut" in generated:
        rows.append(["teacher samples cut at max_tokens", f"{generated['cut']:.1%}"])
    if date := evaluation["provenance"].get("date"):
        rows.append(["evaluated", date])
    section.tables.append(Table(["", ""], rows, prose=True))
    return section


def costs(results: dict[str, dict]) -> Section:
    """What the cache holds, and the seconds of every stage."""
    section = Section("costs", "Cache and cost")
    if cost := results["generate"].get("cost"):
        speed = f"{cost['tokens_per_second']:,.0f}" if cost["tokens_per_second"] else "- (all cached)"
        rows = [
            ["rows found in the store", f"{cost['rows_found']:,}"],
            ["rows made by this run", f"{cost['rows_made']:,}"],
            ["rows left out", f"{cost['rows_left_out']:,}"],
            ["tokens in this selection", f"{cost['tokens_selected']:,}"],
            ["tokens made by this run", f"{cost['tokens_made']:,}"],
            ["tokens per second, without loading", speed],
            ["bytes per token in the store", f"{cost['bytes_per_token'] or 0:,.0f}"],
            ["size of these requests in the store", f"{cost['store_bytes'] / 2**20:,.1f} MiB"],
        ]
        section.tables.append(Table(["teacher cache", ""], rows))
    timed = {stage: results[key]["cost"] for stage, key in STAGES.items() if "cost" in results[key]}
    rows = [[stage, f"{cost['seconds']:,.0f}"] for stage, cost in timed.items()]
    if first := results["distill"].get("cost", {}).get("seconds_to_first_step"):
        rows.append(["distill, from its start to the first step", f"{first:,.1f}"])
    for stage in ("distill", "plain"):
        cost = results[STAGES[stage]].get("cost", {})
        for name, what in (("seconds_drawing", "drawing samples"), ("seconds_scoring", "having them scored")):
            if name in cost:
                rows.append([f"{stage}, {what} in its rounds", f"{cost[name]:,.0f}"])
    section.tables.append(Table(["stage", "seconds"], rows))
    return section


def glossary(results: dict[str, dict]) -> Section:
    section = Section("glossary", "Glossary")
    words = GLOSSARY | (WORDS if rounds_of(results) else {})
    section.tables.append(Table(["word", "meaning"], [list(entry) for entry in words.items()], prose=True))
    return section


def provenance(results: dict[str, dict], prompts: Path) -> Section:
    """Which prompts of the file `prompts` were left out, and the inputs, parameters and versions of every stage."""
    section = Section("provenance", "Provenance")
    path = counts_of(prompts)
    if path.is_file():
        counts = read_results(path, dict[str, dict[str, int]], "prepare")
        rows = []
        for split, reasons in counts.items():
            left_out = ", ".join(f"{n:,} {why}" for why, n in reasons.items() if why != "kept") or "none"
            if reasons:
                rows.append([split, f"{reasons.get('kept', 0):,}", left_out])
        section.tables.append(Table(["split", "kept", "left out"], rows))
    for name, read in results.items():
        if read:
            text = json.dumps(read["provenance"], indent=2, ensure_ascii=False)
            section.blocks.append((f"{name}: inputs, parameters, versions", text))
    return section
