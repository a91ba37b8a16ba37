"""Tables with classes: census records of Adult, addresses of Phishing Websites, five stages of sleep."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np

from quernel._errors import DataError
from quernel.data._kinds import Table
from quernel.data._sources import DataSet, File, Source
from quernel.data.tables import _pmlb

_ADULT_COLUMNS = 123


def _adult(split: str, content: bytes) -> Table:
    from sklearn.datasets import load_svmlight_file

    try:
        x, y = load_svmlight_file(io.BytesIO(gzip.decompress(content)), n_features=_ADULT_COLUMNS)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"not a gzipped table in LIBSVM form with {_ADULT_COLUMNS} columns: {error}") from error
    if not len(y):
        raise DataError("a table in LIBSVM form must have at least one row; got none")
    return Table(np.asarray(x.toarray()), y)


def _phishing(split: str, content: bytes) -> Table:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            return Table(held["X"].astype(np.float64), held["y"].astype(np.float64))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"not a NumPy archive with arrays X and y: {error}") from error


SETS = (
    DataSet(
        "adult",
        "48,842 persons of a census, 123 binary features, income above 50,000 dollars (+1) or not (-1)",
        "CC BY 4.0 (UCI)",
        "UCI Adult, binned and one-hot as a9a of the LIBSVM data page",
        ("train", "test"),
        (
            Source(
                _adult,
                {
                    "train": (
                        File(
                            "tabular/a9a.libsvm.gz", "e668fbe4c7500e831ef62fbabfc4a7d22b35b6f611fbf80eca77efcdf528a9f0"
                        ),
                    ),
                    "test": (
                        File(
                            "tabular/a9a.t.libsvm.gz",
                            "d52d0c91c3f108f1bf34e4af73003a01ce19c3fcf099f319f084ebb349b8d16c",
                        ),
                    ),
                },
            ),
        ),
    ),
    DataSet(
        "phishing",
        "11,055 web sites, 30 features of -1, 0 and 1, legitimate (+1) or phishing (-1)",
        "CC BY 4.0 (UCI)",
        "UCI Phishing Websites (Mohammad et al. 2012)",
        ("all",),
        (
            Source(
                _phishing,
                {
                    "all": (
                        File(
                            "tabular/phishing_websites.npz",
                            "3fe7d6d25a4870b119f44c7174979053f5953b563106a6a96ee4aa2a6ca738b9",
                        ),
                    )
                },
            ),
        ),
    ),
    DataSet(
        "sleep",
        "105,908 intervals of sleep, 13 measurements, stage 1 to 5",
        "free for research with citation",
        "StatLib sleep stages; table: github.com/EpistasisLab/pmlb",
        ("all",),
        (
            Source(
                _pmlb,
                {
                    "all": (
                        File(
                            "tabular/pmlb_sleep.tsv.gz",
                            "da326113ba8074a5931eb92db0c9acbe8a0ffff62aa916b11a761bdef11231ce",
                        ),
                    )
                },
            ),
        ),
    ),
)
