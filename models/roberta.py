"""RoBERTa (arXiv 1907.11692) and BERT (arXiv 1810.04805): variants, the body, and a module for each of three tasks.

An encoder: every token attends to every other one that is no padding. Single-device code; embeddings, norms, attention,
feed-forward and heads have their tensor-parallel twins in `fms_parallel.modules`. Keys and configs of Hugging Face are
in `hf/roberta.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.modules.added_embedding import AddedEmbedding
from fms_parallel.modules.attention import Attention, AttentionShape
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.context import Context, last_position, positions_of
from fms_parallel.modules.dense import Dense, Drops, SequenceClassifier
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.embedding import Embedding, Head
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.modules.loss import summed_cross_entropy
from fms_parallel.modules.norm import LayerNorm
from fms_parallel.modules.sequences import DropoutKey, Sequences
from fms_parallel.modules.tp import TPModule
from fms_parallel.shape import ModelShape

from .hf.roberta import CLASSIFICATION, MASKED, QUESTION_ANSWERING, TaskKeys, config_from_hf, config_to_hf, hf_adapter
from .registry import Architecture, register_model
from .sized import Sized

POSITIONS = ("roberta", "bert")


@dataclass(frozen=True)
class RobertaConfig(Sized):
    """Sizes and switches of one RoBERTa or BERT with a masked-language-model head.

    Attributes:
        vocab_size: V. width: E. layers: L. heads: H. ffn_width: F.
        max_positions: longest sequence. positions: how they are counted, and whose checkpoints have these keys:
            `roberta` counts the tokens that are no padding, from padding_id + 1; `bert` counts all from 0.
        token_types: rows of the table of token types (BERT's sentence A and B).
        activation: of the feed-forward. tied: the head is the embedding. norm_eps: of every norm.
        padding_id: the token that nobody attends to and whose row is not trained; None when there is no such token.
        dropout: on the embeddings and on what each half of a block adds. attention_dropout: on the attention weights.
        fused: store query, key and value as one parameter. std: of the initial weights.
        bos_id, eos_id: token ids, where the tokenizer has them.
    """

    vocab_size: int = 50265
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    positions: str = "roberta"
    token_types: int = 1
    activation: str = "gelu"
    tied: bool = True
    norm_eps: float = 1e-5
    padding_id: int | None = 1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    fused: bool = False
    std: float = 0.02
    bos_id: int | None = 0
    eos_id: int | None = 2

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ConfigError(unknown("positions", self.positions, POSITIONS))
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide by {self.heads} heads.")
        if self.positions == "roberta" and self.padding_id is None:
            raise ConfigError('positions="roberta" are counted from padding_id + 1: give padding_id.')

    @property
    def d(self) -> int:
        """D: head width."""
        return self.width // self.heads

    @property
    def first_position(self) -> int:
        """Row of the first token's position; RoBERTa never uses the rows before padding's."""
        return 0 if self.positions == "bert" else (self.padding_id or 0) + 1

    @property
    def head_activation(self) -> str:
        """Of the masked-language-model head: RoBERTa's is gelu, whatever the feed-forward has."""
        return self.activation if self.positions == "bert" else "gelu"

    @property
    def head_parameters(self) -> int:
        """Parameters of the head, without the matrix that may be the embedding."""
        return self.width * (self.width + 1) + 2 * self.width + self.vocab_size

    def shape(self) -> ModelShape:
        """Sizes for the planner, the layout's validation and the metrics."""
        return ModelShape(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.d,
            ffn_width=self.ffn_width,
            vocab=self.vocab_size,
            max_positions=self.max_positions,
            gated=False,
            tied=self.tied,
            attention_bias=True,
            ffn_bias=True,
            learned_positions=True,
            norm_bias=True,
            other=(self.first_position + self.token_types) * self.width + self.head_parameters,
        )

    def flops_per_token(self, sequence: int) -> int:
        """Forward and backward, see `ModelShape.flops_per_token`: nothing is causal here."""
        return self.shape().flops_per_token(sequence, causal=False)


@dataclass(frozen=True)
class RobertaClassificationConfig(RobertaConfig):
    """With a class for each sequence instead of a token for each position.

    Attributes:
        classes: C. classifier_dropout: in front of the head's matrices (None: as `dropout`).
    """

    classes: int = 2
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ConfigError(f"classes={self.classes}: a class is chosen among two or more (regression is not built).")
        if not self.tied:
            raise ConfigError("tied=False: this head has no matrix that could be the embedding; leave tied=True.")

    @property
    def drops(self) -> Drops:
        """Of the head. BERT's first matrix is its pooler, which drops nothing."""
        p = self.dropout if self.classifier_dropout is None else self.classifier_dropout
        return Drops(0.0 if self.positions == "bert" else p, p)

    @property
    def head_parameters(self) -> int:
        """Parameters of the head."""
        return self.width * (self.width + 1) + self.classes * (self.width + 1)

    def flops_per_token(self, sequence: int) -> int:
        """Forward and backward, without a head over the vocabulary; what is done once a sequence is left out."""
        return super().flops_per_token(sequence) - 6 * self.vocab_size * self.width


@dataclass(frozen=True)
class RobertaQuestionAnsweringConfig(RobertaConfig):
    """With a score for being the first and one for being the last token of the answer."""

    @property
    def head_parameters(self) -> int:
        """Parameters of the head."""
        return 2 * (self.width + 1)

    def flops_per_token(self, sequence: int) -> int:
        """Forward and backward; the head has two rows instead of V."""
        return super().flops_per_token(sequence) - 6 * (self.vocab_size - 2) * self.width


class RobertaBlock(nn.Module):
    """norm(x + attention(x)), then norm(. + feed_forward(.)): norms behind the sums."""

    def __init__(self, config: RobertaConfig, layer: int) -> None:
        super().__init__()
        shape = AttentionShape(
            config.width,
            config.heads,
            config.heads,
            config.d,
            qkv_bias=True,
            out_bias=True,
            fused=config.fused,
            causal=False,
            dropout=config.attention_dropout,
            std=config.std,
            out_std=config.std,
        )
        self.attention = Attention(shape, layer)
        self.attention_dropout = Dropout(config.dropout, salt=2 * layer + 1)
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(
            config.width,
            config.ffn_width,
            config.activation,
            gated=False,
            bias=True,
            std=config.std,
            out_std=config.std,
        )
        self.ffn_dropout = Dropout(config.dropout, salt=2 * layer + 2)
        self.ffn_norm = LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, seq), seq))
        return self.ffn_norm(x + self.ffn_dropout(self.feed_forward(x), seq))


class TPRobertaBlock(TPModule, RobertaBlock):
    """The same on this rank's tokens: with sp the residual stays `[T/tp, E]` from the embedding to the head.

        x [T/tp, E] --> attention: gather [T, E], H/tp heads, reduce-scatter --> + x --> norm [T/tp, E]
                    --> feed-forward: gather [T, E], F/tp, reduce-scatter    --> + x --> norm [T/tp, E]

    It holds no parameter of its own and changes nothing: norms, attention, feed-forward and dropout are twins.
    """

    def placements(self) -> dict[str, Placement]:
        return {}


class RobertaBody(nn.Module):
    """Embeddings of tokens, positions and token types, their norm, L blocks. Each task derives from it."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        width, std, padding = config.width, config.std, config.padding_id
        rows = config.first_position + config.max_positions
        unused = padding if config.positions == "roberta" else None
        self.embedding = Embedding(config.vocab_size, width, std, padding_id=padding)
        self.position_embedding = AddedEmbedding(rows, width, std, padding_id=unused)
        self.token_type_embedding = AddedEmbedding(config.token_types, width, std, what="token type")
        self.embedding_norm = LayerNorm(width, config.norm_eps)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = Blocks(RobertaBlock(config, layer) for layer in range(config.layers))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
        dropout: DropoutKey | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Logits, or the summed loss.

        Args:
            input_ids: `[B, S]`. labels: what the task asks for, -100 for nothing; see `leave`.
            mask: bool `[B, S]`, True for tokens that may be attended to; None: all but padding.
            token_types: `[B, S]`; None: all 0. dropout: names this forward's random bits.
            context: what of longer sequences the S tokens are, when the ranks of cp share them; collective over them.
        Returns:
            logits, or with labels the cross-entropy summed over them, in fp32.
        Raises:
            ConfigError: more tokens than `max_positions`.
        """
        batch, length = input_ids.shape
        told: dict[str, Any] = self.facts(input_ids, context, mask=mask, token_types=token_types)
        told.setdefault("positions", positions_of(length, 0, context, input_ids.device))
        more: dict[str, Any] = {"dropout": dropout, "context": context}
        seq = self.sequences(batch, length, told.pop("positions"), **more, **told)
        x = self.enter(input_ids, seq)
        x = self.layers(x, seq)
        return self.leave(x, seq, labels)

    # The parts of a forward, which a pipeline stage runs one by one.

    row_labels = False
    """Whether labels are of a whole row rather than of each of its tokens."""

    @property
    def activation_width(self) -> int:
        """E."""
        return self.config.width

    def facts(
        self,
        input_ids: Tensor,
        context: Context | None = None,
        *,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What blocks must know of these tokens and cannot see themselves; arguments as of `forward`.

        Returns:
            arguments of `sequences`: `mask [B, S]` of whole rows, also where ranks share them; `positions` and
            `token_types` of the tokens here.
        """
        padding, positions = self.config.padding_id, None
        whole = input_ids if context is None or padding is None else context.gathered(input_ids)
        real = None if padding is None else whole != padding
        if mask is not None and context is not None:
            mask = context.gathered(mask)
        if self.config.positions == "roberta" and real is not None:
            positions = real.cumsum(1) * real + (self.config.first_position - 1)
            positions = positions if context is None else context.cut(positions, 1)
        found = {"mask": real if mask is None else mask.bool(), "positions": positions, "token_types": token_types}
        return {name: each for name, each in found.items() if each is not None}

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Sequences:
        """What every block is told; `mask [B, S]` and others as of `facts`."""
        end = last_position(length, first_position, more.get("context"))
        if end > self.config.max_positions:
            raise ConfigError(f"{end} tokens are more than max_positions={self.config.max_positions} of this model.")
        mask = more.pop("mask", None)
        seen = None if mask is None else mask[:, None, None, :]
        return Sequences(batch, length, mask=seen, positions=positions, **more)

    def enter(self, input_ids: Tensor, seq: Sequences) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        assert seq.positions is not None
        types = seq.token_types
        if types is None:
            types = torch.zeros(seq.length, dtype=torch.int64, device=input_ids.device)
        x = self.token_type_embedding(self.embedding(input_ids), types, seq)
        x = self.position_embedding(x, seq.positions, seq)
        return self.embedding_dropout(self.embedding_norm(x), seq)

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None) -> Tensor:
        """What the last block made -> logits or loss."""
        raise NotImplementedError(f"{type(self).__name__} must say what its task makes of it")


class RobertaMaskedLM(RobertaBody):
    """The token that was hidden at a position."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.head_dense = Dense(config.width, config.width, config.head_activation, config.std)
        self.head_norm = LayerNorm(config.width, config.norm_eps)
        self.head = Head(config.vocab_size, config.width, config.std, bias=True)
        if config.tied:
            self.head.weight = self.embedding.weight

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, S, V]`; with labels `[B, S]`, the token wanted at each position, the summed cross-entropy."""
        return self.head(self.head_norm(self.head_dense(x)), seq, labels)


class RobertaClassification(RobertaBody):
    """A class for each sequence, from its first token."""

    row_labels = True

    def __init__(self, config: RobertaClassificationConfig) -> None:
        super().__init__(config)
        salt = 2 * config.layers + 1  # the last block's is 2 L
        self.classifier = SequenceClassifier(config.width, config.classes, config.drops, salt, config.std)

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, C]`; with labels `[B]` the summed cross-entropy.

        Where ranks share rows, only the first has their first tokens: elsewhere logits mean nothing, labels are -100.
        """
        logits = self.classifier(x, seq)
        return logits if labels is None else summed_cross_entropy(logits, labels)


class RobertaQuestionAnswering(RobertaBody):
    """Where in a sequence the answer to its question begins and ends."""

    row_labels = True

    def __init__(self, config: RobertaQuestionAnsweringConfig) -> None:
        super().__init__(config)
        self.head = Head(2, config.width, config.std, bias=True)

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None) -> Tensor:
        """Scores `[B, S, 2]` for being first and last; with labels `[B, 2]`, those positions, the summed cross-entropy
        over the positions of whole rows, which are put together where ranks share them."""
        scores = self.head(x, seq)
        if labels is None:
            return scores
        whole = scores if seq.context is None else seq.context.gathered(scores)
        return summed_cross_entropy(whole.transpose(1, 2), labels)


# ---- variants ---------------------------------------------------------------------------------------------------

_MICRO: dict[str, Any] = {
    **{"vocab_size": 256, "width": 192, "layers": 5, "heads": 4, "ffn_width": 768, "max_positions": 1024},
    **{"bos_id": 2, "eos_id": 3},
}
_LARGE: dict[str, Any] = {"width": 1024, "layers": 24, "heads": 16, "ffn_width": 4096}
_BERT: dict[str, Any] = {
    **{"vocab_size": 30522, "positions": "bert", "token_types": 2, "norm_eps": 1e-12, "padding_id": 0},
    **{"bos_id": None, "eos_id": None},
}
_SIZES = {"micro": _MICRO, "base": {}, "large": _LARGE, "bert.base": _BERT, "bert.large": _BERT | _LARGE}


def _register(task: TaskKeys, name: str, build: type[RobertaBody], config: type[RobertaConfig]) -> None:
    register_model(
        Architecture(
            name=name,
            build=build,
            variants={variant: config(**sizes) for variant, sizes in _SIZES.items()},
            adapters={"hf": lambda config: hf_adapter(config, task)},
            from_hf=lambda raw: config_from_hf(raw, task, config),
            to_hf=lambda config: config_to_hf(config, task),
            model_types=("roberta", "bert"),
            hf_classes=tuple(task.classes.values()),
        )
    )


_register(MASKED, "roberta", RobertaMaskedLM, RobertaConfig)
_register(CLASSIFICATION, "roberta_classification", RobertaClassification, RobertaClassificationConfig)
_register(QUESTION_ANSWERING, "roberta_question_answering", RobertaQuestionAnswering, RobertaQuestionAnsweringConfig)
