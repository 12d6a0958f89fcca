"""Body compression, with Celery's names for it.

The header ``compression`` holds a MIME type. ``application/x-gzip`` is a zlib stream, as Celery's code writes it.
Decompression is bounded: a small message must not become a large one without limit.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from amqptasks.errors import ConfigError, DecodeError

__all__ = ["compress", "decompress", "mime_type"]

_MIME = {
    "gzip": "application/x-gzip",
    "zlib": "application/x-gzip",
    "bzip2": "application/x-bz2",
    "bzip": "application/x-bz2",
    "lzma": "application/x-lzma",
    "xz": "application/x-lzma",
    "brotli": "application/x-brotli",
    "zstd": "application/zstd",
    "zstandard": "application/zstd",
}


class _Stream(Protocol):
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"compression needs the package {module}: pip install 'amqptasks[{extra}]'") from None


def _compress_brotli(body: bytes) -> bytes:
    return bytes(_optional("brotli", "brotli").compress(body))


def _compress_zstd(body: bytes) -> bytes:
    return bytes(_optional("zstandard", "zstd").compress(body))


_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "application/x-gzip": zlib.compress,
    "application/x-bz2": bz2.compress,
    "application/x-lzma": lzma.compress,
    "application/x-brotli": _compress_brotli,
    "application/zstd": _compress_zstd,
}

_STREAMS: dict[str, Callable[[], _Stream]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lambda: lzma.LZMADecompressor(memlimit=256 * 1024 * 1024),
}


def mime_type(name: str) -> str:
    """The MIME type for a compression's name. Raises `ConfigError` for an unknown one."""
    mime = _MIME.get(name, name)
    if mime not in _COMPRESS:
        raise ConfigError(f"compression {name!r} is not known; one of {', '.join(sorted(_MIME))}")
    return mime


def compress(body: bytes, mime: str) -> bytes:
    """`body`, compressed."""
    return _COMPRESS[mime](body)


def decompress(body: bytes, mime: str, limit: int) -> bytes:
    """`body`, decompressed to at most `limit` bytes. Raises `DecodeError` beyond it, and for a damaged stream."""
    try:
        if mime in _STREAMS:
            data = _STREAMS[mime]().decompress(body, limit + 1)
        elif mime == "application/zstd":
            reader = _optional("zstandard", "zstd").ZstdDecompressor(max_window_size=1 << 27)
            data = reader.stream_reader(body).read(limit + 1)
        elif mime == "application/x-brotli":
            data = _decompress_brotli(body, limit)
        else:
            raise DecodeError(f"compression {mime!r} is not known")
    except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise DecodeError(f"damaged {mime} stream: {error}") from None
    if len(data) > limit:
        raise DecodeError(f"the {mime} body is larger than {limit} bytes when decompressed")
    return bytes(data)


def _decompress_brotli(body: bytes, limit: int) -> bytes:
    stream = _optional("brotli", "brotli").Decompressor()
    data = bytearray(stream.process(body, output_buffer_limit=limit + 1))
    while not stream.is_finished() and len(data) <= limit:
        more = stream.process(b"", output_buffer_limit=limit + 1)
        if not more:
            raise DecodeError("damaged application/x-brotli stream: it ends early")
        data += more
    return bytes(data)
