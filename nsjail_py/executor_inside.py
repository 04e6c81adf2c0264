"""What a job of JailExecutor runs: the call, and its result as plain data. Its text is the script, so it imports nothing of ours."""

from typing import Any

import msgspec

RESULT, ERROR = 0, 1
ARRAY, INTEGER = 1, 2
"""MessagePack's extensions: an array's type, shape and bytes; the bytes of a number beyond 64 bits, little end first."""
LENGTH = 8
RESULT_FD, CALL_FD = 3, 4
MOST_TEXT = 1 << 20


def plain(value: Any) -> object:
    """For msgspec, what it does not know itself."""
    kind = type(value)
    if kind.__module__ == "numpy":
        if hasattr(value, "shape") and value.shape == () and hasattr(value, "item"):
            item = value.item()
            wider = type(item).__module__ == "numpy"  # than any of Python's: a longdouble
            unitless = value.dtype.kind in "mM" and isinstance(item, int)  # nanoseconds, and years without a date
            if not wider and not unitless:
                return item
        if kind.__name__ == "ndarray" and hasattr(value, "tobytes") and not value.dtype.hasobject and value.dtype.names is None:
            return msgspec.msgpack.Ext(ARRAY, msgspec.msgpack.encode((value.dtype.str, value.shape, value.tobytes())))
    raise TypeError(
        f"a result of type {kind.__module__}.{kind.__qualname__} cannot leave the jail: return numbers, text, bytes, lists, arrays"
    )


def wide(value: Any) -> Any:
    """With extensions for numbers beyond 64 bits, which MessagePack has not. A dictionary's keys stay as they are."""
    if isinstance(value, int) and value.bit_length() > 63:
        return msgspec.msgpack.Ext(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [wide(item) for item in value]
    if isinstance(value, dict):
        return {key: wide(item) for key, item in value.items()}
    return value


def told(error: BaseException) -> list[str]:
    """Its type, what it says, and the traceback: text of bounded size that UTF-8 can say."""
    import traceback

    texts = [type(error).__qualname__, "", ""]
    try:
        texts[1:] = str(error), "".join(traceback.format_exception(error))
    except BaseException:  # an exception whose own methods raise
        texts[2] = texts[0]
    return [text[:MOST_TEXT].encode(errors="backslashreplace")[:MOST_TEXT].decode(errors="ignore") for text in texts]


def main() -> None:
    import os
    import pickle

    def send(*parts: object) -> None:
        try:
            data = msgspec.msgpack.encode(parts, enc_hook=plain)
        except OverflowError:
            data = msgspec.msgpack.encode(wide(parts), enc_hook=plain)
        most = os.fstat(RESULT_FD).st_size - LENGTH
        if len(data) > most:
            raise ValueError(f"a result of {len(data)} bytes cannot leave the jail: at most {most}")
        written = 0
        view = memoryview(len(data).to_bytes(LENGTH, "little") + data)
        while written < len(view):
            written += os.pwrite(RESULT_FD, view[written:], written)

    try:
        with open(CALL_FD, "rb", closefd=False) as file:
            file.seek(0)
            function, arguments, named = pickle.load(file)
        value = function(*arguments, **named)
        send(RESULT, value)
    except BaseException as error:
        send(ERROR, *told(error))


if __name__ == "__main__":
    main()
