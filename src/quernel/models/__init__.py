"""Bundled and reference models: pretrained, or trained once on first use and cached; and the tasks to judge them.

``load(name)`` gives a model, ``task(model, data)`` its calibration batches and metric, ``resolve`` opens what
a user names: a bundled model, a folder, or ``package.module:factory``.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DigitsCNN": ".digits_cnn",
        "LSNet": ".lsnet",
        "MetaNeXt": ".metanext",
        "MetaNeXtBlock": ".metanext",
        "MiniLM": ".sentence_encoder",
        "NaLaBlock": ".nalaformer",
        "NaLaFormer": ".nalaformer",
        "PairConnectForCausalLM": (".pair_connect_hf", "hf"),
        "PairConnectLM": ".pair_connect_lm",
        "ResNet20": ".resnet20",
        "SOFT": ".soft",
        "SentenceEncoder": ".sentence_encoder",
        "Task": "._task",
        "Terminator": ".terminator",
        "TinyLM": ".decoder",
        "inceptionnext_atto": ".metanext",
        "inceptionnext_base": ".metanext",
        "inceptionnext_small": ".metanext",
        "inceptionnext_tiny": ".metanext",
        "load": "._bundled",
        "lsnet_b": ".lsnet",
        "lsnet_s": ".lsnet",
        "lsnet_t": ".lsnet",
        "names": "._bundled",
        "reparameterize": ".lsnet",
        "resolve": "._resolve",
        "save": "._bundled",
        "slow_neural_loss": ".terminator",
        "task": "._join",
        "tiny_lm": "._lm_training",
    },
)
