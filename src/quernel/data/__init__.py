"""Data sets by name, offline: ``load``, ``names``, ``info``, ``from_path``; ``download`` only when called.

Files are looked for in the folder named by ``QUERNEL_DATA`` (may be read-only), then in the user cache;
every file is checked against its sha256 before it is parsed.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Arrays": "._kinds",
        "Checkpoint": "._kinds",
        "Images": "._kinds",
        "Pairs": "._kinds",
        "Retrieval": "._kinds",
        "Sentences": "._kinds",
        "SetInfo": "._catalogue",
        "Table": "._kinds",
        "Text": "._kinds",
        "Tokens": "._kinds",
        "cache_folder": "._sources",
        "download": "._catalogue",
        "from_path": "._user_files",
        "info": "._catalogue",
        "load": "._catalogue",
        "names": "._catalogue",
    },
)
