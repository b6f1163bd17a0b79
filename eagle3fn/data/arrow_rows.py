"""The rows of parquet and Arrow files as what JSON would hold."""

import json
from collections.abc import Callable, Iterator
from datetime import date, time
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.data.file_kinds import missing_extra

_ROWS = 256  # turned into Python values at once
_BUFFER = 1 << 20  # bytes of a column read at once
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

Row = tuple[Any, str | None]
Convert = Callable[[Any], Any]


def parquet_rows(path: Path) -> Iterator[Row]:
    """Each row and None; or None, and why it is unusable. See `batch_rows`.

    Raises:
        UserError: pyarrow is missing; the file is damaged.
    """
    pa = _pyarrow(path, "a parquet file")
    import pyarrow.parquet as pq

    count = 0
    try:
        # Without `pre_buffer`, which holds a whole row group.
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch_rows(batch):
                    yield row
                    count += 1
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "parquet", count, error) from None


def arrow_rows(path: Path, stream: bool) -> Iterator[Row]:
    """The same for an Arrow file, in the stream format (`datasets` writes it) or the file format.

    Raises:
        UserError: pyarrow is missing; the file is damaged or cut off.
    """
    pa = _pyarrow(path, "an Arrow file")
    count = 0
    try:
        with pa.memory_map(str(path)) as file:
            for batch in _stream_batches(pa, file) if stream else _file_batches(pa, file):
                for start in range(0, batch.num_rows, _ROWS):
                    for row in batch_rows(batch.slice(start, _ROWS)):
                        yield row
                        count += 1
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "Arrow", count, error) from None


def _stream_batches(pa: Any, file: Any) -> Iterator[Any]:
    # A stream that is cut between two batches reads as a shorter one: look for its end mark.
    file.seek(max(0, file.size() - len(_STREAM_END)))
    if file.read() != _STREAM_END:
        raise OSError("its end is missing")
    file.seek(0)
    yield from pa.ipc.open_stream(file)


def _file_batches(pa: Any, file: Any) -> Iterator[Any]:
    reader = pa.ipc.open_file(file)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _pyarrow(path: Path, what: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(missing_extra(path, what, "pyarrow")) from None
    return pa


def _damaged(path: Path, kind: str, rows: int, error: Exception) -> UserError:
    after = f" after row {rows}" if rows else ""
    reason = " ".join(str(error).split())
    return UserError(f"{path}: damaged {kind} file{after} ({reason}); download or write it again")


# Values


def batch_rows(batch: Any) -> Iterator[Row]:
    """Each row of a `pyarrow.RecordBatch` as a dict, and None; or None and why it is unusable.

    Lists and structs become lists and dicts; maps too, dicts. Arrow gives all structs of a column
    the same keys, and all rows the same columns: a key that a row did not have holds null (a turn
    without a call has `tool_calls: None`, a call has every other call's arguments). It cannot be
    distinguished from a null that was written, so keys with null are left out, at every depth.
    Values of Arrow's JSON type are parsed, nulls in them kept; a column of strings stays text.
    Dates and times become ISO texts, decimals texts, bytes the text that they are in UTF-8.
    """
    convert = {field.name: _converter(field.type) for field in batch.schema}
    try:
        rows = batch.to_pylist()
    except ValueError:
        # A cell without a Python value. Take rows and columns one at a time, to name it.
        rows = [None] * batch.num_rows

    for number, row in enumerate(rows):
        name = ""
        kept = {}
        try:
            for name, to_json in convert.items():
                value = row[name] if row is not None else batch.column(name)[number].as_py()
                if value is not None:
                    kept[name] = to_json(value)
        except (ValueError, OverflowError, TypeError) as error:
            yield None, f"column {name}: {error}; convert or remove the column"
        else:
            yield kept, None


def _converter(kind: Any) -> Convert:
    """How a Python value of an Arrow type (not None) becomes what JSON would hold."""
    import pyarrow as pa

    types = pa.types
    if types.is_struct(kind):
        return _struct_converter({field.name: _converter(field.type) for field in kind})
    if types.is_map(kind):
        return _map_converter(_converter(kind.item_type))
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if getattr(kind, "extension_name", None) == "arrow.json":
        return json.loads
    if hasattr(kind, "value_field"):  # the list types
        return _list_converter(_converter(kind.value_type))
    return _plain


def _struct_converter(convert: dict[str, Convert]) -> Convert:
    return lambda value: {
        name: convert[name](item) for name, item in value.items() if item is not None
    }


def _list_converter(convert: Convert) -> Convert:
    return lambda value: [None if item is None else convert(item) for item in value]


def _map_converter(convert: Convert) -> Convert:
    return lambda value: {
        str(name): None if item is None else convert(item) for name, item in value
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, list):  # an extension type's
        return [None if item is None else _plain(item) for item in value]
    return str(value)


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{len(value)} bytes that are no text") from None
