"""TD residuals of cached teacher rows, and their scale: shared by reward fitting and distillation."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.params import Residual
from pipeline.shards.schema import Row
from stages.objectives.avril import action_values, soft_state_values, td_residual


def teacher_residual(row: Row, td: str, residual: Residual) -> tuple[np.ndarray, np.ndarray]:
    """delta [T] of the teacher's own Q-values, unscaled, and the steps it exists for [T] bool."""
    logprob = torch.from_numpy(np.array(row.logprobs, np.float32))[None]
    if row.lse is None and residual.q_source == "logits":
        raise UserError(
            f"row {row.key} of the cache has no lse, which q_source: logits needs. Use an engine that gives it "
            "(hf, or vllm with the capture), or set q_source: logprobs for the reward and for distillation"
        )
    lse = torch.zeros_like(logprob) if row.lse is None else torch.from_numpy(np.array(row.lse, np.float32))[None]
    q, v = action_values(logprob, lse, residual.q_source), soft_state_values(lse, residual.q_source)
    mask, stop = torch.ones_like(logprob, dtype=torch.bool), torch.tensor([row.finish == "stop"])
    delta, kept = td_residual(q, v, mask, stop, residual.gamma, td, residual.terminal)
    return delta[0].numpy(), kept[0].numpy()


def residual_scale(rows: Sequence[Row], td: str, residual: Residual) -> tuple[float, float]:
    """c and the offset: deviation of the teacher's non-terminal residuals, and their mean where gamma < 1.

    Q(EOS) is an outlier, so the last step never counts for the scale.
    """
    inner = residual.model_copy(update={"terminal": "drop"})
    deltas = [delta[kept] for delta, kept in (teacher_residual(row, td, inner) for row in rows)]
    values = np.concatenate([*deltas, np.empty(0, np.float32)])
    if len(values) < 2 or not values.std() > 0:
        raise UserError("the cached responses are too short to have TD residuals: raise max_tokens or add samples")
    return float(values.std()), float(values.mean()) if residual.gamma < 1 else 0.0
