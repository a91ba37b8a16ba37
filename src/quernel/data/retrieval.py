"""Test collections of retrieval: documents and queries as JSON lines, relevance judgements as a table."""

from __future__ import annotations

import csv
import gzip
import io
import json

import numpy as np

from quernel._errors import DataError
from quernel.data._kinds import Retrieval
from quernel.data._sources import DataSet, File, Source


def _collection(split: str, corpus: bytes, queries: bytes, judgements: bytes) -> Retrieval:
    """Parse the layout of BEIR; every pair that is listed counts as relevant."""
    documents = [json.loads(line) for line in gzip.decompress(corpus).decode("utf-8").splitlines()]
    asked = [json.loads(line) for line in queries.decode("utf-8").splitlines()]
    place = {held["_id"]: i for i, held in enumerate(documents)}
    relevant: dict[str, list[int]] = {query["_id"]: [] for query in asked}
    for query, document, _ in list(csv.reader(io.StringIO(judgements.decode("utf-8")), delimiter="\t"))[1:]:
        if query not in relevant or document not in place:
            raise DataError(f"a judgement names query {query!r} and document {document!r}, which are not both there")
        relevant[query].append(place[document])
    return Retrieval(
        tuple(_whole(held.get("title", ""), held["text"]) for held in documents),
        tuple(query["text"] for query in asked),
        tuple(np.unique(np.array(found, np.int64)) for found in relevant.values()),
    )


def _whole(title: str, text: str) -> str:
    """Return title and text; Cranfield's texts begin with their titles already."""
    return text if text.startswith(title) else f"{title} {text}".strip()


def _source(name: str, corpus: str, queries: str, judgements: str) -> Source:
    files = (
        File(f"ir/{name}_corpus.jsonl.gz", corpus),
        File(f"ir/{name}_queries.jsonl", queries),
        File(f"ir/{name}_qrels.tsv", judgements),
    )
    return Source(_collection, {"all": files})


SETS = (
    DataSet(
        "cranfield",
        "Cranfield: 1,400 abstracts of aerodynamics, 225 queries, 1,837 relevant pairs (any grade)",
        "distributed for research",
        "Glasgow IR test collections, ir.dcs.gla.ac.uk",
        ("all",),
        (
            _source(
                "cranfield",
                "6ae0a8f74a584fce375056efcf9eb1887bf35710acb5146cdbdd266081c5fd75",
                "70914f4cee2b861959813356b008b8c61b78400e4de7e03193c3ea0cff72a63f",
                "01f160f8a22710fec39069bb688fb153693eb56c94d05b55ec855a06c0a3f1f4",
            ),
        ),
    ),
    DataSet(
        "npl",
        "NPL: 11,429 short abstracts of electronics, 93 queries, 2,083 relevant pairs",
        "distributed for research",
        "Glasgow IR test collections, ir.dcs.gla.ac.uk",
        ("all",),
        (
            _source(
                "npl",
                "001374edd8970e972a452b1ad63805d33d6bba081b6236df36ffcebbdd0b62bc",
                "7477722a4bfb586891f475d0b90ba651775e0fcfb41b1b35d8e9600b7bf237db",
                "e4ce1335ba4914ea0d574e6a08264e1c2d3677d93acf2ea699cfef31d19cca88",
            ),
        ),
    ),
)
