"""What a compression did, in numbers: the whole, every layer, every configuration that was tried.

A :class:`Report` is plain frozen data; it prints as text, rich tables, Markdown, JSON and one offline HTML page.
What was not measured is ``None`` and reads "not measured" everywhere. ``matrix_map`` draws a matrix of scores.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LayerReport": "._report",
        "Report": "._report",
        "TrialReport": "._report",
        "matrix_map": "._matrix_plot",
    },
)
