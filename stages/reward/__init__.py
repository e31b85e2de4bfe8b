"""Fit the reward that explains the teacher: AVRIL on its cached responses, and an audit of what came out."""

import shutil
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.learning.curves import write_csv
from pipeline.learning.posterior import save_posterior
from pipeline.learning.rewards import write_rewards
from pipeline.outputs import (
    begin_results,
    replacing,
    require_apart,
    require_can_write,
    require_own_folder,
    require_own_results,
)
from pipeline.params import Params
from pipeline.prompts import read_prompts
from pipeline.provenance import code_fingerprint, fingerprint
from pipeline.results import write_results
from pipeline.tasks import get_task
from pipeline.tasks.intervals import say_interval
from stages.reward import rankings
from stages.reward.fit import POSTERIORS, Fitted, Fitting, Sources, read_rows

_REWARD = "a reward"


def reward(
    params: Params,
    selection_path: Path,
    student_path: Path,
    out: Path,
    audit_out: Path,
    runs: Path,
    store: str | Path | None = None,
    scored_path: Path | None = None,
    prompts_path: Path | None = None,
) -> dict:
    """Fit both posteriors on the cached teacher, write them to `out` with the rewards of all its tokens, and audit.

    scored_path: what the stage `score` had scored, for negatives and for ranking the student's samples, which also
    needs the prompts and their references. Returns the metrics. Raises UserError where the selection holds nothing to
    fit or to validate.
    """
    require_apart({"--out": out}, {"--audit": audit_out, "--runs": runs / "reward"})
    require_apart({"--audit": audit_out}, {"--runs": runs / "reward"})
    require_own_folder(out, _REWARD)
    require_own_results(audit_out, "reward", "--audit")
    require_can_write(runs)
    sources = Sources(selection_path, student_path, scored_path, store)
    rows, opened = read_rows(sources)
    paths = {"student": student_path, "prompts": prompts_path}
    origins = {name: fingerprint(path) for name, path in paths.items() if path is not None}
    origins |= {name: selection.fingerprint for name, selection in opened.items()}
    settings = params.reward.model_dump(exclude={"bootstrap"})  # of the audit, which is made anew
    run = runs / "reward" / digest([params.seed, settings, origins, code_fingerprint("stages.reward.fit")])[:16]
    negatives, teacher = rows.get("negatives", []), opened["selection"].teacher["identity"]
    of = rows["train"], rows["validation"], negatives
    fitting = Fitting(params.reward, params.seed, sources, *of, run, params.train)
    prompts = read_prompts(prompts_path, ("validation",)) if prompts_path else []
    task = get_task(params.prepare.task)
    by_kind = rankings.held_out_rankings(rows.get("scored", ()), rows.get("samples", ()), prompts, task)
    fits = {"sarsa": fitting.fit("sarsa")}
    fits["soft"], judges, audited, choice = _soft(fitting, by_kind)
    metrics: dict = {td: fit.metrics for td, fit in fits.items()}
    begin_results(audit_out, "reward", "--audit")
    with replacing(out, _REWARD) as made:
        for td, fit in fits.items():
            save_posterior(made / td, fit.posterior, fit.description | {"teacher": teacher})
            read = [row for name, part in rows.items() if name not in ("negatives", "samples") for row in part]
            write_rewards(made / td, read, fit.posterior)
            write_csv(audit_out / f"{td}.csv", fit.curve)
    if audited:
        ranked = rankings.rows_of(audited)
        judges |= {
            "student_logprob": rankings.student_judge(ranked, student_path),
            "teacher_logprob": {row.key: row.logprobs for row in ranked},  # the ceiling
        }
        metrics["audit"] = rankings.judge_all(audited, judges, params.reward.bootstrap, params.seed)
        metrics["audited_prompts"] = {name: len({row.prompt_id for row, _ in r}) for name, r in audited.items()}
    else:
        console.warn(
            "the reward is not audited: that needs validation prompts with references of two tokens or more, and "
            "generate.corrupted above 0, or samples of the student scored by `xkd-pipeline score`"
        )
    metrics["negatives"] = choice
    write_results(
        audit_out / "results.json", "reward", metrics,
        seed=params.seed, parameters=params.reward.model_dump(), teacher=teacher, **origins,
    )  # fmt: skip
    shutil.rmtree(run, ignore_errors=True)
    _report(metrics, out, audit_out)
    return metrics


def _soft(
    fitting: Fitting, by_kind: dict[str, rankings.Ranking]
) -> tuple[Fitted, dict[str, rankings.Judge], dict[str, rankings.Ranking], dict]:
    """The soft posterior, its judges, the rankings it is to be reported on, and how negatives were decided.

    Where there is a choice it is made on every other prompt, and reported on the others.
    """
    setting, negatives = fitting.settings.negatives, fitting.negatives
    to_choose, to_report = rankings.halves(by_kind)
    if setting == "always" and not negatives:
        raise UserError("reward.negatives: always needs negatives: run `xkd-pipeline score`, or pass --scored")
    choosing = setting == "choose" and bool(negatives) and fitting.settings.fit == "teacher"
    if choosing and not (by_kind and to_choose.keys() == to_report.keys() == by_kind.keys()):
        console.warn("too few held-out prompts can be ranked to decide on negatives: they are not used")
        choosing = False
    if not choosing:
        used = setting == "always"
        fit = fitting.fit("soft", used)
        return fit, _judges(by_kind, {"reward": fit}), by_kind, {"used": used, "rows": len(negatives) if used else 0}
    fits = {"without": fitting.fit("soft"), "with": fitting.fit("soft", negatives=True)}
    ranked = rankings.rows_of(to_choose)
    aucs = {
        name: rankings.mean_auc(to_choose, rankings.reward_judge(ranked, fit.posterior)) for name, fit in fits.items()
    }
    kept, other = ("with", "without") if aucs["with"] > aucs["without"] else ("without", "with")
    judges = _judges(to_report, {"reward": fits[kept], f"reward_{other}_negatives": fits[other]})
    return fits[kept], judges, to_report, {"used": kept == "with", "rows": len(negatives), "choice_auc": aucs}


def _judges(by_kind: dict[str, rankings.Ranking], fits: dict[str, Fitted]) -> dict[str, rankings.Judge]:
    ranked = rankings.rows_of(by_kind)
    return {name: rankings.reward_judge(ranked, fit.posterior) for name, fit in fits.items()}


def _report(metrics: dict, out: Path, audit_out: Path) -> None:
    shown = ("c", "inside_1_sigma", "inside_2_sigma", "sigma_at_floor")
    rows = [
        (td, f"{fit['heldout_nll']:.3f}", f"{fit['phi_kl']:g}", *(f"{fit[name]:.2f}" for name in shown))
        for td, fit in ((td, metrics[td]) for td in POSTERIORS)
    ]
    columns = ("posterior", "-log q", "phi_kl", "c", "in 1 sigma", "in 2 sigma", "at floor")
    console.table("reward posterior on held-out teacher text", columns, rows)
    titles = {"corrupted": "references over their corruptions", "samples": "right over wrong samples of the student"}
    for ranking, judges in metrics.get("audit", {}).items():
        rows = []
        for judge, aucs in judges.items():
            within = (say_interval(aucs[how], ".3f", of="auc") for how in ("within_mean", "within_sum"))
            rows.append((judge, *within, f"{aucs['pooled_mean']['auc']:.3f}"))
        title = f"audit: AUC of {titles[ranking]}, within {metrics['audited_prompts'][ranking]} prompts (95 % interval)"
        console.table(title, ("judge", "mean", "sum", "pooled mean"), rows)
    negatives = metrics["negatives"]
    chosen = f"{negatives['rows']:,} scored responses" if negatives["used"] else "not used"
    console.facts("reward fitted", [("negatives", chosen), ("reward", out), ("audit", audit_out)])
