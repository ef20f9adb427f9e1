"""llama.cpp's shared library through its C interface, as far as a contestant needs it.

Its structures grow from release to release. They are handed on as they come, as bytes; the few
numbers that are set must hold llama.cpp's defaults before.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import ProviderError

_NAME = re.compile(r"libllama(\.[^-]+)?\.(so|dylib)(\.\d+)*")
_ERROR = 4  # a level of its log
_CPU = 0  # a kind of its devices
_MASK = 512  # bytes of a threadpool's processors, before its numbers
_POLL = 50  # the default
# Between two tokens its threads wait awake for some 3 ms. With the default they wait for 130 ms and
# take a processor from whoever has the next turn.
_SHORT = 1
Q4_0 = 2  # a kind of its files
_CACHE = 26  # numbers of a context's before the kinds of numbers of its keys and values
_AUTO = (0xFFFFFFFF,) * 4  # -1
_BEFORE_CACHE = (0xBF800000, 0, 0, 0, 0, 1, 1)  # -1.0, two null pointers, and twice float16
_FLOAT32 = 0
_FLASH = (
    13  # number of a context's that says whether its attention is the one that rounds to float16
)


class _Bytes(ctypes.Structure):
    """More than any of its structures has; the rest is not looked at."""

    _fields_ = (("words", ctypes.c_uint64 * 128),)


_ERRORS: deque[str] = deque(maxlen=3)


def _heard(level: int, text: bytes | None, _: object) -> None:
    """The log of the library, which has one for the whole process."""
    if level == _ERROR and text:
        _ERRORS.append(text.decode("utf-8", "replace").strip())


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_heard)


class LlamaLibrary:
    """The library, loaded, with the processor's own kernels where the folder has several.

    Args:
        folder: has ``libllama`` and the libraries that belong to it.

    Raises:
        ProviderError: it has not, or they cannot be loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        files = sorted(x for x in path.glob("libllama*") if _NAME.fullmatch(x.name))
        if not files:
            raise ProviderError(
                f"{path} has no libllama", "Give the folder of llama.cpp's shared libraries."
            )
        try:
            self._c = ctypes.CDLL(str(files[0]))
        except OSError as error:
            raise ProviderError(
                f"{files[0]} cannot be loaded: {error}", "Fetch it again: ci/llama_cpp."
            ) from error
        self.call("llama_log_set", None, _LOG, None)
        self.call("ggml_backend_load_all_from_path", None, str(path).encode())
        self.call("llama_backend_init", None)

    def call(self, name: str, returns: Any, *given: Any) -> Any:
        """A function of the library; arguments are as ctypes takes them.

        Raises:
            ProviderError: it has none of that name.
        """
        try:
            function = getattr(self._c, name)
        except AttributeError as error:
            raise ProviderError(
                f"this build of llama.cpp has no {name}", "Take another release of it."
            ) from error
        function.restype = returns
        return function(*given)

    def made(self, what: str, handle: int | None) -> ctypes.c_void_p:
        """A pointer that the library has returned.

        Raises:
            ProviderError: it is null; the message has what the library said.
        """
        if not handle:
            raise ProviderError(
                f"llama.cpp cannot make {what}: {' '.join(_ERRORS)}", "Make its GGUF files again."
            )
        return ctypes.c_void_p(handle)

    def about(self) -> str:
        """Its release, and the instructions that its kernels use."""
        release = self.call("llama_version", ctypes.c_char_p) or b""
        info = self.call("llama_print_system_info", ctypes.c_char_p) or b""
        return f"llama.cpp {release.decode()}: {info.decode().strip(' |')}"

    def quantize(self, file: Path, output: Path, kind: int) -> None:
        """Quantize a GGUF file as llama.cpp's own command does.

        Raises:
            ProviderError: it cannot.
        """
        params = self.call("llama_model_quantize_default_params", _Bytes)
        numbers = _numbers(params)
        if numbers[0] != 0 or not 0 <= numbers[1] < 64:
            raise _other("llama_model_quantize_params")
        numbers[1] = kind
        done = self.call(
            "llama_model_quantize",
            ctypes.c_uint32,
            str(file).encode(),
            str(output).encode(),
            ctypes.byref(params),
        )
        if done:
            raise ProviderError(
                f"llama.cpp cannot quantize {file}: {' '.join(_ERRORS)}",
                "Make the GGUF file in float32 again.",
            )


class LlamaModel:
    """A model, with an adapter or without.

    Args:
        library: the library.
        file: a GGUF file.
        lora: that of an adapter, or ``None``.

    Raises:
        ProviderError: a file cannot be opened.
    """

    def __init__(self, library: LlamaLibrary, file: str, lora: str | None) -> None:
        self.library = library
        params = library.call("llama_model_default_params", _Bytes)
        found = library.call("llama_model_load_from_file", ctypes.c_void_p, file.encode(), params)
        self.handle = library.made(file, found)
        self.adapter: ctypes.c_void_p | None = None
        if lora is not None:
            found = library.call(
                "llama_adapter_lora_init", ctypes.c_void_p, self.handle, lora.encode()
            )
            self.adapter = library.made(lora, found)


class LlamaSequence:
    """One sequence of tokens in a model.

    Args:
        model: the model.
        room: positions.
        threads: that compute.
        exact: attention and cache are in float32, else in float16, as they are by default.

    Raises:
        ProviderError: it cannot be made, or the library is one of another interface.
    """

    def __init__(self, model: LlamaModel, room: int, threads: int, *, exact: bool) -> None:
        self._library = library = model.library
        call = library.call
        params = call("llama_context_default_params", _Bytes)
        numbers = _numbers(params)
        cache = tuple(numbers[_CACHE - 5 : _CACHE + 2])
        known = cache == _BEFORE_CACHE and tuple(numbers[_FLASH - 3 : _FLASH + 1]) == _AUTO
        if tuple(numbers[:3]) != (512, 2048, 512) or not known:
            raise _other("llama_context_params")
        numbers[0] = room
        if exact:
            numbers[_CACHE : _CACHE + 2] = _FLOAT32, _FLOAT32
            numbers[_FLASH] = 0
        context = call("llama_init_from_model", ctypes.c_void_p, model.handle, params)
        self._context = library.made("a context", context)
        self._batch = min(numbers[1], room)
        self._attach(threads)
        if model.adapter is not None:
            handles, scales = (ctypes.c_void_p * 1)(model.adapter), (ctypes.c_float * 1)(1.0)
            many = ctypes.c_size_t(1)
            call("llama_set_adapters_lora", ctypes.c_int, self._context, handles, many, scales)
        self._memory = library.made(
            "a cache", call("llama_get_memory", ctypes.c_void_p, self._context)
        )
        vocabulary = library.made(
            "a vocabulary", call("llama_model_get_vocab", ctypes.c_void_p, model.handle)
        )
        self._size = int(call("llama_vocab_n_tokens", ctypes.c_int, vocabulary))

    def _attach(self, threads: int) -> None:
        """Threads that stay from token to token, as llama.cpp's own programs have them."""
        call, made = self._library.call, self._library.made
        call("llama_set_n_threads", None, self._context, threads, threads)
        device = call("ggml_backend_dev_by_type", ctypes.c_void_p, _CPU)
        kind = call(
            "ggml_backend_dev_backend_reg", ctypes.c_void_p, made("a processor's device", device)
        )
        address = call(
            "ggml_backend_reg_get_proc_address",
            ctypes.c_void_p,
            ctypes.c_void_p(kind),
            b"ggml_threadpool_new",
        )
        make: Callable[..., Any] = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
            made("threads", address).value or 0
        )
        params = call("ggml_threadpool_params_default", _Bytes, threads)
        numbers = _numbers(params, _MASK)
        if (numbers[0], numbers[2]) != (threads, _POLL):
            raise _other("ggml_threadpool_params")
        numbers[2] = _SHORT
        pool = made("threads", make(ctypes.addressof(params)))
        call("llama_attach_threadpool", None, self._context, pool, pool)

    def close(self) -> None:
        """Free the sequence, but not the model; its threads sleep on."""
        self._library.call("llama_free", None, self._context)

    def clear(self) -> None:
        """Forget the sequence."""
        self._library.call("llama_memory_clear", None, self._memory, ctypes.c_bool(True))

    def run(self, tokens: Sequence[int]) -> None:
        """Append tokens; the logits after the last one are there when this returns.

        Raises:
            ProviderError: there is no room.
        """
        for start in range(0, len(tokens), self._batch):
            part = tokens[start : start + self._batch]
            ids = (ctypes.c_int32 * len(part))(*part)
            batch = self._library.call("llama_batch_get_one", _Bytes, ids, len(part))
            done = self._library.call("llama_decode", ctypes.c_int, self._context, batch)
            if done:
                raise ProviderError(
                    f"llama_decode returned {done} for {len(part)} tokens",
                    "Ask for fewer tokens, or leave llama.cpp out.",
                )
        self._library.call("llama_synchronize", None, self._context)

    def logits(self) -> NDArray[np.float32]:
        """``[vocab]`` after the last token."""
        found = self._library.call(
            "llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), self._context, -1
        )
        return np.ctypeslib.as_array(found, shape=(self._size,)).copy()


def _numbers(params: _Bytes, offset: int = 0) -> Any:
    """What a structure holds from some byte on, as 32-bit numbers."""
    return (ctypes.c_uint32 * 32).from_buffer(params, offset)


def _other(structure: str) -> ProviderError:
    return ProviderError(
        f"this build of llama.cpp has another {structure} than is known here",
        "Take the release that ci/venv names.",
    )
