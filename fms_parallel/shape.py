"""`ModelShape`: the numbers of a transformer that parallelism, planning and metrics need, as one plain value.

It knows sizes; it knows nothing of modules, torch or checkpoints. A model config hands it out with `.shape()`, the
layout is validated against it, the planner predicts from it, the training loop takes its FLOPs from it.

Letters (one legend for the whole library): B batch, S sequence, E model width, H heads, K kv heads, D head width,
F feed-forward width, V vocabulary, L layers; `/tp` marks a shard.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder (or encoder) transformer.

    Attributes:
        layers: L. width: E. heads: H. kv_heads: K. head_width: D. ffn_width: F. vocab: V.
        max_positions: longest sequence in tokens.
        gated: feed-forward has a gate matrix (three matrices instead of two).
        tied: embedding and head share one matrix.
        attention_bias, ffn_bias: biases on every linear of that kind.
        learned_positions: a table `[max_positions, E]` is a parameter.
        norm_bias: LayerNorm (weight and bias) instead of RMSNorm (weight only).
        qk_norm: a norm weight `[D]` on queries and one on keys.
        experts: feed-forwards of a block, each with F; above one, a matrix `[experts, E]` chooses for every token
            experts_used of them.
        other: parameters outside the blocks that none of the above counts (token types, a classifier).
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    vocab: int
    max_positions: int
    gated: bool = True
    tied: bool = False
    attention_bias: bool = False
    ffn_bias: bool = False
    learned_positions: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    experts: int = 1
    experts_used: int = 1
    other: int = 0

    @property
    def attention_parameters(self) -> int:
        """Parameters of one block's attention."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        weights = self.width * (q + 2 * kv) + q * self.width
        biases = q + 2 * kv + self.width if self.attention_bias else 0
        return weights + biases + (2 * self.head_width if self.qk_norm else 0)

    @property
    def ffn_parameters(self) -> int:
        """Parameters of one block's feed-forward, all experts and their router included."""
        ups = 2 if self.gated else 1
        biases = ups * self.ffn_width + self.width if self.ffn_bias else 0
        one = (ups + 1) * self.width * self.ffn_width + biases
        return self.experts * one + self.router_parameters

    @property
    def router_parameters(self) -> int:
        """Parameters of what chooses among a block's experts."""
        return self.experts * self.width if self.experts > 1 else 0

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over E."""
        return self.width * (2 if self.norm_bias else 1)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: attention, feed-forward, two norms."""
        return self.attention_parameters + self.ffn_parameters + 2 * self.norm_parameters

    def parameters(self) -> int:
        """Unique parameters of the whole model (a tied head counts once)."""
        tables = self.vocab * self.width * (1 if self.tied else 2)
        positions = self.max_positions * self.width if self.learned_positions else 0
        return tables + positions + self.layers * self.block_parameters + self.norm_parameters + self.other

    def flops_per_token(self, sequence: int, *, causal: bool = True, training: bool = True) -> int:
        """Floating-point operations that one token costs in a sequence of `sequence` tokens.

        Matrix multiplications only: 2 per weight that multiplies (embedding look-ups do not, the head does), plus
        attention's 2 * 2 * S * H * D, halved when causal. Training counts forward and backward: three times as much,
        whatever is computed again (by recomputation, or inside fused attention).
        Formula: Narayanan et al. 2021 (arXiv 2104.04473), with the causal half that they leave out.
        """
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        ffn = self.experts_used * (3 if self.gated else 2) * self.width * self.ffn_width + self.router_parameters
        weights = self.width * (q + 2 * kv) + q * self.width + ffn
        scores = 4 * sequence * q
        attention = scores // 2 if causal else scores
        forward = self.layers * (2 * weights + attention) + 2 * self.vocab * self.width
        return forward * (3 if training else 1)

    def activation_bytes(
        self, batch: int, sequence: int, *, bytes_per_element: int = 2, tp: int = 1, sp: bool = False
    ) -> int:
        """Bytes that one rank keeps for the backward pass of one forward, without recomputation.

        Counts what this library's modules save per token (Korthikanti et al. 2022, arXiv 2205.05198, with fused
        attention, so no S x S scores). Per block: two norm inputs, the input of each column-parallel region (with sp a
        run of 1/tp, gathered again in the backward pass; all of it where experts choose), q, k, v, the attention output
        and its log-sum-exp, gate and up and what the down matrix reads. After the blocks: the last norm's input and
        the gradient of the head's. Not counted: dropout masks, a gate other than silu (F more per block and token),
        fused q, k, v (of which v keeps all; (H + K) * D more), matrices cast to another dtype, and what the loss keeps,
        which is the head's gradient.
        """
        run = self.width / (tp if sp else 1)
        heads = (self.heads * 2 + 2 * max(self.kv_heads, tp)) * self.head_width / tp
        feed_forward = self.experts_used * (3 if self.gated else 2) * self.ffn_width / tp
        if self.experts > 1:  # what they choose from, and what each of a token's experts read and made
            feed_forward += self.width - run + 2 * self.experts_used * self.width
        block = bytes_per_element * (4 * run + heads + feed_forward) + 4 * self.heads / tp
        return int(batch * sequence * (self.layers * block + bytes_per_element * 2 * run))
