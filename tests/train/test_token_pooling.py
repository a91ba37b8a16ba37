"""Poolings as sentence-transformers uses them: tasks, lists, padded batches, pipelines, saving, pooling twice."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import catalogue
from quernel.nn.functional import cluster_tokens

pytest.importorskip("sentence_transformers", minversion="6.0")

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.util import maxsim

from quernel.models._sentence_folder import minilm_folder
from quernel.train import ClusterPooling, CrispLoss, SpacingPooling, TailPooling

POOLINGS = [ClusterPooling(2, 4), TailPooling(2, 4), SpacingPooling(6, 3)]


def test_all_are_in_the_catalogue() -> None:
    found = {(e.name, e.contract) for e in catalogue() if e.slug == "crisp" and not e.headline}
    assert {(type(pool).__name__, "trainer") for pool in POOLINGS} <= found


def matrices(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, 6, generator=draw), dim=-1) for n in lengths]


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return x, torch.arange(x.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]


@pytest.mark.parametrize("pool", POOLINGS, ids=lambda p: type(p).__name__)
def test_lists_batches_and_features_are_pooled_alike(pool) -> None:
    rows = matrices(12, 3, 7)
    for task, sizes in (("query", [2, 2, 2]), ("document", [4, 3, 4]), (None, [4, 3, 4])):
        if isinstance(pool, SpacingPooling):
            sizes = [-(-n // (6 if task == "query" else 3)) for n in (12, 3, 7)]
        wanted = pool.pool(rows, task=task)
        assert [len(v) for v in wanted] == sizes
        x, mask = padded(rows)
        features = pool({"token_embeddings": x, "attention_mask": mask.long()}, task=task)
        for i, one in enumerate(wanted):
            got = features["token_embeddings"][i][features["attention_mask"][i]]
            torch.testing.assert_close(got, one)
        for side in ("right", "left"):
            batch = pool.pool(x, task=task, attention_mask=mask, padding_side=side)
            assert batch.shape == (3, max(sizes), 6)
            first = batch[1, : sizes[1]] if side == "right" else batch[1, -sizes[1] :]
            torch.testing.assert_close(first, wanted[1])
    torch.testing.assert_close(pool.pool_one(rows[0], task="query"), pool.pool(rows[:1], task="query")[0])


def test_tasks_that_do_not_apply_pass_through() -> None:
    rows, pool = matrices(12, 7), ClusterPooling(tasks="document")
    assert pool.pool(rows, task="query") is rows
    features = {"token_embeddings": rows[0][None], "attention_mask": torch.ones(1, 12)}
    assert pool(features, task="query") is features
    assert pool.pool([]) == []
    assert ClusterPooling().tasks == ["query", "document"]


def test_pooling_twice_is_warned_about() -> None:
    pool, rows = ClusterPooling(2, 4), matrices(12, 7)
    x, mask = padded(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once = pool.pool(rows)
        features = pool({"token_embeddings": x, "attention_mask": mask}, task="document")
        pool.pool(rows)
    with pytest.warns(UserWarning, match="pooled already"):
        pool.pool(once)
    with pytest.warns(UserWarning, match="TailPooling gets vectors that are pooled already"):
        TailPooling(2, 2)(features, task="document")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClusterPooling(0, 4), "k_query must be an integer"),
        (lambda: ClusterPooling(2, 1.0), "k_document must be a finite number in"),
        (lambda: ClusterPooling(iters=0), "iters must be"),
        (lambda: TailPooling(2, -3), "k_document must be"),
        (lambda: SpacingPooling(0), "step_query must be"),
        (lambda: ClusterPooling().pool(matrices(3, 0)), r"x\[1\] has no tokens"),
        (lambda: ClusterPooling().pool([torch.full((3, 2), torch.nan)]), "holds NaN"),
        (lambda: ClusterPooling().pool(torch.zeros(1, 3, 2)), "attention_mask must be given"),
        (lambda: ClusterPooling().pool(matrices(3), padding_side="top"), "padding_side must be"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A BERT of one narrow layer with MiniLM's tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    for file in minilm_folder().iterdir():
        if "token" in file.name or file.name in ("vocab.txt", "special_tokens_map.json"):
            shutil.copy(file, folder)
    return folder


QUERIES = ["what moves a wing", "heat of a plate"]
DOCUMENTS = [
    "the lift of a wing moves it up while the air streams below and above it at different speeds",
    "a heated plate in a laminar flow loses its heat to the boundary layer as the flow passes over the plate",
]


def test_a_model_ends_with_it_is_saved_and_trained(encoder_folder, tmp_path) -> None:
    model = MultiVectorEncoder(str(encoder_folder), device="cpu")
    plain = model.encode_document(DOCUMENTS)
    pool = ClusterPooling(2, 6)
    wanted = model.encode_document(DOCUMENTS, token_pooling=pool)
    assert [len(v) for v in plain] != [6, 6] == [len(v) for v in wanted]
    torch.testing.assert_close(wanted[0], cluster_tokens(plain[0][None], 6).vectors[0])
    model.append(pool)
    assert [len(v) for v in model.encode_query(QUERIES)] == [2, 2]
    for got, want in zip(model.encode_document(DOCUMENTS), wanted, strict=True):
        torch.testing.assert_close(got, want)
    model.save(str(tmp_path / "model"))
    stages = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert stages[-1]["type"].endswith("ClusterPooling")
    twin = MultiVectorEncoder(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert twin[-1].get_config_dict() == pool.get_config_dict()
    for got, want in zip(twin.encode_document(DOCUMENTS), wanted, strict=True):
        torch.testing.assert_close(got, want)
    scores = maxsim(model.encode_query(QUERIES), model.encode_document(DOCUMENTS))
    assert scores.shape == (2, 2)
    loss = CrispLoss(model, temperature=0.5)
    columns = [model.preprocess(QUERIES, task="query"), model.preprocess(DOCUMENTS, task="document")]
    value = loss(columns)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
