"""Tables: UCI regression sets with ten fixed splits, censuses of houses and of accidents, scikit-learn's diabetes."""

from __future__ import annotations

import gzip
import io

import numpy as np

from quernel._errors import DataError
from quernel.data._kinds import Table
from quernel.data._sources import DataSet, File, Source


def _numbers(content: bytes, delimiter: str, skip: int = 0) -> np.ndarray:
    try:
        return np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=delimiter, skiprows=skip, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"not a gzipped table of numbers: {error}") from error


def _uci(split: str, rows: bytes, masks: bytes) -> Table:
    table = _numbers(rows, ",")
    return Table(table[:, :-1], table[:, -1], _numbers(masks, ",").astype(bool))


def _pmlb(split: str, content: bytes) -> Table:
    table = _numbers(content, "\t", skip=1)
    return Table(table[:, :-1], table[:, -1])


def _diabetes(split: str) -> Table:
    from sklearn.datasets import load_diabetes

    return Table(*load_diabetes(return_X_y=True))


def _uci_set(name: str, what: str, rows: str, masks: str) -> DataSet:
    files = (File(f"tabular/uci_{name}.csv.gz", rows), File(f"tabular/uci_{name}_test_mask.csv.gz", masks))
    return DataSet(
        f"uci-{name}",
        what,
        "CC BY 4.0 (UCI)",
        "UCI Machine Learning Repository; splits: github.com/treforevans/uci_datasets",
        ("all",),
        (Source(_uci, {"all": files}),),
    )


_HOUSE = File("tabular/pmlb_574_house_16H.tsv.gz", "a551e2941365201552a3a819f035c64f297467464f7c7c349d00711316ce3c57")

_FARS = File("tabular/pmlb_fars.tsv.gz", "aa9ed26f7111c3998e867d30986075f26f0fb0a35bf70645fa482713e2cf5c71")

SETS = (
    DataSet(
        "diabetes",
        "442 patients, 10 standardised measurements, disease progression a year later",
        "free for research with citation",
        "Efron et al. 2004, bundled with scikit-learn",
        ("all",),
        (Source(_diabetes, {"all": ()}),),
    ),
    DataSet(
        "fars",
        "100,968 persons in fatal road accidents, 29 mostly categorical columns coded as numbers, 8 grades of injury",
        "public domain (US government); table: MIT",
        "NHTSA Fatality Analysis Reporting System 2001, KEEL; table: github.com/EpistasisLab/pmlb",
        ("all",),
        (Source(_pmlb, {"all": (_FARS,)}),),
    ),
    DataSet(
        "house-16h",
        "22,784 census blocks, 16 features, median price of houses",
        "free for research with citation",
        "US census 1990, Delve; table: github.com/EpistasisLab/pmlb",
        ("all",),
        (Source(_pmlb, {"all": (_HOUSE,)}),),
    ),
    _uci_set(
        "concrete",
        "1,030 mixtures, 8 features, compressive strength",
        "542c5d9a0d301bdb47550280398dcbbe2fb8404631fc945de1ea6df9ade741c6",
        "fae0926c655e4f9fb5669d0dbf2226bd8ff7daaadbd376adb8f32eac6f752e7e",
    ),
    _uci_set(
        "energy",
        "768 buildings, 8 features, heating load",
        "431b6df04243db782bbcd45e408373a654334496ebe5d9c9985ab2e826a39f51",
        "217df2cd4cabf818390e26a65384ea113c95b75bd687787a37ed2f87f28c9bb8",
    ),
    _uci_set(
        "housing",
        "506 districts of Boston, 13 features, median price of homes",
        "9f5b8a1cbc051465dcf10f4298aaccd8a596ea68de0db693159be6e7d07ccf12",
        "4c114b259566dd04b92befc3f22709d77fe1d5a9048cebe2452c50d57056c1ac",
    ),
    _uci_set(
        "kin40k",
        "40,000 poses of a simulated robot arm, 8 angles, distance of the hand",
        "9bee7f2a9f39aa61a015f239378368601fb3978c5bb9a96433e88a55d40883ba",
        "d15fd645d0e81a9a17ce2d0b8dde470bb2efba4d5f417459965abe4b237e2aea",
    ),
)
