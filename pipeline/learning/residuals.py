"""TD residuals of cached teacher rows, and their scale: shared by reward fitting and distillation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.objectives.avril import CLIP, action_values, followed_steps, kept_steps, soft_state_values, td_residual
from pipeline.params import Residual
from pipeline.store.schema import Row


def teacher_residual(row: Row, td: str, residual: Residual) -> tuple[np.ndarray, np.ndarray]:
    """delta [T] of the teacher's own Q-values, unscaled, and the steps it exists for [T] bool."""
    if row.lse is None and residual.q_source == "logits":
        raise UserError(
            f"row {row.key} of the cache has no lse, which q_source: logits needs. Use an engine that gives it "
            "(hf, or vllm with the capture), or set q_source: logprobs for the reward and for distillation"
        )
    logprob = torch.from_numpy(np.array(row.logprobs, np.float32))
    lse = torch.zeros_like(logprob) if row.lse is None else torch.from_numpy(np.array(row.lse, np.float32))
    q, v = action_values(logprob, lse, residual.q_source), soft_state_values(lse, residual.q_source)
    mask, stop = torch.ones(1, len(q), dtype=torch.bool), torch.tensor([row.finish == "stop"])
    kept = kept_steps(mask, stop, residual.terminal)[0]
    delta = td_residual(q, v, followed_steps(mask)[0], kept, residual.gamma, td)
    return delta.numpy(), kept.numpy()


@dataclass(frozen=True)
class Scaled:
    """Residuals in units of c: (delta - offset) / c."""

    td: str
    residual: Residual
    scale: float  # c
    offset: float

    @classmethod
    def of(cls, rows: Iterable[Row], td: str, residual: Residual) -> "Scaled":
        """c is the deviation of the teacher's non-terminal residuals, the offset their mean where gamma < 1.

        Q(EOS) is an outlier, so the last step never counts for the scale. Raises UserError where there is no residual.
        """
        inner = residual.model_copy(update={"terminal": "drop"})
        deltas = [delta[kept] for delta, kept in (teacher_residual(row, td, inner) for row in rows)]
        values = np.concatenate([*deltas, np.empty(0, np.float32)])
        if len(values) < 2 or not values.std() > 0:
            raise UserError("the cached responses are too short to have TD residuals: raise max_tokens or add samples")
        return cls(td, residual, float(values.std()), float(values.mean()) if residual.gamma < 1 else 0.0)

    def of_scores(self, logprob: Tensor, lse: Tensor, followed: Tensor, kept: Tensor) -> Tensor:
        """delta / c [n] of log-probabilities and normalisers of consecutive response tokens, see `td_residual`."""
        source = self.residual.q_source
        q, v = action_values(logprob, lse, source), soft_state_values(lse, source)
        return (td_residual(q, v, followed, kept, self.residual.gamma, self.td) - self.offset) / self.scale

    def clipped(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """key -> scaled residuals [T] within -CLIP and CLIP."""
        deltas = {row.key: teacher_residual(row, self.td, self.residual)[0] for row in rows}
        return {key: np.clip((delta - self.offset) / self.scale, -CLIP, CLIP) for key, delta in deltas.items()}

    def kept(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """key -> the steps that have a residual [T]."""
        return {row.key: teacher_residual(row, self.td, self.residual)[1] for row in rows}
