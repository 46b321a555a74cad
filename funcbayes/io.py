"""Saving posteriors to a file and loading them, without pickle.

A file is a safetensors file whose metadata hold one entry, ``"funcbayes"``: JSON with the version of
the format and the structure of the tree. The structure refers to tensors by name, and names are paths
(``"mean.head.weight"``), so any safetensors reader can look inside. Reading one runs no code: classes
are looked up among those that the package registered, and their fields are set as they were.

JSON numbers, strings, booleans and ``null`` stand for themselves. Everything else is an object of one
entry: ``{"tensor": name}``, ``{"float": "inf"}``, ``{"list": [...]}``, ``{"tuple": [...]}``,
``{"size": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"ordered_dict": [[key, value], ...]}`` or
``{"node": [class name, {field: value}]}``. A tensor that is the same all along its first axis is stored
once, ``{"repeated": [tensor, length]}``. Dtypes that not every safetensors has are stored as others of
the same bits: ``{"complex": name}`` as pairs of reals, ``{"uint16": name}`` and the like as signed.
"""

import dataclasses
import json
import math
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._functorch import is_concrete
from ._tree import NODE_TYPES, is_repeated, repeated

FORMAT_VERSION = 1
_ENTRY = "funcbayes"
_DTYPES = {  # what every safetensors that we allow can hold
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_UNSIGNED = {
    torch.uint16: ("uint16", torch.int16),
    torch.uint32: ("uint32", torch.int32),
    torch.uint64: ("uint64", torch.int64),
}


def save(posterior: Any, path: str | os.PathLike[str]) -> None:
    """Write a posterior to a file.

    The file is complete or not there: it is written beside ``path`` first, so a failing ``save`` leaves
    what was at ``path`` as it was.

    Args:
        posterior: Any posterior, or any tree the package makes: posteriors, covariances, likelihoods,
            ``Fixed``, ``MISSING``, dicts, lists, tuples, ``None``, tensors, numbers and strings in any
            nesting. Gradients and ``requires_grad`` are not kept, nor that two tensors share memory.
        path: File to write, in a folder that exists; ``.safetensors`` is a good ending.

    Raises:
        TypeError: If something has no form in a file, such as a function in ``Dropout(where=...)``.
        FileNotFoundError: If the folder of ``path`` does not exist.
        IsADirectoryError: If ``path`` is a folder.

    Example:
        >>> import tempfile, torch, funcbayes as fb
        >>> from funcbayes.io import load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(fb.Point({"w": torch.arange(3)}), f"{folder}/point.safetensors")
        ...     load(f"{folder}/point.safetensors").params["w"]
        tensor([0, 1, 2])
    """
    path = Path(path)
    writer = _Writer()
    structure = writer.encode(posterior, ())
    header = json.dumps({"version": FORMAT_VERSION, "tree": structure}, allow_nan=False)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`save(posterior, path)` should have a path in a folder that exists; {str(path.parent)!r} does "
            "not. Make it with `Path(path).parent.mkdir(parents=True)`."
        )
    if path.is_dir():
        raise IsADirectoryError(f"`save(posterior, path)` should be given a file, {str(path)!r} is a folder.")
    _replace(path, _separate(writer.tensors), header)


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read what :func:`save` wrote: the same tree, bit for bit.

    No code from the file is run.

    Args:
        path: File to read.
        device: Where tensors go; ``None`` for the CPU, wherever they were.

    Returns:
        The posterior or tree.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file that ``save`` wrote, is damaged, was written in a newer format, or
            holds a class that is not known here.

    Example:
        See :func:`save`.
    """
    path, device = Path(path), torch.device("cpu" if device is None else device)
    if not path.is_file():
        raise FileNotFoundError(f"`load(path)` should be given a file; there is none at {str(path)!r}.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _read_header(path, file.metadata() or {}, list(file.keys()))
            # Copies: a mapped file that is cut or overwritten later would take the posterior with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as err:
        raise ValueError(
            f"`load(path)` should be given a file written by `save`; {str(path)!r} is not a whole "
            f"safetensors file ({err})."
        ) from err
    return _Reader(path, tensors).read(header["tree"])


class _Writer:
    """Turns a tree into JSON, and puts its tensors aside under names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):  # np.float64 is one too
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, Tensor):
            if is_concrete(value) and value.layout == torch.strided and is_repeated(value):
                return {"repeated": [self.encode(value[0], path), len(value)]}
            return self._tensor(value, path)
        kind = _SEQUENCES.get(type(value))
        if kind is not None:
            return {kind: [self.encode(v, (*path, str(i))) for i, v in enumerate(value)]}
        kind = _DICTS.get(type(value))
        if kind is not None:
            return {kind: [[self._key(k, path), self.encode(v, (*path, str(k)))] for k, v in value.items()]}
        name = type(value).__name__
        if NODE_TYPES.get(name) is type(value):
            fields = (f.name for f in dataclasses.fields(value))
            return {"node": [name, {f: self.encode(getattr(value, f), (*path, f)) for f in fields}]}
        raise TypeError(_refusal(value, path))

    def _key(self, key: Any, path: tuple[str, ...]) -> Any:
        if not _is_key(key):
            raise TypeError(
                f"`save(posterior, path)` writes dicts whose keys are strings, numbers, booleans, None or "
                f"tuples of them; {_place(path)} has a key of type {type(key).__name__}."
            )
        return self.encode(key, path)

    def _tensor(self, tensor: Tensor, path: tuple[str, ...]) -> dict[str, str]:
        reason = _unwritable(tensor)
        if reason is not None:
            raise TypeError(f"`save(posterior, path)` cannot write {_place(path)}, {reason}")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        name = base = ".".join(path)
        count = 2
        while name in self.tensors or name in ("", "__metadata__"):  # reserved by the format
            name, count = f"{base}#{count}", count + 1
        kind, self.tensors[name] = _stored(tensor)
        return {kind: name}


_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", torch.Size: "size"}
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "ordered_dict"}


def _stored(tensor: Tensor) -> tuple[str, Tensor]:
    """Kind of the entry, and the same bits in a dtype that files have."""
    if tensor.is_complex():
        return "complex", torch.view_as_real(tensor)
    if tensor.dtype in _UNSIGNED:
        kind, signed = _UNSIGNED[tensor.dtype]
        return kind, tensor.view(signed)
    return "tensor", tensor


def _is_key(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_key, key))
    return key is None or type(key) in (bool, int, str, float)


def _place(path: tuple[str, ...]) -> str:
    return repr(".".join(path)) if path else "the tree itself"


def _refusal(value: Any, path: tuple[str, ...]) -> str:
    message = f"`save(posterior, path)` cannot write {_place(path)}, "
    if isinstance(value, nn.Module):
        return message + (
            f"an nn.Module ({type(value).__name__}): its code has no form in a file. Save parameters, "
            "`fn, params = make_functional(module)` and `Point(params)`."
        )
    if callable(value) and path and path[-1] == "where":
        return message + (
            'a function. Write `where` as a glob on paths, such as "head.*", or as a sequence of globs.'
        )
    if callable(value):
        return message + (
            "a function: code has no form in a file. Leave it out, and give it again after loading."
        )
    if dataclasses.is_dataclass(value):
        return message + f"a {type(value).__name__}: only classes of this package have a form."
    return message + (
        f"of type {type(value).__name__}. Posteriors, dicts, lists, tuples, tensors, numbers, strings, "
        "booleans and None have a form in a file; convert it to one of them."
    )


def _unwritable(tensor: Tensor) -> str | None:
    """What is wrong with a tensor that has no bytes of its own, or none of a kind we know."""
    if tensor.is_meta:
        return "a tensor on the meta device, which has no values."
    if not is_concrete(tensor):
        return "a tensor inside a `torch.func` transform. Save outside of `vmap` and `grad`."
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a tensor of class {type(tensor).__name__}. Convert it to a plain tensor."
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}. Convert it with `.to_dense()`."
    if tensor.dtype not in _DTYPES and tensor.dtype not in _UNSIGNED and not tensor.is_complex():
        return f"a tensor of {tensor.dtype}. Convert it to a dtype that safetensors files have."
    return None


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without common memory, copied only where they are not yet."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        shares = storage in seen and storage != 0
        separate[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()
        )
        seen.add(storage)
    return separate


def _replace(path: Path, tensors: dict[str, Tensor], header: str) -> None:
    # In the same folder, since a rename is atomic within one file system only.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={_ENTRY: header})
        partial.chmod(mode)  # some versions of safetensors make files that nobody else may read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash after the rename could leave an empty file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_header(path: Path, metadata: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        some = ", ".join(map(repr, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"`load(path)` should be given a file written by `save`; {str(path)!r} is a safetensors file of "
            f"another kind, with {some or 'no tensors'}. Read it with `safetensors.torch.load_file(path)`, "
            "and make `Point(tensors)` of parameters."
        )
    try:
        header = json.loads(metadata[_ENTRY])
    except (ValueError, RecursionError) as err:
        raise ValueError(_damage(path, f"its header is no JSON ({err})")) from err
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(_damage(path, "its header has no version"))
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`load(path)` reads files up to format {FORMAT_VERSION}; {str(path)!r} has format {version}. It "
            "was written by a newer funcbayes: update this one."
        )
    if "tree" not in header:
        raise ValueError(_damage(path, "its header has no tree"))
    return header


def _damage(path: Path, what: str) -> str:
    return f"`load(path)` should be given a file written by `save`; {str(path)!r} is damaged: {what}."


class _Unreadable(ValueError):
    """What is wrong is said already."""


class _Reader:
    """Turns JSON into a tree again; anything that ``save`` does not write is refused."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors
        self.kinds: dict[str, Callable[[Any], Any]] = {
            "tensor": self._tensor,
            "complex": lambda name: torch.view_as_complex(self._tensor(name)),
            "uint16": lambda name: self._tensor(name).view(torch.uint16),
            "uint32": lambda name: self._tensor(name).view(torch.uint32),
            "uint64": lambda name: self._tensor(name).view(torch.uint64),
            "repeated": lambda content: repeated(self.decode(content[0]), content[1]),
            "float": float,
            "list": self._items,
            "tuple": lambda items: tuple(self._items(items)),
            "size": lambda items: torch.Size(self._items(items)),
            "dict": lambda pairs: dict(self._pairs(pairs)),
            "ordered_dict": lambda pairs: OrderedDict(self._pairs(pairs)),
            "node": self._node,
        }

    def read(self, tree: Any) -> Any:
        try:
            return self.decode(tree)
        except _Unreadable:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError) as err:
            raise _Unreadable(_damage(self.path, f"its tree cannot be built ({err})")) from err

    def decode(self, code: Any) -> Any:
        if code is None or isinstance(code, bool | int | float | str):
            return code
        if not isinstance(code, dict) or len(code) != 1 or not code.keys() <= self.kinds.keys():
            raise _Unreadable(_damage(self.path, f"no entry of a tree looks like {json.dumps(code)[:60]}"))
        ((kind, content),) = code.items()
        return self.kinds[kind](content)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise _Unreadable(_damage(self.path, f"its tree has a tensor {name!r}, which is not there"))
        return self.tensors[name]

    def _items(self, items: Any) -> list[Any]:
        return [self.decode(item) for item in items]

    def _pairs(self, pairs: Any) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in pairs]

    def _node(self, content: Any) -> Any:
        name, codes = content
        cls = NODE_TYPES.get(name)
        if cls is None:
            raise _Unreadable(
                f"`load(path)` knows no class {name!r}, which {str(self.path)!r} holds. Update funcbayes if "
                "it was written by a newer one; if the class is your own, import it before."
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = {f.name: f.default for f in fields.values() if f.default is not dataclasses.MISSING}
        values |= {field: self.decode(code) for field, code in codes.items()}
        if values.keys() != fields.keys():
            raise _Unreadable(
                f"`load(path)` found a {name!r} with other fields in {str(self.path)!r}: {sorted(codes)}, "
                f"where this funcbayes has {sorted(fields)}. It was written by another version."
            )
        # Not cls(...): that would divide the weights of an ensemble by their sum once more, and nodes that
        # transforms have stacked need not pass the checks for single ones.
        node = object.__new__(cls)
        for name, field in fields.items():
            if field.metadata.get("static", False):
                hash(values[name])  # the structure of a tree is compared; TypeError if this cannot be
            object.__setattr__(node, name, values[name])
        return node
