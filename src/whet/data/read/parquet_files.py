"""Parquet: any table, one batch of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from whet.data.read.piece import Piece, Row, column_names
from whet.errors import WhetError

BATCH = 4096  # rows


def read_parquet(piece: Piece) -> Iterator[Row | WhetError]:
    """The rows of the piece's row groups. A damaged group is one fault, and costs the rows from there to its end."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with _damage(piece), pq.ParquetFile(piece.path) as file:
        column_names(file.schema_arrow.names, piece.source)
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        number = piece.line
        for group in groups:
            row = number
            number += file.metadata.row_group(group).num_rows
            try:
                with _damage(piece):
                    for batch in file.iter_batches(batch_size=BATCH, row_groups=[group]):
                        for values in batch.to_pylist():
                            yield Row(values, piece.source, row)
                            row += 1
            except WhetError as error:
                yield error


@contextmanager
def _damage(piece: Piece) -> Iterator[None]:
    """Turns Arrow's errors for damaged files into faults. Whole batches fail, so the row is not known."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        # Arrow reports damaged pages as OSError without a number; one with a number is the file system's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
        raise WhetError(
            f"not readable as Parquet: {what}",
            where=piece.source,
            fix="write the file again; it may have been cut short or be of another kind",
        ) from error
