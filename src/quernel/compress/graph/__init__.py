"""Which channels of a model belong together, read from its ``torch.export`` graph."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ChannelGroup": "._groups",
        "ChannelMap": "._groups",
        "LeftAlone": "._groups",
        "Slot": "._groups",
        "channel_groups": "._groups",
        "channel_map": "._groups",
        "explicit_map": "._explicit",
    },
)
