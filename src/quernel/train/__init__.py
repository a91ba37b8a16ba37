"""Train compressed models: fine-tune what is left, and put it back together."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CascadeClassifier": ".cascade",
        "ClusterPooling": (".token_pooling", "hf"),
        "CompatibleTrainer": ".compatible_trainer",
        "CrispLoss": ".crisp",
        "FrankWolfePolicy": ".frank_wolfe_policy",
        "GradualMagnitudePruner": ".magnitude_pruning",
        "HOCLoss": ".hoc_loss",
        "Kar2": ".kar",
        "Kar3": ".kar",
        "MatryoshkaAdapter": ".matryoshka_adapter",
        "MatryoshkaLoss": ".matryoshka_loss",
        "ReplayBuffer": ".replay_buffer",
        "SpacingPooling": (".token_pooling", "hf"),
        "TailPooling": (".token_pooling", "hf"),
        "fit_matryoshka_adapter": ".matryoshka_adapter",
        "low_rank_only": ".low_rank",
        "merge_low_rank": ".low_rank",
    },
)
