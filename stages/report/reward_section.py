"""The reward's part of the page: fit, calibration, every ranking, and the reward on the tokens of responses."""

from pathlib import Path

from pipeline.layout import Layout
from pipeline.models import load_tokenizer
from pipeline.store.selection import Selection
from pipeline.tasks.intervals import say_interval
from stages.report import figures
from stages.report.page import Figure, Section, Table
from stages.report.results import read_curve
from stages.report.rewarded import rewarded_prompts


def reward_section(audit: dict, layout: Layout, store: str | Path | None, prompts: int) -> Section | None:
    if not audit:
        return None
    section = Section("reward", "The recovered reward")
    fits = {td: audit[td] for td in ("sarsa", "soft")}
    section.tables.append(
        Table(
            ["posterior", "−log q", "phi_kl", "c", "within 1 σ", "within 2 σ", "σ at floor"],
            [
                [
                    td, f"{fit['heldout_nll']:.3f}", f"{fit['phi_kl']:g}", f"{fit['c']:.2f}",
                    *(f"{fit[name]:.0%}" for name in ("inside_1_sigma", "inside_2_sigma", "sigma_at_floor")),
                ]
                for td, fit in fits.items()
            ],
            "Fit on held-out teacher text (calibrated: 68 % and 95 % within 1 and 2 σ)",
        )
    )  # fmt: skip
    section.tables += _rankings(audit)
    if audit["negatives"]["rows"]:
        section.texts.append(_negatives(audit["negatives"]))
    drawn = {td: read_curve(layout.audit / f"{td}.csv") for td in fits}
    drawn = {td: (curve["step"], curve["reward_nll"]) for td, curve in drawn.items() if curve}
    if drawn:
        section.figures.append(Figure(figures.lines(drawn, "step", "nats per step"), "Held-out −log q of the fits"))
    rewards = layout.reward / "soft" / "rewards.parquet"
    if rewards.is_file() and layout.start.is_dir():
        tokenizer = load_tokenizer(layout.start)
        section.rewarded = list(rewarded_prompts(Selection(layout.selection, store), rewards, tokenizer, prompts))
    for number, (_, responses) in enumerate(section.rewarded, start=1):
        bands = {r.origin: ([t.mu for t in r.tokens], [t.sigma for t in r.tokens]) for r in responses}
        caption = f"Reward over the tokens of prompt {number}'s responses below; bands are one σ"
        section.figures.append(Figure(figures.band(bands, "token", "reward, in units of c"), caption))
    if section.rewarded:
        section.texts.append(
            "Below, each token's colour is the mean reward μ of the soft posterior (orange low, blue high, white the "
            "median of the responses shown), and the thickness of the line under it the uncertainty σ."
        )
    return section


def _rankings(audit: dict) -> list[Table]:
    """Every judge's AUC on what it had to rank."""
    titles = {
        "corrupted": "held-out references over their corruptions",
        "samples": "right over wrong samples of the student (or above over below the prompt's median)",
    }
    return [
        Table(
            ["judge", "mean over tokens", "sum over tokens", "mean, pooled", "sum, pooled"],
            [
                [
                    judge.replace("_", " "),
                    *(
                        say_interval(aucs[how], ".3f", of="auc")
                        for how in ("within_mean", "within_sum", "pooled_mean", "pooled_sum")
                    ),
                ]
                for judge, aucs in judges.items()
            ],
            f"AUC: {titles[ranking]}, within {audit['audited_prompts'][ranking]} prompts",
        )
        for ranking, judges in audit.get("audit", {}).items()
    ]


def _negatives(negatives: dict) -> str:
    """How it was decided whether scored negatives are in the soft fit."""
    used = "used" if negatives["used"] else "not used"
    text = f"Negatives in the soft fit: {negatives['rows']:,} scored responses, {used}"
    if "choice_auc" not in negatives:
        return text + "."
    aucs = ", ".join(f"{value:.3f} {name} them" for name, value in negatives["choice_auc"].items())
    return f"{text}. Mean AUC of every other held-out prompt: {aucs}; the tables below are of the other prompts."
