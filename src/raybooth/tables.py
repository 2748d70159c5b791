"""Photographs in parquet tables, the form that the hub gives datasets whose owners have not chosen one."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from raybooth.errors import RayboothError


def unpack(table: Path, name: str, suffixes: frozenset[str], most: int) -> None:
    """Replace a table by a folder with its pictures as files, up to `most`, in the order of its rows.

    Args:
        name: the table's, for messages.

    Raises:
        RayboothError: if it cannot be read as a table.
    """
    from pyarrow import ArrowException

    try:
        for i, (data, path) in enumerate(islice(_pictures(table), most)):
            suffix = Path(path).suffix.lower()
            (table.with_suffix("") / f"{i:05d}{suffix if suffix in suffixes else '.png'}").write_bytes(data)
    except (ArrowException, OSError) as error:
        raise RayboothError(f"{name} is a parquet file that cannot be read ({error}): ask the dataset's owner, or give the photographs as files.") from None
    table.unlink()


def _pictures(table: Path) -> Iterator[tuple[bytes, str]]:
    """(file's bytes, its name or "") of every row and every column of pictures: a struct with `bytes` and `path`, as the library `datasets` writes it."""
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    with ParquetFile(table) as file:
        columns = [f.name for f in file.schema_arrow if types.is_struct(f.type) and {"bytes", "path"} <= {part.name for part in f.type}]
        table.with_suffix("").mkdir(exist_ok=True)
        for batch in file.iter_batches(batch_size=8, columns=columns) if columns else ():
            for row in batch.to_pylist():
                for column in columns:
                    cell: dict[str, Any] = row[column] or {}
                    if cell.get("bytes"):
                        yield cell["bytes"], cell["path"] or ""
