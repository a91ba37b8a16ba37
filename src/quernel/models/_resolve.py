"""``resolve``: turn what a user types into a model: a name, a folder, or ``package.module:factory`` with weights."""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quernel._errors import FormatError, MissingExtraError, QuernelError
from quernel._io import CONFIG, is_quernel_folder, read_safetensors
from quernel._load import load as load_folder
from quernel._module_tree import assign_tensors
from quernel._progress import Progress
from quernel._transformers import harmless_attention
from quernel.models._bundled import load, names
from quernel.models._sentence_folder import is_sentence_folder
from quernel.models.sentence_encoder import SentenceEncoder


def resolve(
    source: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the model that ``source`` names, in eval mode.

    Parameters
    ----------
    source : str or path
        A bundled name; a folder saved by Quernel, sentence-transformers or transformers; or
        ``"package.module:factory"``, where ``factory()`` gives an ``nn.Module``. A bundled name wins over a
        folder of that name (write ``./name`` for the folder).
    weights : path, optional
        A ``.safetensors`` file whose names and shapes are exactly the model's, or a folder that ``models.save`` or
        ``Result.save`` wrote of a model of this class, compressed or not.
    progress : callable, optional
        ``progress(message, fraction)``, where the model must be trained first.

    Raises
    ------
    QuernelError
        If the source is none of these, or the factory does not give a module.
    FormatError
        If a file is missing, truncated or damaged, or the weights do not fit (first differences named).
    """
    text = os.fspath(source)
    if text in names():
        model = load(text, progress=progress)
    elif Path(text).is_dir():
        model = _from_folder(Path(text))
    elif ":" in text:
        model = _from_factory(text)
    else:
        raise QuernelError(
            f"model must be a bundled name ({', '.join(names())}), a folder, or package.module:factory; got {text!r}"
        )
    if weights is not None and Path(weights).is_dir():
        model = _saved(Path(weights), model)
    elif weights is not None:
        _fill(model, Path(weights))
    return model.eval()


def _from_folder(folder: Path) -> nn.Module:
    if is_quernel_folder(folder):
        return _saved(folder)
    if is_sentence_folder(folder):
        return SentenceEncoder.from_folder(folder)
    if (folder / CONFIG).is_file():
        return _from_transformers(folder)
    raise FormatError(
        f"{folder}: neither {CONFIG} nor modules.json is there; expected a folder saved by Quernel, transformers or "
        "sentence-transformers"
    )


def _saved(folder: Path, model: nn.Module | None = None) -> nn.Module:
    loaded = load_folder(folder, model)
    if not isinstance(loaded, nn.Module):
        raise QuernelError(f"{folder} holds a {type(loaded).__name__}, not a model")
    return loaded


def _from_transformers(folder: Path) -> nn.Module:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"opening the transformers folder {folder}", "hf") from error
    import safetensors

    # Without this check a truncated file would surface as an error deep inside transformers.
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(f"{file}: not a whole safetensors file ({error}); it may be truncated") from error
    try:
        offline = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **offline)
        named = getattr(transformers, (config.architectures or [""])[0] or "AutoModel", None)
        # config.json may ask for kernels of a hub, which would be downloaded and run.
        config._attn_implementation = harmless_attention(config._attn_implementation)
        config._experts_implementation = None
        # The class with its head, where the folder names one of transformers' own.
        model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        cls = named if model else transformers.AutoModel
        with torch.random.fork_rng(devices=[]):
            loaded: nn.Module = cls.from_pretrained(  # type: ignore[union-attr]
                folder, config=config, **offline, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{folder}: transformers cannot open it: {error}") from error
    return loaded


def _from_factory(text: str) -> nn.Module:
    module_name, _, factory_name = text.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise QuernelError(
            f"{module_name!r} of model {text!r} is no name of a module; write package.module:function, without a path"
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise QuernelError(
            f"cannot import {module_name!r} of model {text!r}: {error}. Is its folder on the path (PYTHONPATH)?"
        ) from error
    factory = getattr(module, factory_name, None)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise QuernelError(f"module {module_name!r} has no function {factory_name!r}; model was {text!r}")
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise QuernelError(f"{text} must be a function that needs no arguments: {error}") from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise QuernelError(f"{text} must give an nn.Module; got {type(model).__name__}")
    return model


def _fill(model: nn.Module, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise QuernelError(
            f"weights must be a .safetensors file, or a folder that quernel.models.save wrote; got {str(file)!r}. "
            "Convert with safetensors.torch.save_model"
        )
    tensors = read_safetensors(file)
    # safetensors stores tied tensors once; give the other names back.
    state = model.state_dict(keep_vars=True)
    held = {id(state[name]): name for name in tensors if name in state}
    for name, own in state.items():
        if name not in tensors and id(own) in held:
            tensors[name] = tensors[held[id(own)]]
    assign_tensors(model, tensors, file=str(file))
