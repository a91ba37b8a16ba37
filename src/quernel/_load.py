"""``load``: bring back whatever Quernel saved, from its folder alone where the folder can say how.

A folder names registered classes only; they are imported when needed, and nothing else in the file is run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quernel._array_folder import ArrayFolder
from quernel._errors import FormatError, MissingExtraError, QuernelError
from quernel._io import CONFIG, read_folder, write_atomically, write_folder
from quernel._module_tree import (
    assign_tensors,
    cast_unsaved_buffers,
    changed_modules,
    describes_itself,
    fitting,
    meta_leftovers,
    parameters_on_meta,
    share_modules,
    shared_modules,
    signature,
    swap_modules,
    unsaved_buffer_dtypes,
)
from quernel._registry import resolve_class
from quernel._transformers import harmless_attention, harmless_config, tokenizer_files


def load(path: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module] | None = None) -> Any:
    """Load an object saved by Quernel.

    Parameters
    ----------
    path : path
        Folder written by ``Result.save`` or an object's ``save``.
    model : nn.Module or callable, optional
        The uncompressed architecture, or a function that builds it; needed only where the folder cannot
        name it: your own class, and any class of another library than transformers, such as
        ``SentenceTransformer``. Its weights are replaced, whatever they are.

    Returns
    -------
    object
        A model in eval mode, or the saved estimator, index or sketch.

    Raises
    ------
    FormatError
        If anything in the folder is missing, damaged, foreign, or does not fit the architecture.
    QuernelError
        If the folder cannot name its architecture and ``model`` is not given.

    Notes
    -----
    A ``SentenceTransformer`` that you compress and save needs ``model=`` here. To have a folder that loads
    by itself, open the model with ``quernel.models.resolve(folder)``: it gives a ``SentenceEncoder``.

    Examples
    --------
    >>> import quernel, tempfile
    >>> from quernel.models import DigitsCNN
    >>> folder = quernel.models.save(DigitsCNN(), tempfile.mkdtemp())
    >>> type(quernel.load(folder)).__name__
    'DigitsCNN'
    """
    folder = read_folder(path)
    file = str(folder.path / CONFIG)
    kind = folder.content.get("kind")
    if kind != "model":
        cls = resolve_class(folder.content.get("class"), file=file, field="quernel.content.class")
        if not hasattr(cls, "from_folder"):
            raise FormatError(
                f"{file}: field 'quernel.content.class' names {cls.__name__}, which is not saved on its own"
            )
        with fitting(file, "quernel.content"):
            # Some objects have parts in folders of their own beside the file.
            place = {"path": folder.path} if issubclass(cls, ArrayFolder) else {}
            return cls.from_folder(folder.content, folder.tensors, **place)
    architecture, modules = folder.content.get("architecture"), folder.content.get("modules")
    if not isinstance(architecture, dict) or not isinstance(modules, dict):
        raise FormatError(f"{file}: fields 'quernel.content.architecture' and '.modules' must be objects")
    # A function of the user's may read weights and move them, which tensors without values cannot.
    given = None if model is None else _given(model)
    with parameters_on_meta():
        built = build_architecture(architecture, folder.path, folder.files) if given is None else given
        swap_modules(built, modules, file=file)
        # Folders of earlier versions do not say what is shared within described modules.
        share_modules(built, folder.content.get("shared", {}), modules, file=file)
        cast_unsaved_buffers(built, folder.content.get("buffer_dtypes"), file=file)
    assign_tensors(built, folder.tensors, file=file)
    left = meta_leftovers(built)
    if left:
        raise FormatError(f"{file}: no saved tensor fills {', '.join(left[:5])}")
    return built.eval()


def save_model(
    model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None, source: Any = None
) -> Path:
    """Save a model with every module that a method put into it.

    Parameters
    ----------
    model : nn.Module
        Possibly compressed. Its class decides whether the folder alone can rebuild it: classes of
        ``quernel.models`` and of transformers can. A class may define ``portable() -> (config, files)`` and
        ``from_portable(config, folder)`` where files travel with it.
    path : path
        Folder to create or to replace.
    extra : mapping, optional
        JSON-able notes kept beside the model (the recipe).
    """
    architecture, files = describe_architecture(model)
    original = _signature_of(architecture, model)
    modules = changed_modules(model, original)
    content = {
        "kind": "model",
        "class": type(model).__name__,
        "architecture": architecture,
        "modules": modules,
        "shared": shared_modules(model, modules),
        "buffer_dtypes": unsaved_buffer_dtypes(model),
        "extra": dict(extra or {}),
    }
    folder = write_folder(path, content, dict(model.state_dict()), _foreign_keys(architecture), files)
    if architecture["library"] == "transformers":
        _copy_tokenizer(model, folder)
    return folder


def describe_architecture(model: nn.Module) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return how a folder names the uncompressed architecture of ``model``, and the files that belong to it."""
    root = type(model).__module__.partition(".")[0]
    if describes_itself(model):
        described: Any = model
        config, files = described.portable() if hasattr(model, "portable") else (described.config(), {})
        return {"library": "quernel", "class": type(model).__name__, "config": config}, files
    if root == "transformers" and hasattr(model, "config"):
        # to_dict() drops non-JSON values; the digest needs plain JSON.
        settings: Any = model.config
        attention = harmless_attention(getattr(settings, "_attn_implementation", None))
        config = harmless_config(settings.to_dict())
        return {
            "library": "transformers",
            "class": type(model).__name__,
            "config": config,
            "attention": attention,
        }, {}
    return {"library": None, "class": f"{type(model).__module__}.{type(model).__qualname__}", "config": {}}, {}


def build_architecture(architecture: Mapping[str, Any], path: Path, files: Path | None = None) -> nn.Module:
    """Build the model that ``describe_architecture`` named; call within ``parameters_on_meta``."""
    library, name, config = architecture.get("library"), architecture.get("class"), architecture.get("config")
    file = str(path / CONFIG)
    field = "quernel.content.architecture"
    if "library" not in architecture or library not in (None, "quernel", "transformers"):
        raise FormatError(f"{file}: field '{field}.library' must be quernel, transformers or null; got {library!r}")
    if library in ("quernel", "transformers") and not isinstance(config, dict):
        raise FormatError(f"{file}: field '{field}.config' must be an object; got {config!r}")
    if library == "quernel":
        cls: Any = resolve_class(name, file=file, field=f"{field}.class")
        with fitting(file, f"{field}.config"):
            model = cls.from_portable(config, files) if hasattr(cls, "from_portable") else cls.from_config(config)
    elif library == "transformers":
        model = _transformers_model(str(name), dict(config or {}), architecture.get("attention"), file)
    else:
        raise QuernelError(
            f"{path} holds a model of class {name!r}, which Quernel cannot build by itself. "
            "Pass it: quernel.load(path, model=YourClass(...)) or model=a function that builds it; on the command line "
            "package.module:factory as the model, and --weights with this folder"
        )
    if not isinstance(model, nn.Module):
        raise FormatError(f"{file}: field 'quernel.content.architecture.class' names {name!r}, which is not a model")
    return model


def _transformers_model(name: str, config: Mapping[str, Any], attention: Any, file: str) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(f"loading a transformers model ({name})", "hf") from error
    with fitting(file, "quernel.content.architecture.class"):
        cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise FormatError(
            f"{file}: field 'quernel.content.architecture.class' names {name!r}, not a transformers model"
        )
    builder: Any = cls
    # from_config and not cls(settings): it applies the attention; no remote code, no kernel of a hub.
    with fitting(file, "quernel.content.architecture.config"):
        settings = transformers.AutoConfig.for_model(**harmless_config(config))
        settings.name_or_path = str(Path(file).parent)
        model: nn.Module = builder._from_config(settings, attn_implementation=harmless_attention(attention))
    return model


def _copy_tokenizer(model: Any, folder: Path) -> None:
    """Put the tokenizer of the folder that ``model`` came from beside it, where transformers looks for one."""
    source = getattr(model.config, "name_or_path", None)
    for name, file in tokenizer_files(source if isinstance(source, str) else None).items():
        if name != CONFIG and not (folder / name).exists():
            write_atomically(folder / name, file.read_bytes())


def _signature_of(architecture: Mapping[str, Any], model: nn.Module) -> Any:
    if architecture["library"] is None:
        return None
    with parameters_on_meta():
        return signature(build_architecture(architecture, Path()))


def _foreign_keys(architecture: Mapping[str, Any]) -> dict[str, Any] | None:
    if architecture["library"] != "transformers":
        return None
    settings: dict[str, Any] = architecture["config"]
    return settings | {"architectures": [architecture["class"]]}


def _given(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise QuernelError(f"model must be a module or a function that builds one; got {type(model).__name__}")
    built = model()
    if not isinstance(built, nn.Module):
        raise QuernelError(f"model must build an nn.Module; got {type(built).__name__}")
    return built
