"""Whether a selection may be written to a folder: nothing that somebody else put there is replaced or removed."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import ASIDE
from pipeline.outputs import entries, foreign, not_ours, require_can_write
from pipeline.store.manifest import MANIFEST, is_named_by_content, is_of_selection
from pipeline.store.schema import METADATA_KEY

_HEAD = re.compile(rb'\s*\{\s*"schema_version":\s*\d+,\s*"teacher":')  # how a manifest begins, torn or whole


def require_own_selection(folder: Path, option: str = "--out") -> None:
    """Raises UserError unless `folder` is missing, empty or has a selection, whole or damaged.

    Files under other names than a selection's stay where they are. What has such a name and is not ours, or no file, is
    refused.
    """
    names = entries(folder, option)
    staged = [name for name in names if name.startswith(".tmp-")]
    files = list(filter(is_of_selection, map(folder.joinpath, names)))
    manifests = [path for path in files if path.name.removesuffix(ASIDE) == MANIFEST and path.is_file()]
    for path in files:
        if path.exists() and not (path.is_file() and _is_ours(path, manifests)):
            raise not_ours(path, option)
    if not files and len(names) > len(staged):
        raise foreign(folder, names, option)
    require_can_write(folder)


def _is_ours(path: Path, manifests: list[Path]) -> bool:
    """Whether we wrote it for a selection; true too for a file that is empty or gone, where nothing can be lost.

    A manifest is known by how it begins. Rows beside one are known by their footer or, where that is damaged, by the
    manifest; rows without one by a name that fits their content: those of an export have the same footer.
    """
    try:
        if not path.stat().st_size:
            return True
        if path in manifests:
            with open(path, "rb") as file:
                return bool(_HEAD.match(file.read(4096)))
        if not manifests:
            return is_named_by_content(path)
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except FileNotFoundError:
        return True
    except (pa.ArrowException, OSError):
        name = f'"{path.name.removesuffix(ASIDE)}"'.encode()
        return any(_HEAD.match(content) and name in content for content in map(Path.read_bytes, manifests))
