"""A network in place of a wave solver: data from a finite-difference scheme, training, rollout, pictures.

``wave_data`` solves the wave equation for random starts, ``train_surrogate`` fits a ``WaveSurrogate`` to predict the
next frame from the last ones, ``rollout`` feeds its predictions back, ``save_page`` draws them beside the truth.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "WaveData": ".dataset",
        "WaveSolver": ".solver",
        "WaveSurrogate": ".surrogate",
        "one_step_error": ".training",
        "rollout": ".surrogate",
        "rollout_errors": ".training",
        "save_page": ".page",
        "train_surrogate": ".training",
        "wave_data": ".dataset",
    },
)
