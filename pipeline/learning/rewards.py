"""A fitted reward over rows, written once: mu and log sigma of every token, by the key of its row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import in_one_line
from pipeline.files import write_atomically
from pipeline.learning.forward import per_row
from pipeline.learning.posterior import RewardPosterior
from pipeline.store.schema import Row

FILE = "rewards.parquet"
_SCHEMA = pa.schema([("key", pa.string()), ("mu", pa.list_(pa.float32())), ("log_sigma", pa.list_(pa.float32()))])


def write_rewards(folder: Path, rows: Sequence[Row], posterior: RewardPosterior) -> None:
    """Run the posterior over rows and write FILE, so that distillation and the report need no encoder."""
    by_name = rewards_of(rows, posterior)
    columns = [list(by_name["mu"]), *(list(values.values()) for values in by_name.values())]
    _write(folder, pa.table(columns, schema=_SCHEMA))


def rewards_of(rows: Sequence[Row], posterior: RewardPosterior) -> dict[str, dict[str, np.ndarray]]:
    """`mu` and `log_sigma` by key, float32 [T]."""
    values = dict(zip((row.key for row in rows), per_row(rows, posterior, posterior.device), strict=True))
    return {name: {key: pair[place] for key, pair in values.items()} for place, name in enumerate(_SCHEMA.names[1:])}


def join_rewards(out: Path, folders: Sequence[Path]) -> None:
    """Write the rewards of several folders into one file."""
    _write(out, pa.concat_tables(pq.read_table(folder / FILE) for folder in folders))


def _write(folder: Path, table: pa.Table) -> None:
    write_atomically(folder, lambda path: pq.write_table(table, path, compression="zstd"), FILE)


def read_rewards(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """`mu` and `log_sigma` by key, float32 [T]. Raises UserError where they cannot be read."""
    with in_one_line(f"{folder / FILE} holds no rewards"):
        table = pq.read_table(folder / FILE)
        keys, *values = (table.column(name).to_pylist() for name in _SCHEMA.names)
    return {
        name: dict(zip(keys, (np.asarray(v, np.float32) for v in column), strict=True))
        for name, column in zip(_SCHEMA.names[1:], values, strict=True)
    }
