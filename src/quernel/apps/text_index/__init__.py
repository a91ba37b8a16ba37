"""Search in a folder of texts: passages, sentence vectors, any index of the library, a page in the browser."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Hit": ".collection",
        "KINDS": ".kinds",
        "Passage": ".passages",
        "TextIndex": ".collection",
        "make_app": (".server", "serve"),
        "passages_of": ".passages",
        "serve": (".server", "serve"),
    },
)
