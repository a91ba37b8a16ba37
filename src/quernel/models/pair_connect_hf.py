"""``PairConnectForCausalLM``: a ``PairConnectLM`` as transformers wants it, for its ``generate`` and its trainer.

There is no cache to hand on: the model is given the last W ids again, which is all that it would look at.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from quernel.models.pair_connect_lm import PairConnectLM

# Label of a token that does not count, as everywhere in transformers.
IGNORED = -100


class PairConnectConfig(PreTrainedConfig):
    """The constructor's arguments of a ``PairConnectLM``, under ``lm``."""

    model_type = "quernel-pairconnect"

    def __init__(self, lm: dict[str, Any] | None = None, **rest: Any) -> None:
        self.lm = {"vocab": 2, "dim": 2, "layers": 1, "rows": 2} if lm is None else dict(lm)
        self.vocab_size = self.lm["vocab"]
        self.hidden_size, self.num_hidden_layers = self.lm["dim"], self.lm["layers"]
        super().__init__(**{"use_cache": False, "tie_word_embeddings": bool(self.lm.get("tied", True))} | rest)


class PairConnectForCausalLM(PreTrainedModel, GenerationMixin):
    """A ``PairConnectLM`` behind the interface of transformers.

    Parameters
    ----------
    config : PairConnectConfig
        ``of`` makes it from a model.

    Examples
    --------
    >>> import torch
    >>> from quernel.models import PairConnectForCausalLM, PairConnectLM
    >>> model = PairConnectLM(vocab=50, dim=16, window=8, rows=1000).eval()
    >>> ids = torch.randint(0, 50, (1, 4))
    >>> wrapped = PairConnectForCausalLM.of(model)
    >>> bool((wrapped.generate(ids, max_new_tokens=5, do_sample=False) == model.generate(ids, 5)).all())
    True
    """

    config_class = PairConnectConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm.head.weight": "lm.embed.weight"}

    def __init__(self, config: PairConnectConfig, lm: PairConnectLM | None = None) -> None:
        super().__init__(config)
        self.lm = PairConnectLM(**config.lm) if lm is None else lm
        self.post_init()

    @classmethod
    def of(cls, model: PairConnectLM, **rest: Any) -> PairConnectForCausalLM:
        """Return a wrapper of this very model; further arguments go to the config, such as ``eos_token_id``."""
        return cls(PairConnectConfig(model.config(), **rest), model).train(model.training)

    def _init_weights(self, module: Any) -> None:
        """Leave the values as the model's own constructor, or a file, has set them."""

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""
        return self.lm.embed

    def get_output_embeddings(self) -> Any:
        """Return the output layer."""
        return self.lm.head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> dict[str, Any]:
        """Return the last W ids and their mask: nothing else is looked at."""
        window = self.lm.window
        mask = None if attention_mask is None else attention_mask[:, -window:]
        return {"input_ids": input_ids[:, -window:], "attention_mask": mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **rest: Any,
    ) -> CausalLMOutput:
        """Return logits (B, T, vocab) and, with labels (the ids themselves), the loss of predicting each next one."""
        logits = self.lm(input_ids, None if attention_mask is None else attention_mask.bool()).logits
        loss = None
        if labels is not None:
            wanted = labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=IGNORED)
        return CausalLMOutput(loss=loss, logits=logits)
