"""The reward's part of the page: fit, calibration, every ranking, and the reward on the tokens of responses."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import in_one_line
from pipeline.layout import Layout
from pipeline.models import load_tokenizer
from pipeline.store.schema import Row
from pipeline.store.selection import Selection
from pipeline.tasks.intervals import say_interval
from stages.report import figures
from stages.report.page import Figure, Rewarded, Section, Table, Token
from stages.report.results import read_curve

_ORDER = {"reference": 0, "teacher": 1, "student": 2, "corrupted": 3}
_SPREAD = 2.0  # deviations of mu at which a token's colour is full


def reward_section(audit: dict, layout: Layout, store: str | Path | None, prompts: int) -> Section | None:
    if not audit:
        return None
    section = Section("reward", "The recovered reward")
    fits = {td: audit[td] for td in ("sarsa", "soft")}
    columns = ["posterior", "−log q", "phi_kl", "c", "within 1 σ", "within 2 σ", "σ at floor"]
    shares = ("inside_1_sigma", "inside_2_sigma", "sigma_at_floor")
    rows = [
        [td, f"{fit['heldout_nll']:.3f}", f"{fit['phi_kl']:g}", f"{fit['c']:.2f}", *(f"{fit[n]:.0%}" for n in shares)]
        for td, fit in fits.items()
    ]
    title = "Fit on held-out teacher text (calibrated: 68 % and 95 % within 1 and 2 σ)"
    section.tables.append(Table(columns, rows, title))
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
    columns = ["judge", "mean over tokens", "sum over tokens", "mean, pooled", "sum, pooled"]
    tables, hows = [], ("within_mean", "within_sum", "pooled_mean", "pooled_sum")
    for ranking, judges in audit.get("audit", {}).items():
        rows = [
            [judge.replace("_", " "), *(say_interval(aucs[how], ".3f", of="auc") for how in hows)]
            for judge, aucs in judges.items()
        ]
        title = f"AUC: {titles[ranking]}, within {audit['audited_prompts'][ranking]} prompts"
        tables.append(Table(columns, rows, title))
    return tables


def _negatives(negatives: dict) -> str:
    """How it was decided whether scored negatives are in the soft fit."""
    used = "used" if negatives["used"] else "not used"
    text = f"Negatives in the soft fit: {negatives['rows']:,} scored responses, {used}"
    if "choice_auc" not in negatives:
        return text + "."
    aucs = ", ".join(f"{value:.3f} {name} them" for name, value in negatives["choice_auc"].items())
    return f"{text}. Mean AUC of every other held-out prompt: {aucs}; the tables below are of the other prompts."


def rewarded_prompts(
    selection: Selection, rewards: Path, tokenizer, prompts: int
) -> Iterator[tuple[str, list[Rewarded]]]:
    """The text of the first held-out prompts, each with one response of every origin that has rewards."""
    with in_one_line(f"{rewards} holds no rewards"):
        table = pq.read_table(rewards)
        columns = [table.column(name).to_pylist() for name in ("key", "mu", "log_sigma")]
    by_key = {key: (np.array(mu), np.exp(log_sigma)) for key, mu, log_sigma in zip(*columns, strict=True)}
    parts = [name for name in ("validation", "scored") if name in selection.parts]
    by_prompt: dict[str, dict[str, Row]] = {}
    for row in (row for name in parts for row in selection.rows(name)):
        if row.key in by_key:
            by_prompt.setdefault(row.prompt_id, {}).setdefault(row.origin, row)
    # Prompts with the most kinds of responses say most.
    chosen = sorted(by_prompt.values(), key=len, reverse=True)[:prompts]
    values = np.concatenate([by_key[row.key][0] for rows in chosen for row in rows.values()] or [np.zeros(1)])
    centre, spread = float(np.median(values)), float(values.std()) or 1.0
    for rows in chosen:
        ordered, responses = sorted(rows.values(), key=lambda row: _ORDER.get(row.origin, 9)), []
        for row in ordered:
            tokens = [
                Token(text, float(mu), float(sigma), float(np.clip((mu - centre) / (_SPREAD * spread), -1, 1)))
                for text, mu, sigma in zip(_pieces(row.response_ids, tokenizer), *by_key[row.key], strict=True)
            ]
            responses.append(Rewarded(row.origin, tokens))
        yield ordered[0].prompt, responses


def _pieces(ids: np.ndarray, tokenizer) -> list[str]:
    """The text that each token adds: differences of decoded prefixes, so that spaces are where they belong."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        after = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(after[len(before) :] if after.startswith(before) else after[-1:])
        before = after
    return pieces
