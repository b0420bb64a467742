"""Exact folding of repeated context tokens in SD3's joint attention.

SD3 pads its T5 prompt to 256 tokens without a mask. Padding tokens that are identical stay identical through every
block, and n identical keys in a softmax weigh exactly as much as one key whose logit is raised by log(n). So one
token with that bias gives the same picture as the whole run, for a fraction of the work.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fold_repeats(prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Fold the trailing run of identical tokens, as long as every row of the batch has it, into one token.

    `prompt_embeds` is [B, L, D]. Returns the folded embeddings [B, L', D] and the bias `log_repeats` [B, L'] that
    `FoldedJointAttnProcessor` takes as `context_log_repeats`: zero, except the log of the run's length at its token.
    Rows may repeat different tokens. If nothing repeats, the input is returned as it is, with zeros.
    """
    same_as_last = (prompt_embeds == prompt_embeds[:, -1:]).all(dim=-1).all(dim=0)
    run = int(same_as_last.flip(0).to(torch.int64).cumprod(0).sum())
    folded = prompt_embeds[:, : prompt_embeds.shape[1] - run + 1]
    log_repeats = prompt_embeds.new_zeros(folded.shape[:2])
    log_repeats[:, -1] = math.log(run)
    return folded, log_repeats


class FoldedJointAttnProcessor:
    """Diffusers' `JointAttnProcessor2_0` with one more input: `context_log_repeats` [B, L_context], or None.

    This input is added to the attention logits of the context keys. Pass it through `joint_attention_kwargs`. Without
    it, the result is that of the stock processor.
    """

    def __call__(
        self,
        attn: Any,  # a diffusers Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context_log_repeats: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend jointly over image tokens [B, N, D] and context tokens [B, L, D], if given; returns the same shapes.

        `attention_mask` is ignored, as in the stock processor.
        """
        image_tokens = hidden_states.shape[1]
        query, key, value = (
            _split_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)

        bias = None
        if encoder_hidden_states is not None:
            context_query, context_key, context_value = (
                _split_heads(project(encoder_hidden_states), attn.heads)
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat([query, _normed(attn.norm_added_q, context_query)], dim=2)
            key = torch.cat([key, _normed(attn.norm_added_k, context_key)], dim=2)
            value = torch.cat([value, context_value], dim=2)
            if context_log_repeats is not None:
                bias = F.pad(context_log_repeats.to(query.dtype), (image_tokens, 0))[:, None, None, :]

        joint = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        joint = joint.transpose(1, 2).flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](joint[:, :image_tokens]))
        if encoder_hidden_states is None:
            return image
        context = joint[:, image_tokens:]
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(norm: torch.nn.Module | None, tokens: Tensor) -> Tensor:
    """`tokens`, through the query or key norm where the model has one."""
    return tokens if norm is None else norm(tokens)
