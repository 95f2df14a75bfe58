"""Finds libllama, recognises its build, and declares the functions used."""

from __future__ import annotations

import ctypes as C
import importlib.util
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from flashmoe.common.files import expanded
from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.abi import CONSTANTS, f32, flag, i32, ptr, u32
from flashmoe.engines.llamacpp.facts import differences
from flashmoe.engines.llamacpp.instructions import compiled_for
from flashmoe.errors import LibraryError

_log = logging.getLogger("flashmoe.llama.cpp")
_LEVELS = {
    CONSTANTS["GGML_LOG_LEVEL_WARN"]: logging.WARNING,
    CONSTANTS["GGML_LOG_LEVEL_ERROR"]: logging.ERROR,
}
_CONTINUED = CONSTANTS["GGML_LOG_LEVEL_CONT"]  # of the line before

_MOST_WARNINGS = 200  # of a model with as many tensors that are not used

ENVIRONMENT = "FLASHMOE_LIBLLAMA"
_SUFFIXES = (".so", ".dylib", ".dll")
# Turns that a compute thread waits for the others before it sleeps, some 30 ms: longer than a layer's reads take. With
# OpenMP's own 3 ms they fall asleep within a token (docs/benchmarks.md); OMP_WAIT_POLICY=passive still holds.
_SPINS, _OWN_SPINS = "3000000", "300000"
_text, _size, _ne = C.c_char_p, C.c_size_t, C.c_int64

#: What the library's own kernels are called, where modules have names of their own.
BUILT_IN = "built-in"
CPU_DEVICE = CONSTANTS["GGML_BACKEND_DEVICE_TYPE_CPU"]
_CPU_BACKEND = b"CPU"
_OF_THE_KERNELS = ("ggml_threadpool_new", "ggml_threadpool_free")

#: name -> (result, arguments); structs, which differ between builds, by their names
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "ggml_version": (_text, ()),
    "llama_print_system_info": (_text, ()),
    "llama_log_set": (None, (abi.LOG_CALLBACK, ptr)),
    "llama_model_default_params": ("llama_model_params", ()),
    "llama_model_load_from_file": (ptr, (_text, "llama_model_params")),
    "llama_model_load_from_file_ptr": (ptr, (ptr, "llama_model_params")),
    "llama_model_free": (None, (ptr,)),
    "llama_context_default_params": ("llama_context_params", ()),
    "llama_init_from_model": (ptr, (ptr, "llama_context_params")),
    "llama_model_get_vocab": (ptr, (ptr,)),
    "llama_model_n_ctx_train": (i32, (ptr,)),
    "llama_model_n_swa": (i32, (ptr,)),
    "llama_model_has_encoder": (flag, (ptr,)),
    "llama_model_is_recurrent": (flag, (ptr,)),
    "llama_model_is_hybrid": (flag, (ptr,)),
    "llama_model_is_diffusion": (flag, (ptr,)),
    "llama_state_seq_get_size_ext": (_size, (ptr, i32, u32)),
    "llama_model_n_embd_out": (i32, (ptr,)),
    "llama_model_meta_val_str": (i32, (ptr, _text, _text, _size)),
    "llama_model_chat_template": (_text, (ptr, _text)),
    "llama_free": (None, (ptr,)),
    "llama_n_ctx": (u32, (ptr,)),
    "llama_attach_threadpool": (None, (ptr, ptr, ptr)),
    "llama_detach_threadpool": (None, (ptr,)),
    "llama_decode": (i32, (ptr, "llama_batch")),
    "llama_get_logits_ith": (C.POINTER(f32), (ptr, i32)),
    "llama_set_embeddings": (None, (ptr, flag)),
    "llama_set_causal_attn": (None, (ptr, flag)),
    "llama_get_embeddings_seq": (C.POINTER(f32), (ptr, i32)),
    "llama_get_memory": (ptr, (ptr,)),
    "llama_memory_clear": (None, (ptr, flag)),
    "llama_memory_seq_pos_min": (i32, (ptr, i32)),
    "llama_memory_seq_rm": (flag, (ptr, i32, i32, i32)),
    "llama_vocab_n_tokens": (i32, (ptr,)),
    "llama_vocab_is_eog": (flag, (ptr, i32)),
    "llama_vocab_bos": (i32, (ptr,)),
    "llama_vocab_eos": (i32, (ptr,)),
    "llama_vocab_get_text": (_text, (ptr, i32)),
    "llama_vocab_get_add_bos": (flag, (ptr,)),
    "llama_tokenize": (i32, (ptr, _text, i32, C.POINTER(i32), i32, flag, flag)),
    "llama_token_to_piece": (i32, (ptr, i32, _text, i32, i32, flag)),
    "llama_sampler_chain_default_params": ("llama_sampler_chain_params", ()),
    "llama_sampler_chain_init": (ptr, ("llama_sampler_chain_params",)),
    "llama_sampler_chain_add": (None, (ptr, ptr)),
    "llama_sampler_free": (None, (ptr,)),
    "llama_sampler_sample": (i32, (ptr, ptr, i32)),
    "llama_sampler_init_greedy": (ptr, ()),
    "llama_sampler_init_dist": (ptr, (u32,)),
    "llama_sampler_init_top_k": (ptr, (i32,)),
    "llama_sampler_init_top_p": (ptr, (f32, _size)),
    "llama_sampler_init_min_p": (ptr, (f32, _size)),
    "llama_sampler_init_temp": (ptr, (f32,)),
    "ggml_tensor_overhead": (_size, ()),
    "ggml_init": (ptr, ("ggml_init_params",)),
    "ggml_free": (None, (ptr,)),
    "ggml_new_tensor_2d": (ptr, (ptr, C.c_int, _ne, _ne)),
    "ggml_new_tensor_3d": (ptr, (ptr, C.c_int, _ne, _ne, _ne)),
    "ggml_mul_mat": (ptr, (ptr, ptr, ptr)),
    "ggml_mul_mat_id": (ptr, (ptr, ptr, ptr, ptr)),
    "ggml_get_rows": (ptr, (ptr, ptr, ptr)),
    "ggml_new_graph": (ptr, (ptr,)),
    "ggml_new_graph_custom": (ptr, (ptr, _size, flag)),
    "ggml_build_forward_expand": (None, (ptr, ptr)),
    "ggml_op_desc": (_text, (ptr,)),
    "ggml_get_name": (ptr, (ptr,)),
    "ggml_get_data": (ptr, (ptr,)),
    "ggml_backend_cpu_buffer_type": (ptr, ()),
    "ggml_backend_buffer_init": (ptr, (ptr, "ggml_backend_buffer_i", ptr, _size)),
    "ggml_backend_buffer_free": (None, (ptr,)),
    "ggml_backend_buffer_is_host": (flag, (ptr,)),
    "ggml_backend_buffer_get_type": (ptr, (ptr,)),
    "ggml_backend_buffer_init_tensor": (C.c_int, (ptr, ptr)),
    "ggml_backend_buffer_set_usage": (None, (ptr, C.c_int)),
    "ggml_backend_buft_alloc_buffer": (ptr, (ptr, _size)),
    "ggml_backend_buft_name": (_text, (ptr,)),
    "ggml_backend_buft_get_device": (ptr, (ptr,)),
    "ggml_backend_dev_backend_reg": (ptr, (ptr,)),
    "ggml_backend_load": (ptr, (_text,)),
    "ggml_backend_unload": (None, (ptr,)),
    "ggml_backend_reg_name": (_text, (ptr,)),
    "ggml_backend_dev_by_type": (ptr, (C.c_int,)),
    "ggml_backend_dev_init": (ptr, (ptr, _text)),
    "ggml_backend_graph_compute": (C.c_int, (ptr, ptr)),
    "ggml_backend_free": (None, (ptr,)),
    "ggml_backend_dev_supports_op": (flag, (ptr, ptr)),
    "ggml_backend_reg_get_proc_address": (ptr, (ptr, _text)),
    "ggml_backend_tensor_set": (None, (ptr, ptr, _size, _size)),
    "ggml_threadpool_params_default": ("ggml_threadpool_params", (i32,)),
    "ggml_threadpool_new": (ptr, (ptr,)),
    "ggml_threadpool_free": (None, (ptr,)),
}


#: The library goes on calling them when nothing else knows them any more.
_loggers: list[Any] = []
_NO_LOG = C.CDLL(None).abs  # looks at its first argument only, and does nothing


class Library:
    """libllama with its functions as attributes. `messages` keeps the last lines that it logged as errors, `warnings`
    those that it logged as warnings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: The module whose kernels compute instead of the library's own; see `exchange_kernels`.
        self.module: Path | None = None
        #: Whether repacked layouts are fit for use: the self-test may have found that they are not.
        self.repacks = True
        self._handles = _load(path)
        self.build = self._recognise()
        self.structs = self.build.layout.structs
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self._level = 0  # of the last line, as `logging` has it
        self._log = abi.LOG_CALLBACK(self._on_log)
        _loggers.append(self._log)
        self.llama_log_set(self._log, None)
        self.llama_backend_init()

    @property
    def features(self) -> list[str]:
        """What the kernels in use were compiled for, by ggml's names: AVX2, AVX512, NEON, ..., OPENMP."""
        line = self.llama_print_system_info().decode(errors="replace")
        return sorted({name for name, on in re.findall(r"(\w+) = (\d+)", line) if on != "0"})

    @property
    def kernels(self) -> str:
        """The kernels in use, for people: "zen4 (AVX-512)"."""
        name = kernels_name(self.module) if self.module else BUILT_IN
        best = compiled_for(self.features)
        return f"{name} ({best})" if best else name

    @property
    def openmp(self) -> bool:
        """Whether the kernels in use share their work by OpenMP; else by a thread pool of ggml's."""
        return "OPENMP" in self.features

    @property
    def openmp_runtime(self) -> C.CDLL:
        """Where the functions of the OpenMP library of the kernels in use are found."""
        return C.CDLL(str(self.module)) if self.module else self._handles[-1]

    def exchange_kernels(self, module: Path) -> None:
        """Compute with the kernels of a CPU backend module, a shared library of ggml's, from here on.

        For models that are loaded after it; once in a process. Raises LibraryError where ggml refuses the module (of
        another interface version, for another processor) and leaves the library's own kernels in use.
        """
        assert self.module is None
        own = self.ggml_backend_dev_backend_reg(self.ggml_backend_dev_by_type(CPU_DEVICE))
        self.listen()  # ggml says why it refuses one
        loaded = self.ggml_backend_load(os.fsencode(module))
        if not loaded:
            reason = (self.messages or ["for another processor"])[-1].removeprefix("load_backend: ")
            reason = reason.replace(str(module), "it")
            raise LibraryError(f"{module.name}: not a module that this llama.cpp can use ({reason})")
        if self.ggml_backend_reg_name(loaded) != _CPU_BACKEND:
            self.ggml_backend_unload(loaded)
            raise LibraryError(f"{module.name}: has no kernels for a CPU")
        self.ggml_backend_unload(own)
        # it brings the base library of its own build, which would log to stderr
        silenced = C.CDLL(str(module))
        with suppress(AttributeError):
            silenced.ggml_log_set(self._log, None)
        for name in _OF_THE_KERNELS:
            result, arguments = PROTOTYPES[name]
            address = self.ggml_backend_reg_get_proc_address(loaded, name.encode())
            setattr(self, name, C.CFUNCTYPE(result, *arguments)(address))
        self.module = module

    def _recognise(self) -> abi.Build:
        """Declare the functions by the layout that they agree with. Two commits may have one version: it only says
        which layout to try first. Raises LibraryError where none agrees."""
        version = self._version("llama_version"), self._version("ggml_version")
        wrong: list[list[str]] = []
        for layout in sorted(abi.LAYOUTS, key=lambda layout: version not in layout.builds.values()):
            for name, (result, arguments) in PROTOTYPES.items():
                self._declare(name, *(layout.structs.get(kind, kind) for kind in (result, *arguments)))
            if not (differing := differences(self, layout)):
                names = [name for name, its in layout.builds.items() if its == version]
                package = self.path.name.partition(".")[0]
                names = [name for name in names if name.startswith(package)] or names
                return abi.Build(" or ".join(names) or _words(version), layout, known=bool(names))
            wrong.append(differing)
        closest = min(wrong, key=len)
        raise LibraryError(
            f"{self.path}: {_words(version)} is not a build that FlashMoE knows, and differs from those in "
            f"{', '.join(closest)}; install one of {abi.known_builds()}"
        )

    def _version(self, function: str) -> str:
        """What it returns, without the mark of a build that is no release; "" where there is no such function."""
        try:
            found = self._find(function)
        except LibraryError:
            return ""
        found.restype = _text
        return str((found() or b"").decode(errors="replace").removesuffix("-dev"))

    def __getattr__(self, name: str) -> Any:  # tells type checkers that what PROTOTYPES set exists
        raise AttributeError(name)

    def _declare(self, name: str, result: Any, *arguments: Any) -> None:
        function = self._find(name)
        function.restype, function.argtypes = result, list(arguments)
        setattr(self, name, function)

    @property
    def handle(self) -> C.CDLL:
        """The library itself, without those beside it."""
        return self._handles[0]

    def address(self, name: str) -> int:
        """Where a function is."""
        return C.cast(self._find(name), C.c_void_p).value or 0

    def listen(self) -> None:
        """Forget `messages` and `warnings`, and have those that come."""
        self.messages.clear()
        self.warnings.clear()
        self.keep_log()

    def keep_log(self) -> None:
        """Have errors in `messages` again: a process has one log, which its server or another `Library` takes."""
        self.llama_log_set(self._log, None)

    def silence(self) -> None:
        """Log nothing until `keep_log`: before a call that keeps Python's lock and waits for a thread that may log."""
        self.llama_log_set(C.cast(_NO_LOG, abi.LOG_CALLBACK), None)

    def _find(self, name: str) -> Any:
        for handle in self._handles:
            try:
                return getattr(handle, name)
            except AttributeError:
                continue
        raise LibraryError(
            f"{self.path}: has no function {name}; it is not a llama.cpp library that FlashMoE knows"
        )

    def _on_log(self, level: int, text: bytes | None, _data: Any) -> None:
        """Called in whatever thread the library logs. Its calls release Python's lock, but for those that start its
        server, when the server's own log takes the place of this one, and end it, which `silence` is for."""
        if level != _CONTINUED:
            self._level = _LEVELS.get(level, 0)
        line = text.decode("utf-8", errors="replace").strip() if text and self._level else ""
        if line:
            _log.log(self._level, "%s", line)
            if self._level == logging.ERROR:
                self.messages = [*self.messages[-19:], line]
            elif len(self.warnings) < _MOST_WARNINGS:
                self.warnings.append(line)


def spin_as_openmp_does() -> None:
    """Before a library is loaded: let its threads wait as they do in other programs, unless the user says otherwise."""
    if os.environ.get("GOMP_SPINCOUNT", _SPINS) == _SPINS:
        os.environ["GOMP_SPINCOUNT"] = _OWN_SPINS


def _words(version: abi.Version) -> str:
    return (
        f"llama.cpp {version[0]} (ggml {version[1]})" if version[0] else f"llama.cpp with ggml {version[1]}"
    )


def _load(path: Path) -> list[C.CDLL]:
    """Open a library, with the ggml libraries beside it where it comes in parts."""
    if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP looks when it is loaded
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    folder = path.parent
    parts = [
        p
        for n in ("ggml-base", "ggml-cpu", "ggml")
        for s in _SUFFIXES
        if (p := folder / f"lib{n}{s}").exists()
    ]
    try:
        handles = [C.CDLL(str(p), mode=C.RTLD_GLOBAL) for p in parts]
        return [C.CDLL(str(path)), *handles]
    except OSError as error:
        hint = "; install the system package libgomp1" if "libgomp" in str(error) else ""
        raise LibraryError(f"{path}: cannot be loaded ({error}){hint}") from None


def find_library() -> Path:
    """The libllama to use: FLASHMOE_LIBLLAMA (file or folder), else xllamacpp's, else llama-cpp-python's.

    Raises LibraryError when there is none.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        path = expanded(named).absolute()  # a mere name would be looked for elsewhere
        found = [path] if path.is_file() else [p for s in _SUFFIXES if (p := path / f"libllama{s}").is_file()]
        if not found:
            raise LibraryError(
                f"{ENVIRONMENT}={named}: no such library; name libllama.so or the folder that has it"
            )
        return found[0]
    for package, pattern in (("xllamacpp", "xllamacpp*"), ("llama_cpp", "lib/libllama*")):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            for path in sorted(Path(spec.submodule_search_locations[0]).glob(pattern)):
                if path.suffix in (*_SUFFIXES, ".pyd"):
                    return path
    raise LibraryError(
        "no llama.cpp library found: pip install xllamacpp, or set FLASHMOE_LIBLLAMA to a libllama"
    )


def kernels_name(module: Path) -> str:
    """What the kernels in a module's file are called: "zen4" for libggml-cpu-zen4.so."""
    return module.name.split(".so")[0].removeprefix("lib").removeprefix("ggml-").removeprefix("cpu-")


def is_of_wheel(path: Path) -> bool:
    """Whether a library is xllamacpp's, which has llama.cpp's server and takes modules of kernels."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return False
    return path.resolve().parent == Path(spec.origin).resolve().parent


_opened: dict[Path, Library] = {}


def open_library(path: Path, module: Path | None = None, *, repacks: bool = True) -> Library:
    """The library at `path`, opened and checked once per process, with the kernels of its first opening.

    module, repacks: see `Library`. Raises LibraryError.
    """
    if path not in _opened:
        lib = Library(path)
        if module:
            lib.exchange_kernels(module)
        lib.repacks = repacks
        _opened[path] = lib
    return _opened[path]
